"""What a grid of runs found -> a page that needs no network, and tables as Markdown.

Says no more than the comparison's verdicts do. Knows no run folder and trains nothing.
"""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mvwan import pictures, report_page
from mvwan.ablation import figures
from mvwan.ablation.rates import Choice
from mvwan.ablation.statistics import LEVEL, Comparison, Difference
from mvwan.errors import MvwanError
from mvwan.files import read_bytes
from mvwan.markdown import count, escaped, markdown_table
from mvwan.metrics import rate_in_words
from mvwan.report_page import Section

_NONE = "–"
_DIFFERENCE_HEAD = (
    "arm", "verdict", "difference", "95 % interval", "all verdicts together", "95 % bootstrap", "effect size", "pairs better", "p",
    "corrected p", "seeds x episodes", "left out",
)  # fmt: skip
_DESCRIBED_HEAD = ("outcome", "arm", "mean", "difference", "95 % interval", "seeds x episodes")
_CONTROLS_HEAD = ("policy", "successes")
_STARTS_HEAD = ("arm", "checkpoint, and how it fits")
_STYLE = (
    "<style>#short th, #short td:first-child, #differences th, #differences td { white-space: normal; } "
    "#short td:first-child { min-width: 15em; overflow-wrap: anywhere; } #differences th, #differences td { padding: 7px 6px; } "
    "#differences table { font-size: 0.85rem; } #differences td:first-child { overflow-wrap: anywhere; min-width: 12em; } "
    "#differences td:nth-child(2) { min-width: 8.5em; } #failed th, #failed td, #starts th, #starts td { white-space: "
    "normal; text-align: left; }</style>"
)
"""Many columns and long names of arms have no place beside each other otherwise."""
_MEDIA = ((b"\x89PNG", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"RIFF", "image/webp"))


@dataclass(frozen=True, kw_only=True)
class AblationResult:
    """All that a report shows. What is empty leaves its section out."""

    comparison: Comparison
    command: str
    """The line that makes this again."""
    grid: Mapping[str, Any]
    """The settings of the grid, nested as in its file."""
    version: str
    """Of mvwan."""
    curves: Sequence[Mapping[str, Any]] = ()
    """Rows of `arm`, `learning_rate`, `seed`, `step`, and `heat_loss`, `rgb_loss` or None: losses while training."""
    movement: Sequence[Mapping[str, Any]] = ()
    """Rows of `arm`, `group`, `block` (None: outside of all blocks) and `relative_movement`, at the arm's best rate."""
    failed: Sequence[tuple[str, str]] = ()
    """(run, reason) of runs that did not finish."""
    pictures: Sequence[tuple[str, bytes | str | Path]] = ()
    """(title, content or file) of samples to look at: PNG, JPEG, WebP, or MP4."""
    controls: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Policy -> its `metrics.success_rate` in closed loop, of policies that do not depend on training."""
    starts: Mapping[str, str] = field(default_factory=dict[str, str])
    """Arm -> the checkpoint that it starts from and how that fits, of arms that start from one."""


def report_html(result: AblationResult) -> str:
    """The page. Raises `MvwanError` for a sample that is neither a picture nor a video."""
    compared = result.comparison
    parts = (
        ("short", "In short", _short(result)),
        ("differences", "Differences", _differences(compared)),
        ("parts", "By sigma and by frame", _parts(compared)),
        ("rates", "Learning rates", _rates(compared)),
        ("curves", "Learning curves", _curves(result)),
        ("costs", "Costs", _costs(compared)),
        ("controls", "Controls of the closed loop", _controls(result.controls)),
        ("movement", "What moved", _movement(result.movement)),
        ("samples", "Samples, side by side", _samples(result.pictures)),
        ("failed", "Runs that did not finish", _failed(result.failed)),
        ("starts", "What the arms start from", _starts(result.starts)),
        ("settings", "Settings", _settings(result)),
    )
    lead = (
        f"{count(len(compared.arms), 'arm')}, {count(compared.num_seeds, 'seed')}. Runs of one seed see the same data in the same order "
        "with the same noise, as far as arms do not vary that themselves. Each arm's learning rate was chosen on validation episodes; "
        "arms are compared on test episodes."
    )
    sections = [Section(name, title, body) for name, title, body in parts if body]
    return report_page.page("mvwan ablation", "Does it help? Arms compared", lead, sections, result.version)


def table_markdown(result: AblationResult) -> str:
    """The same in tables: verdicts, all numbers behind them, learning rates, and what else was measured."""
    compared = result.comparison
    lines = [*verdict_sentences(compared), *warnings(result)]
    parts = ["## Arms compared", "\n".join(f"- {escaped(line)}" for line in lines), _markdown(*_main_table(compared, _mean_and_difference))]
    behind = f"Behind a mean: difference from {compared.reference}, its 95 % interval and the verdict."
    parts.append(escaped(f"{behind} {_how_decided(compared)}"))
    for name in compared.primary if compared.others else ():
        parts += [f"### {escaped(compared.label(name))}", _markdown(_DIFFERENCE_HEAD, _difference_rows(compared, name))]
    if notes := _notes(compared):
        parts.append("\n".join(f"- {escaped(note)}" for note in notes))
    parts += ["### Learning rates, on validation data", _markdown(*_rates_table(compared))]
    if described := _described_rows(compared):
        parts += ["### Described only", _markdown(_DESCRIBED_HEAD, described)]
    if compared.of_runs:
        parts += ["### Costs", _markdown(*_costs_table(compared))]
    if result.controls:
        parts += ["### Controls of the closed loop", _markdown(_CONTROLS_HEAD, _control_rows(result.controls))]
    if result.starts:
        parts += ["### What the arms start from", _markdown(_STARTS_HEAD, list(result.starts.items()))]
    if result.failed:
        parts += ["### Runs that did not finish", _markdown(("run", "why"), result.failed)]
    return "\n\n".join(parts) + f"\n\nmvwan {result.version}: `{result.command}`\n"


# ── sentences ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def verdict_sentences(compared: Comparison) -> list[str]:
    """One for each arm beside the reference: in what it is better, in what worse, and where nothing is shown."""
    return [_verdicts_of(compared, arm) for arm in compared.others]


def _verdicts_of(compared: Comparison, arm: str) -> str:
    found = [difference for name in compared.primary if (difference := compared.difference(arm, name))]
    told = [
        f"{verdict} in {'; '.join(_clear_difference(compared, one) for one in found if one.verdict == verdict)}"
        for verdict in ("better", "worse")
        if any(one.verdict == verdict for one in found)
    ]
    by_seeds: dict[int, list[str]] = {}
    for one in found:
        if one.verdict == "no difference shown":
            by_seeds.setdefault(one.num_seeds, []).append(_label(compared, one.outcome))
    told += [f"no difference shown at n = {seeds} in {', '.join(labels)}" for seeds, labels in by_seeds.items()]
    if lacking := [_label(compared, one.outcome) for one in found if one.verdict == "not measured"]:
        told.append(f"not measured in {', '.join(lacking)}")
    return f"{arm} against {compared.reference}: {'; '.join(told)}."


def _clear_difference(compared: Comparison, one: Difference) -> str:
    unit, p = compared.outcomes[one.outcome].unit, _p(one.p_corrected)
    mean, low, high = _alike((one.mean, one.low, one.high))
    told = f"{mean} {unit}".rstrip()
    return (
        f"{_label(compared, one.outcome)} ({told}{_share(compared, one, ', {}')}, 95 % interval {low} to {high}, corrected p "
        f"{p if p.startswith('<') else f'= {p}'}, n = {one.num_seeds})"
    )


def warnings(result: AblationResult) -> list[str]:
    """Sentences on what to doubt: learning rates, runs that failed, few seeds."""
    compared = result.comparison
    found = [warning for choice in compared.choices for warning in choice.warnings]
    if result.failed:
        found.append(f"{count(len(result.failed), 'run')} did not finish; the reasons are at the end.")
    if compared.num_seeds < 5:
        found.append(f"{count(compared.num_seeds, 'seed')}: so few show large differences only. No difference shown is no proof of none.")
    return found


def _how_decided(compared: Comparison) -> str:
    total = compared.num_verdicts
    return (
        f"Better or worse is said where p, corrected by Holm for {count(total, 'verdict')}, is at most {1 - LEVEL:.2g} and the bootstrap "
        "interval leaves out zero. p and 95 % intervals are those of Student's t over seeds and over episodes together, which hold at few "
        "seeds; the wider ones hold for all verdicts together. Bootstrap intervals draw seeds and episodes and are too short at few. The "
        "effect size is the mean difference in standard deviations over seeds, corrected for few of them; pairs are of one seed and one "
        "episode."
    )


def _notes(compared: Comparison) -> list[str]:
    """What is to be known of single verdicts; what holds of several is said once."""
    places: dict[str, list[str]] = {}
    for one in (one for one in compared.differences if one.verdict):
        for note in one.notes:
            places.setdefault(note, []).append(f"{one.arm} in {_label(compared, one.outcome)}")
    return [f"{note.removesuffix('.')}: {_some(where)}." for note, where in places.items()]


def _some(places: Sequence[str]) -> str:
    return ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")


# ── tables: a head, and rows of texts ─────────────────────────────────────────────────────────────────────────────────────────────

_Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def _main_table(compared: Comparison, cell: Callable[[Comparison, str, str], str]) -> _Table:
    head = ["arm", "learning rate", "n", *(compared.label(name) for name in compared.primary)]
    rows = []
    for choice in compared.choices:
        best = _NONE if choice.best is None else f"{choice.best:g}"
        seeds = {mean.num_seeds for name in compared.primary if (mean := compared.mean(choice.arm, name))}
        rows.append([choice.arm, best, " to ".join(map(str, sorted({min(seeds), max(seeds)}))) if seeds else "0"])
        rows[-1] += [cell(compared, choice.arm, name) for name in compared.primary]
    return head, rows


def _mean_and_difference(compared: Comparison, arm: str, name: str) -> str:
    mean, one = compared.mean(arm, name), compared.difference(arm, name)
    told = _NONE if mean is None else _number(mean.mean)
    if one is None or one.mean is None:
        return told if one is None else f"{told} ({one.verdict or 'not measured'})"
    difference, low, high = _alike((one.mean, one.low, one.high))
    verdict = f": {one.verdict}" if one.verdict else ""
    interval = "" if one.low is None else f", {low} to {high}"
    return f"{told} ({difference}{interval}{verdict})"


def _mean_and_verdict(compared: Comparison, arm: str, name: str) -> str:
    mean, one = compared.mean(arm, name), compared.difference(arm, name)
    told = _NONE if mean is None else _number(mean.mean)
    return f"{told}, {one.verdict}" if one and one.verdict in ("better", "worse") else told


def _difference_rows(compared: Comparison, name: str) -> list[list[str]]:
    rows = []
    for one in (found for arm in compared.others if (found := compared.difference(arm, name))):
        bounds = (one.low, one.high, one.together_low, one.together_high, one.bootstrap_low, one.bootstrap_high)
        mean, *told = _alike((one.mean, *bounds))
        rows.append(
            [
                one.arm,
                f"{one.verdict} at n = {one.num_seeds}" if one.verdict == "no difference shown" else one.verdict or _NONE,
                mean + _share(compared, one, " ({})"),
                *(f"{low} to {high}" if low != _NONE else _NONE for low, high in zip(told[::2], told[1::2], strict=True)),
                _NONE if one.effect_size is None else f"{one.effect_size:+.2f}",
                _NONE if one.share_better is None else f"{100 * one.share_better:.0f} %",
                _p(one.p),
                _p(one.p_corrected),
                f"{one.num_seeds} x {one.num_episodes}",
                str(one.num_dropped),
            ]
        )
    return rows


def _described_rows(compared: Comparison) -> list[list[str]]:
    """Of outcomes of episodes that get no verdict: a row for each arm."""
    names = [name for name, outcome in compared.outcomes.items() if not outcome.primary and name not in compared.of_runs]
    rows = []
    for name in names:
        for arm in compared.arms:
            mean, one = compared.mean(arm, name), compared.difference(arm, name)
            if mean is None:
                continue
            told = _alike((one.mean, one.low, one.high)) if one else [_NONE] * 3
            interval = f"{told[1]} to {told[2]}" if told[1] != _NONE else _NONE
            rows.append([compared.label(name), arm, _number(mean.mean), told[0], interval, f"{mean.num_seeds} x {mean.num_episodes}"])
    return rows


def _rates_table(compared: Comparison) -> _Table:
    swept = sorted({one.learning_rate for choice in compared.choices for one in choice.swept})
    label = compared.label(compared.select_by)
    rows = [[choice.arm, *(_swept(compared, choice, rate) for rate in swept)] for choice in compared.choices]
    return [f"arm ({label})", *(f"{rate:g}" for rate in swept)], rows


def _swept(compared: Comparison, choice: Choice, rate: float) -> str:
    one = next((one for one in choice.swept if one.learning_rate == rate), None)
    if one is None or one.mean is None:
        return _NONE
    few = "" if one.every_seed else f" ({one.num_seeds} of {compared.num_seeds} seeds)"
    return f"{_number(one.mean)}{few}{' (chosen)' if rate == choice.best else ''}"


def _costs_table(compared: Comparison) -> _Table:
    rows = [[arm, *(_cost(compared, arm, name) for name in compared.of_runs)] for arm in compared.arms]
    return ["arm", *map(compared.label, compared.of_runs)], rows


def _cost(compared: Comparison, arm: str, name: str) -> str:
    mean, one = compared.mean(arm, name), compared.difference(arm, name)
    if mean is None:
        return _NONE
    return _number(mean.mean) + (_share(compared, one, " ({})") if one else "")


# ── sections of the page ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _short(result: AblationResult) -> str:
    compared = result.comparison
    doubts = "".join(f"<li>{html.escape(warning)}</li>" for warning in warnings(result))
    sentences = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in verdict_sentences(compared))
    note = f'<div class="note"><ul>{sentences}</ul></div>' if sentences else ""
    found = report_page.table(*_main_table(compared, _mean_and_verdict))
    return _STYLE + note + found + (f'<ul class="soft">{doubts}</ul>' if doubts else "")


def _differences(compared: Comparison) -> str:
    if not compared.others or not compared.primary:
        return ""
    body = f"<p>{html.escape(f'Differences are those from {compared.reference}. {_how_decided(compared)}')}</p>"
    height = figures.forest_height_px(compared)
    for name in compared.primary:
        body += f"<h3>{html.escape(compared.label(name))}</h3>"
        if any(one.mean is not None for one in compared.differences if one.outcome == name):
            body += report_page.plot(figures.forest(compared, name), height)
        rows = [row[:-1] for row in _difference_rows(compared, name)]  # what was left out stands below
        body += report_page.table(_DIFFERENCE_HEAD[:-1], rows)
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in _notes(compared))
    return body + (f'<ul class="soft">{notes}</ul>' if notes else "")


def _parts(compared: Comparison) -> str:
    plots = [
        report_page.plot(figure)
        for base, names in figures.banded(compared).items()
        for figure in figures.by_band(compared, base, names)
        if figure["data"]
    ]
    rows = _described_rows(compared)
    numbers = f"<details><summary>All numbers</summary>{report_page.table(_DESCRIBED_HEAD, rows)}</details>" if rows else ""
    if not plots and not numbers:
        return ""
    intro = (
        f"<p>Described only: these get no verdict, and their 95 % intervals are not corrected for being many. Differences are those from "
        f"{html.escape(compared.reference)}.</p>"
    )
    return f'{intro}<div class="figures">{"".join(plots)}</div>{numbers}'


def _rates(compared: Comparison) -> str:
    if all(one.mean is None for choice in compared.choices for one in choice.swept):
        return ""
    intro = "<p>Rings mark the rate at which an arm is compared: the best on validation data at which every seed finished.</p>"
    return intro + report_page.plot(figures.rates(compared)) + report_page.table(*_rates_table(compared))


def _curves(result: AblationResult) -> str:
    plots = [
        report_page.plot(figure)
        for column, title in (("heat_loss", "Loss of heatmaps"), ("rgb_loss", "Loss of RGB"))
        if (figure := figures.learning_curves(result.comparison, result.curves, column, title))
    ]
    intro = "<p>Each arm at its chosen learning rate: every seed faint, their mean strong.</p>"
    return f'{intro}<div class="figures">{"".join(plots)}</div>' if plots else ""


def _costs(compared: Comparison) -> str:
    return report_page.table(*_costs_table(compared)) if compared.of_runs else ""


def _controls(controls: Mapping[str, Mapping[str, Any]]) -> str:
    intro = "<p>What success is worth: how often policies succeed that do not depend on training, with 95 % intervals.</p>"
    return intro + report_page.table(_CONTROLS_HEAD, _control_rows(controls)) if controls else ""


def _control_rows(controls: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    return [[policy.replace("_", " "), rate_in_words(rate)] for policy, rate in controls.items()]


def _movement(rows: Sequence[Mapping[str, Any]]) -> str:
    plots = "".join(f"<div><h3>{html.escape(arm)}</h3>{report_page.plot(figure)}</div>" for arm, figure in figures.movement(rows).items())
    intro = (
        "<p>Norm of the change over the norm at the start, for each group in each block, at the arm's chosen learning rate. What is "
        "outside of all blocks stands at the right.</p>"
    )
    return f'{intro}<div class="figures">{plots}</div>' if plots else ""


def _samples(samples: Sequence[tuple[str, bytes | str | Path]]) -> str:
    captioned = []
    for title, content in samples:
        data = content if isinstance(content, bytes) else read_bytes(Path(content))
        uri = pictures.data_uri(data, _media_type(title, data))
        name = html.escape(title)
        if uri.startswith("data:video"):
            shown = f'<video controls loop muted playsinline src="{uri}"></video>'
        else:
            shown = f'<img src="{uri}" alt="{name}" style="max-width:100%;height:auto;border-radius:5px">'
        captioned.append(f"<figure>{shown}<figcaption>{name}</figcaption></figure>")
    return f'<div class="figures">{"".join(captioned)}</div>' if captioned else ""


def _media_type(title: str, data: bytes) -> str:
    if data[4:8] == b"ftyp":
        return "video/mp4"
    for start, media_type in _MEDIA:
        if data.startswith(start):
            return media_type
    raise MvwanError(f"sample {title!r}: neither PNG, JPEG, WebP nor MP4; give one of these")


def _failed(failed: Sequence[tuple[str, str]]) -> str:
    return report_page.table(("run", "why"), failed) if failed else ""


def _starts(starts: Mapping[str, str]) -> str:
    return report_page.table(_STARTS_HEAD, list(starts.items())) if starts else ""


def _settings(result: AblationResult) -> str:
    import yaml

    grid = yaml.safe_dump(dict(result.grid), sort_keys=False, allow_unicode=True)
    compared = result.comparison
    drawn = f"<p>{compared.bootstrap_samples:,} bootstrap draws, seed {compared.seed}.</p>"
    return f"<pre>{html.escape(result.command)}</pre><h3>The grid</h3><pre>{html.escape(grid)}</pre>{drawn}"


# ── words and numbers ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown_table([*map(escaped, head)], ([*map(escaped, line)] for line in rows))


def _label(compared: Comparison, name: str) -> str:
    return compared.outcomes[name].label or name


def _number(value: float) -> str:
    """Four digits that count, and every digit before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _alike(values: Sequence[float | None]) -> list[str]:
    """Signed numbers with as many places behind the point as the largest of the first three needs for three digits."""
    largest = max((abs(value) for value in values[:3] if value), default=1.0)
    places = min(8, max(0, 2 - math.floor(math.log10(largest))))
    return [_NONE if value is None else f"{value:+,.{places}f}" for value in values]


def _share(compared: Comparison, one: Difference, pattern: str) -> str:
    """The difference as a share of the reference's mean; nothing where that says nothing, as of decibels or of rates of success."""
    if compared.outcomes[one.outcome].better == "higher" or not one.reference_mean or one.mean is None:
        return ""
    return pattern.format(f"{100 * one.mean / abs(one.reference_mean):+.1f} %")


def _p(value: float | None) -> str:
    return _NONE if value is None else "< 0.0001" if value < 0.0001 else f"{value:.2g}"
