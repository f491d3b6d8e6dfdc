"""How evaluation.json and closed_loop.json are read back, and tables of the first for a terminal. Knows no model, takes no measure.

    measures.<source>.<measure>    mean, count, lost; of errors also median and p95; per_frame: the mean of each frame, null if given
    ... .per_view[]                the same for each of `views`; empty for the 3-D error, which all views have in common
    windows[]                      one row per held-out window

Sources: `predicted` is the run, `codec` the truth encoded and then decoded or read as predictions are, the others need no training.
`rgb_*` measures are of the RGB stream, all others of the heat stream; `found` is PCK at a share of the picture's height,
`within_4_px` PCK at 4 px.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from mvwan.errors import MvwanError
from mvwan.files import read_json
from mvwan.markdown import count

FORMAT_VERSION = 3
CLOSED_LOOP_FORMAT = 4
"""Raised as well whenever the same trial may end otherwise: lines of older trials are then not taken for new ones."""
SOURCES = ("predicted", "hold_first", "constant_velocity", "nearest", "codec")
PCK_PX = (2, 4, 8)
"""Distances in px within which peaks are counted as well."""

_ROWS = (
    ("peak_error_px", "mean", "heatmap peak error, px", 2),
    ("peak_error_px", "median", "… median", 2),
    ("peak_error_px", "p95", "… 95th percentile", 2),
    ("found", "mean", "peaks found, share", 3),
    *((f"within_{px}_px", "mean", f"… within {px} px", 3) for px in PCK_PX),
    ("lost", "mean", "heatmaps without a peak, share", 3),
    ("error_3d_mm", "mean", "3-D error, mm", 1),
    ("error_3d_mm", "median", "… median", 1),
    ("error_3d_mm", "p95", "… 95th percentile", 1),
    ("rgb_psnr_db", "mean", "RGB PSNR, dB", 2),
    ("rgb_ssim", "mean", "RGB SSIM", 3),
    ("view_disagreement_px", "mean", "views disagree by, px", 2),
    ("view_disagreement_px", "median", "… median", 2),
    ("view_disagreement_px", "p95", "… 95th percentile", 2),
)
_VIEW_COLUMNS = (
    ("peak_error_px", "mean", "peak, px", 2),
    ("peak_error_px", "median", "median", 2),
    ("peak_error_px", "p95", "p95", 2),
    ("found", "mean", "found", 3),
    ("lost", "mean", "lost", 3),
    ("view_disagreement_px", "mean", "disagree, px", 2),
    ("rgb_psnr_db", "mean", "PSNR, dB", 2),
    ("rgb_ssim", "mean", "SSIM", 3),
)
_FRAME_ROWS = (("peak_error_px", "peak, px", 2), ("error_3d_mm", "3-D, mm", 1), ("rgb_psnr_db", "PSNR, dB", 2))
_FRAMES_SHOWN = 6


def read_evaluation(path: str | Path) -> dict[str, Any]:
    """The numbers in an evaluation.json. Raises `MvwanError` when another version of the package wrote them."""
    return _read(path, FORMAT_VERSION, "mvwan evaluate")


def read_closed_loop(path: str | Path) -> dict[str, Any]:
    """The numbers in a closed_loop.json. Raises `MvwanError` when another version of the package wrote them."""
    return _read(path, CLOSED_LOOP_FORMAT, "mvwan evaluate --trials")


def _read(path: str | Path, wanted: int, command: str) -> dict[str, Any]:
    found = read_json(path)
    version = found.get("format_version") if isinstance(found, dict) else None
    if version != wanted:
        raise MvwanError(f"{path}: format {version}, this version reads {wanted}. Run `{command}` again.")
    return found


def measure_rows(measures: Mapping[str, Any]) -> list[tuple[str, dict[str, float | None], int]]:
    """(label, source -> number, digits) per measure, in the order in which people read them; sources without it are left out."""
    rows = []
    for name, statistic, label, digits in _ROWS:
        values = {source: measures[source][name][statistic] for source in SOURCES if name in measures.get(source, {})}
        rows.append((label, values, digits))
    return rows


def render(result: Mapping[str, Any]) -> Group:
    """Rich tables of an evaluation, for `Console.print`: all measures, then the run by view, then everyone by frames ahead."""
    return Group(_overall(result), _by_view(result), _by_frame(result), *_remarks(result))


def _overall(result: Mapping[str, Any]) -> Table:
    held_out, episodes = count(result["num_windows"], "held-out window"), count(len(result["episodes"]), "episode")
    title = f"{held_out} of {episodes}, {count(result['denoise_steps'], 'denoising step')}"
    sources = [source for source in SOURCES if source in result["measures"]]
    table = _table(title, ["measure"], [source.replace("_", " ") for source in sources])
    for label, values, digits in measure_rows(result["measures"]):
        table.add_row(label, *(_cell(values.get(source), digits) for source in sources))
    return table


def _by_view(result: Mapping[str, Any]) -> Table:
    measures = result["measures"]["predicted"]
    table = _table("What the run predicts, by view", ["view"], [label for _, _, label, _ in _VIEW_COLUMNS])
    for place, view in enumerate(result["views"]):
        table.add_row(view, *(_cell(measures[name]["per_view"][place][which], digits) for name, which, _, digits in _VIEW_COLUMNS))
    return table


def _by_frame(result: Mapping[str, Any]) -> Table:
    first, last = result["given_frames"], result["num_frames"] - 1
    shown = sorted({first + round(place * (last - first) / (_FRAMES_SHOWN - 1)) for place in range(_FRAMES_SHOWN)})
    table = _table("Mean by frames ahead of the last given one", ["measure", "source"], [str(frame - first + 1) for frame in shown])
    for name, label, digits in _FRAME_ROWS:
        for source in SOURCES:
            if name in result["measures"].get(source, {}):
                means = result["measures"][source][name]["per_frame"]
                table.add_row(label, source.replace("_", " "), *(_cell(means[frame], digits) for frame in shown))
        table.add_section()
    return table


def _remarks(result: Mapping[str, Any]) -> list[str]:
    """What the columns do not tell of themselves."""
    remarks = []
    if damaged := result.get("damaged_windows"):  # which results of earlier versions do not tell
        remarks.append(f"{damaged} windows are damaged and left out.")
    if result["given_frames"] == 1 and "constant_velocity" in result["measures"]:
        remarks.append("constant velocity: its speed is that over the frame before the window, which the run does not see.")
    if (found := result["nearest_windows"]) < result["num_windows"]:
        remarks.append(
            f"nearest: a training demonstration of the same instruction is at hand for {found} of {result['num_windows']} windows."
        )
    return remarks


def _table(title: str, names: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _cell(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
