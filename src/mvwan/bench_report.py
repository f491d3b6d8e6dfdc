"""A `BenchReport` for people: tables for the terminal and as Markdown, and a picture of how time and memory grow."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from mvwan.bench import BenchReport, Row
from mvwan.bench_points import Growth
from mvwan.errors import MvwanError
from mvwan.files import whole_file
from mvwan.markdown import markdown_table

_HEADS = ("what", "median", "fastest", "slowest", "ratio", "to", "")
_GROWTH_HEADS = ("axis", "at", "seconds per step", "fit, s", "seconds grow as", "peak memory, MB", "fit, MB")


def rendered(report: BenchReport) -> Group:
    """For `Console.print`."""
    parts: list[RichTable | Text] = [Text(heading(report))]
    for table in report.tables:
        shown = RichTable(title=table.title, title_justify="left")
        for place, head in enumerate(_HEADS):
            shown.add_column(head, justify="right" if 0 < place < 5 else "left")
        for row in table.rows:
            shown.add_row(*cells(row))
        parts.append(shown)
    if report.growth:
        shown = RichTable(title="Growth of a training step", title_justify="left")
        for head in _GROWTH_HEADS:
            shown.add_column(head)
        for growth in report.growth:
            shown.add_row(*growth_cells(growth))
        parts.append(shown)
    return Group(*parts)


def markdown(report: BenchReport, picture: str | None = None) -> str:
    """The same as Markdown; `picture` is linked where growth is shown."""
    lines = [heading(report), ""]
    for table in report.tables:
        lines += [f"### {table.title}", "", markdown_table(_HEADS, map(cells, table.rows), left=(0, 5, 6)), ""]
    if report.growth:
        rows = map(growth_cells, report.growth)
        lines += ["### Growth of a training step", "", markdown_table(_GROWTH_HEADS, rows, left=range(len(_GROWTH_HEADS))), ""]
        lines += [f"![Seconds and memory of a training step along five axes]({picture})", ""] if picture else []
    return "\n".join(lines)


def heading(report: BenchReport) -> str:
    """What was measured on what, in a sentence."""
    sizes, machine = report.sizes, report.machine
    batch = (
        f"{sizes.batch} windows x {sizes.views} views x {sizes.latent_frames} latent frames of {sizes.latent_height} x {sizes.latent_width}"
    )
    where = f"{machine['processor']}, {machine['instructions']}, {machine['threads']} threads, torch {machine['torch']}"
    return f"Size {report.size}: {batch}, products in {machine['products']}. {where}."


def cells(row: Row) -> list[str]:
    """The texts of a line."""
    spread = ["" if value is None else number(value) for value in (row.low, row.high)]
    ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
    return [row.what, f"{number(row.value)} {row.unit}", *spread, ratio, row.beside, row.note]


def growth_cells(growth: Growth) -> list[str]:
    """The texts of an axis."""
    x = "x" if growth.power == 1 else f"x^{growth.power}"

    def fit(line: tuple[float, float]) -> str:
        return f"{number(line[0])} + {number(line[1])} {x}"

    times, peaks = (", ".join(map(number, values)) for values in (growth.seconds, growth.peak_mb))
    places = ", ".join(map(str, growth.at))
    return [growth.axis, places, times, fit(growth.seconds_fit), f"x^{growth.exponent:.2f}", peaks, fit(growth.peak_mb_fit)]


def number(value: float) -> str:
    """Three digits that count; whole numbers from 100 on."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def check_can_draw() -> None:
    """Nothing, or `MvwanError` without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MvwanError("--output: the picture of growth needs matplotlib. Run `pip install 'mvwan[bench]'`, or choose parts by --part.")


def draw_growth(report: BenchReport, path: Path) -> None:
    """Nothing; `path` is a PNG with seconds above and memory below, an axis per column."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(report.growth), 5), layout="constrained")
    grid = figure.subplots(2, len(report.growth), squeeze=False)
    for column, growth in enumerate(report.growth):
        shown = (("seconds per step", growth.seconds, growth.seconds_fit), ("peak memory, MB", growth.peak_mb, growth.peak_mb_fit))
        for plot, (label, values, (start, slope)) in zip(grid[:, column], shown, strict=True):
            plot.plot(growth.at, [start + slope * place**growth.power for place in growth.at], color="0.7")
            plot.plot(growth.at, values, "o", color="tab:blue")
            plot.set_ylim(bottom=0)
            plot.set_xlabel(growth.axis)
            plot.set_ylabel(label if column == 0 else "")
            plot.set_xticks(growth.at, labels=_labels_apart(growth.at))
    figure.suptitle("A training step: measured, and the line fitted")
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def _labels_apart(places: Sequence[int]) -> list[str]:
    """The number of each place, or nothing where it would run into the one before it."""
    labels: list[str] = []
    last = float("-inf")
    for place in places:
        is_apart = place - last >= (places[-1] - places[0]) / 12
        labels.append(str(place) if is_apart else "")
        last = place if is_apart else last
    return labels
