"""A comparison of arms -> figures as plain dicts that Plotly draws in the report. Colours are names of the page's CSS variables.

Knows no files and no page. Plotly reads tags in the texts it is given, so names are escaped here.
"""

import html
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from mvwan.ablation.statistics import Comparison
from mvwan.report_figures import Figure, smoothed

PALETTE = ("hold", "on", "off", "truth", "nearest", "codec", "velocity")
"""The reference is grey. With more arms than colours these come again, in other dashes."""
_DASHES = ("solid", "dash", "dot", "dashdot")
_VERDICT_COLOURS = {"better": "on", "worse": "off"}
_INTERVALS = (
    ("all verdicts together", "together_low", "together_high", 2, 0.0),
    ("95 %", "low", "high", 7, 0.0),
    ("95 %, bootstrap", "bootstrap_low", "bootstrap_high", 3, 0.24),
)
_MOST_POINTS = 300
_NO_BLOCK = "none"
_TICK_CHARACTERS = 24


def forest(comparison: Comparison, outcome: str) -> Figure:
    """Each arm less the reference: its interval, thin the one that holds for all verdicts together, and below it the bootstrap's."""
    found = [difference for arm in comparison.others if (difference := comparison.difference(arm, outcome))]
    data = []
    for name, low, high, width, below in _INTERVALS:
        x, y = [], []
        for place, difference in enumerate(found):
            x += [getattr(difference, low), getattr(difference, high), None]
            y += [place + below, place + below, None]
        colour = "hold" if below else "truth"
        style = {"color": f"var:{colour}", "width": width}
        data.append({"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": style, "hoverinfo": "skip"})
    colours = [f"var:{_VERDICT_COLOURS.get(difference.verdict or '', 'ink')}" for difference in found]
    data.append(
        {
            "type": "scatter",
            "mode": "markers",
            "name": "mean difference",
            "x": [difference.mean for difference in found],
            "y": list(range(len(found))),
            "marker": {"color": colours, "size": 12, "line": {"color": "var:card", "width": 2}},
            "text": [_escaped(difference.arm) for difference in found],
            "hovertemplate": "%{text}: %{x:.4g}<extra></extra>",
            "showlegend": False,
        }
    )
    ticks = [f"<b>{_wrapped(difference.arm)}</b>" + (f"<br>{difference.verdict}" if difference.verdict else "") for difference in found]
    told = comparison.outcomes[outcome]
    x_title = f"difference{f', {_escaped(told.unit)}' if told.unit else ''}; {told.better} is better"
    y = {"tickvals": list(range(len(found))), "ticktext": ticks, "range": [len(found) - 0.4, -0.6], "showgrid": False, "zeroline": False}
    x = {"range": _around([value for trace in data for value in trace["x"] if value is not None]), "zeroline": False}
    return _figure(data, "", x_title, "", yaxis=y, xaxis=x, shapes=[_zero("x")], margin={"l": 54, "r": 16, "t": 12, "b": 100})


def _around(values: Sequence[float]) -> list[float]:
    """A range that holds zero and the values, with room beside them."""
    low, high = min([*values, 0.0]), max([*values, 0.0])
    room = 0.04 * (high - low) or 1.0
    return [low - room, high + room]


def forest_height_px(comparison: Comparison) -> int:
    """How high a `forest` of this comparison should be drawn."""
    lines = sum(3 + _wrapped(arm).count("<br>") for arm in comparison.others)
    return 140 + 24 * max(lines, 4)


def rates(comparison: Comparison) -> Figure:
    """What each learning rate gave on validation data, an arm per line; rings are the chosen ones."""
    data = []
    for choice in comparison.choices:
        known = [one for one in choice.swept if one.mean is not None]
        line = _line(comparison, choice.arm, [one.learning_rate for one in known], [one.mean for one in known], markers=True)
        line["marker"]["size"] = [16 if one.learning_rate == choice.best else 6 for one in known]
        line["marker"]["symbol"] = ["circle-open" if one.learning_rate == choice.best else "circle" for one in known]
        line["marker"]["line"] = {"color": line["line"]["color"], "width": 3}
        line["text"] = [f"{one.num_seeds} of {comparison.num_seeds} seeds" for one in known]
        line["hovertemplate"] = "rate %{x:.3g}: %{y:.4g}, %{text}<extra>" + line["name"] + "</extra>"
        data.append(line)
    swept = sorted({one.learning_rate for choice in comparison.choices for one in choice.swept})
    axis = {"type": "log", "tickvals": swept, "ticktext": [f"{rate:g}" for rate in swept]}
    label = _escaped(comparison.label(comparison.select_by))
    return _figure(data, "Validation data", "learning rate", label, xaxis=axis)


def learning_curves(comparison: Comparison, rows: Sequence[Mapping[str, Any]], column: str, title: str) -> Figure | None:
    """Each arm at its chosen rate: seeds faint, their mean strong; smoothed where there are many steps. None without such values.

    `rows` have `arm`, `learning_rate`, `seed`, `step` and, in `column`, a value or nothing. The mean is over the seeds that a step has.
    """
    data = []
    for choice in comparison.choices:
        seeds: dict[int, dict[int, float]] = {}
        for row in rows:
            value = row.get(column)
            if row["arm"] == choice.arm and row["learning_rate"] == choice.best and value is not None and math.isfinite(value):
                seeds.setdefault(row["seed"], {})[row["step"]] = value
        runs = [_thinned(values) for _, values in sorted(seeds.items())]
        for points in runs:
            faint = _line(comparison, choice.arm, [x for x, _ in points], [y for _, y in points], width=1, opacity=0.3)
            data.append(faint | {"showlegend": False, "hoverinfo": "skip"})
        steps = sorted({step for points in runs for step, _ in points})
        at_step = [[value for points in runs for place, value in points if place == step] for step in steps]
        if steps:
            data.append(_line(comparison, choice.arm, steps, [math.fsum(values) / len(values) for values in at_step], width=3))
    return _figure(data, title, "step", "mean squared error", yaxis={"type": "log"}) if data else None


def _thinned(values: Mapping[int, float]) -> list[tuple[float, float]]:
    """The points in order; many of them smoothed over a twentieth and not all kept, the last always."""
    points = sorted(values.items())
    if len(points) < 60:
        return [*points]
    smooth = [(step, value) for step, value in smoothed(points, len(points) // 20) if value is not None]
    return smooth[:: -max(1, len(points) // _MOST_POINTS)][::-1]


def banded(comparison: Comparison) -> dict[str, list[str]]:
    """The outcomes that are measured in parts, `heat_loss@0.8-1.0`: base name -> their names, from the lowest part to the highest."""
    found: dict[str, list[str]] = {}
    measured = {mean.outcome for mean in comparison.means}
    for name in comparison.outcomes:
        if "@" in name and name in measured:
            found.setdefault(name.partition("@")[0], []).append(name)
    return {base: sorted(names, key=_lower_end) for base, names in found.items()}


def by_band(comparison: Comparison, base: str, names: Sequence[str]) -> tuple[Figure, Figure]:
    """(means of every arm, differences from the reference with 95 % intervals) of the parts of an outcome."""
    parts = [name.partition("@")[2] for name in names]
    bands = all("." in part for part in parts)
    x_title = "sigma (0 is data, 1 is noise)" if bands else "frames"
    told = comparison.outcomes[base] if base in comparison.outcomes else comparison.outcomes[names[0]]
    label = _escaped((told.label or base).partition("@")[0])
    unit = f"{label}, {_escaped(told.unit)}" if told.unit else label
    means = [
        _line(comparison, arm, parts, [mean.mean if (mean := comparison.mean(arm, name)) else None for name in names], markers=True)
        for arm in comparison.arms
    ]
    differences = []
    for place, arm in enumerate(comparison.others):
        found = [one if (one := comparison.difference(arm, name)) and one.mean is not None else None for name in names]
        # Side by side around each band's place, so that intervals do not hide each other.
        shift = 0.5 * ((place + 0.5) / len(comparison.others) - 0.5)
        line = _line(comparison, arm, [index + shift for index in range(len(parts))], [one and one.mean for one in found], markers=True)
        up = [one.high - one.mean if one and one.high is not None and one.mean is not None else None for one in found]
        down = [one.mean - one.low if one and one.low is not None and one.mean is not None else None for one in found]
        line |= {"mode": "markers", "error_y": {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "width": 3}}
        line["error_y"]["color"] = line["line"]["color"]
        differences.append(line)
    ticks = {"tickvals": list(range(len(parts))), "ticktext": parts, "showgrid": False, "zeroline": False}
    return (
        _figure(means, label, x_title, unit, xaxis={"type": "category"}, yaxis={"rangemode": "tozero"}),
        _figure(differences, f"{label}: difference", x_title, unit, xaxis=ticks, shapes=[_zero("y")]),
    )


def movement(rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """Arm -> how far each group went in each block, on one colour scale for all arms; several rows of one place are averaged.

    `rows` have `arm`, `group`, `block` (None: outside of all blocks) and `relative_movement`. What did not move, or has no such number,
    is left blank.
    """
    cells: dict[str, dict[tuple[str, str], list[float]]] = {}
    for row in rows:
        value = row["relative_movement"]
        if value is not None and math.isfinite(value) and value > 0:
            block = _NO_BLOCK if row["block"] is None else str(row["block"])
            cells.setdefault(row["arm"], {}).setdefault((row["group"], block), []).append(value)
    logs = [math.log10(math.fsum(values) / len(values)) for of_arm in cells.values() for values in of_arm.values()]
    groups = list(dict.fromkeys(group for of_arm in cells.values() for group, _ in of_arm))
    blocks = sorted({block for of_arm in cells.values() for _, block in of_arm}, key=lambda block: (block == _NO_BLOCK, _lower_end(block)))
    ticks = list(range(math.floor(min(logs, default=0)), math.ceil(max(logs, default=0)) + 1))
    figures = {}
    for arm, of_arm in cells.items():
        means = [[_mean(of_arm.get((group, block))) for block in blocks] for group in groups]
        heatmap = {
            "type": "heatmap",
            "x": blocks,
            "y": [_escaped(group) for group in groups],
            "z": [[None if mean is None else math.log10(mean) for mean in of_group] for of_group in means],
            "text": [["" if mean is None else f"{mean:.2e}" for mean in of_group] for of_group in means],
            "hovertemplate": "%{y}, block %{x}: %{text}<extra></extra>",
            "zmin": min(logs),
            "zmax": max(logs) if max(logs) > min(logs) else min(logs) + 1,
            "colorscale": [[0, "var:wash"], [0.5, "var:truth"], [1, "var:ink"]],
            "colorbar": {"thickness": 12, "tickvals": ticks, "ticktext": [f"10<sup>{tick}</sup>" for tick in ticks]},
            "xgap": 2,
            "ygap": 2,
            "showlegend": False,
        }
        axes = {"xaxis": {"type": "category", "showgrid": False}, "yaxis": {"autorange": "reversed", "showgrid": False}}
        figures[arm] = _figure([heatmap], "", "block", "", margin={"l": 54, "r": 12, "t": 8, "b": 60}, **axes)
    return figures


def _mean(values: Sequence[float] | None) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _lower_end(name: str) -> tuple[float, str]:
    """Sorts `loss@0.8-1.0`, `5-8` and `10` by their first number."""
    number = re.match(r"\d+(\.\d+)?", name.rpartition("@")[2])
    return (float(number[0]) if number else math.inf, name)


def _line(comparison: Comparison, arm: str, x: Sequence[Any], y: Sequence[Any], **style: Any) -> dict[str, Any]:
    """A line in the colour of `arm`; `style` may hold `width`, `opacity`, `markers`."""
    order = [comparison.reference, *comparison.others].index(arm)
    dash = _DASHES[order // len(PALETTE) % len(_DASHES)]
    colour = f"var:{PALETTE[order % len(PALETTE)]}"
    return {
        "type": "scatter",
        "mode": "lines+markers" if style.get("markers") else "lines",
        "name": _escaped(arm),
        "x": list(x),
        "y": list(y),
        "line": {"color": colour, "width": style.get("width", 2), "dash": dash},
        "marker": {"color": colour, "size": 7},
        "opacity": style.get("opacity", 1),
        "hovertemplate": "%{y:.4g}<extra>" + _escaped(arm) + "</extra>",
    }


def _zero(axis: str) -> dict[str, Any]:
    """A line where the difference is zero, across the whole plot."""
    other = "y" if axis == "x" else "x"
    across = {f"{axis}0": 0, f"{axis}1": 0, f"{axis}ref": axis, f"{other}0": 0, f"{other}1": 1, f"{other}ref": "paper"}
    return {"type": "line", "layer": "below", "line": {"color": "var:soft", "width": 1.5, "dash": "dot"}, **across}


def _figure(data: list[Any], title: str, x: str, y: str, **layout: Any) -> Figure:
    axes = {"xaxis": {"title": {"text": x}, **layout.pop("xaxis", {})}, "yaxis": {"title": {"text": y}, **layout.pop("yaxis", {})}}
    head = {"text": title, "x": 0, "xanchor": "left", "y": 0.98, "yanchor": "top", "font": {"size": 14}}
    return {"data": data, "layout": {"title": head, **axes, **layout}}


def _escaped(text: str) -> str:
    return html.escape(text, quote=False)


def _wrapped(name: str) -> str:
    """An arm's name with each factor on a line of its own, or on several where it is long."""
    lines = [line for factor in name.split(",") for line in textwrap.wrap(factor, _TICK_CHARACTERS, break_long_words=False)]
    return "<br>".join(map(_escaped, lines))
