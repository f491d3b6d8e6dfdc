"""A sensitivity analysis for people: a table for the terminal and as Markdown, and a page with bars and maps of blocks.

Takes what `sensitivity.json` holds. Knows no model and measures nothing.
"""

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from mvwan import __version__, report_page
from mvwan.files import write_file
from mvwan.markdown import markdown_table
from mvwan.report_page import Section

_Result = Mapping[str, Any]
_DASH = "–"
_HEADS = ("group", "parameters", "live", "Fisher per live", "decrease", "95 %", "per million", "rate", "at equal count")
_SET_HEADS = ("trained together", "parameters", "decrease", "95 %", "rate")
_BLOCKS = {"title": {"text": "block"}, "type": "category", "showgrid": False}
_NARROW = "<style>#groups td, #groups th { padding: 7px 6px; font-size: 0.85rem; }</style>"
"""Nine columns have no place beside each other otherwise."""
_BLUE, _GREY = "#2a6f97", "#a9b4bd"
_SCALE = [[0, "#f4f7f9"], [0.5, "#7fb3d0"], [1, "#14405c"]]
_DIVERGING = [[0, "#b5523b"], [0.5, "#f7f7f5"], [1, "#14405c"]]


def rendered(result: _Result) -> Group:
    """For `Console.print`."""
    return Group(
        _rich("Groups by decrease of the held-out loss per parameter", _HEADS, _cells(result)),
        _rich("Trained together, at the same steps", _SET_HEADS, _set_cells(result)),
        Text("\n".join(sentences(result))),
    )


def _rich(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for place, head in enumerate(heads):
        table.add_column(head, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def markdown(result: _Result) -> str:
    """The same as Markdown."""
    lines = [markdown_table(_HEADS, _cells(result)), "", markdown_table(_SET_HEADS, _set_cells(result)), ""]
    return "\n".join([*lines, *(f"- {sentence}" for sentence in sentences(result))]) + "\n"


def _cells(result: _Result) -> list[list[str]]:
    rows = []
    for one in result["candidates"]:
        equal = one.get("equal_count")
        rows.append(
            [
                one["name"] + (" *" if one["needs"] else ""),
                f"{one['parameters']:,}",
                f"{one['live_parameters']:,}",
                f"{one['fisher_per_parameter']:.2e}" if one["live_parameters"] else _DASH,
                _number(one["decrease"]),
                _interval(one["interval"]),
                _number(one["decrease_per_million"]),
                _rate(one["learning_rate"]),
                _DASH if equal is None else f"{_number(equal['decrease'])} ({equal['parameters']:,})",
            ]
        )
    return rows


def _set_cells(result: _Result) -> list[list[str]]:
    return [
        [one["name"], f"{one['parameters']:,}", _number(one["decrease"]), _interval(one["interval"]), _rate(one["learning_rate"])]
        for one in result["sets"]
    ]


def sentences(result: _Result) -> list[str]:
    """What was measured, what is suggested, and what neither says."""
    suggestion, budget = result["suggestion"], result["budget"]
    rates = ", ".join(f"{rate:g}" for rate in result["learning_rates"])
    measured = (
        f"Held-out loss at the start {result['held_out_loss_at_start']:.4f}, over {result['held_out_windows']} windows; probes of "
        f"{result['probe_steps']} steps of {result['windows_per_step']} windows, each with the best of the learning rates {rates}; "
        f"gradients of {result['gradients']} single windows. One training seed; intervals are over held-out windows, and the rate is the "
        "best on these."
    )
    said = [measured]
    if any(one["needs"] for one in result["candidates"]):
        said.append("*: behind a projector that is zero, so no gradient reaches it alone; what it adds to the projector, both trained.")
    if result["lower_rank"]:
        said.append(f"At equal count: adapters of rank {result['lower_rank']}, nearest to the count of the switch; in brackets theirs.")
    said += _at_the_edge(result)
    said += [f"{one['name']}: {one['note']}." for one in result["candidates"] if one["note"]]
    said += [f"{one['name']}: cannot be suggested, {one['obstacle']}." for one in result["candidates"] if one["obstacle"]]
    if not suggestion["groups"]:
        return [*said, "No suggestion: no group within the budget decreased the held-out loss."]
    rank = f" with adapters of rank {suggestion['rank']}" if suggestion["rank"] else ""
    said.append(
        f"Suggested for a budget of {budget['parameters']:,} parameters ({budget['given']}): {', '.join(suggestion['groups'])}{rank}; "
        f"{suggestion['parameters']:,} parameters. Whole groups: settings cannot name blocks, which are ranked on the page alone."
    )
    together = next(one["decrease"] for one in result["sets"] if one["name"] == "suggestion")
    said.append(
        f"Its groups interact: alone they decreased the loss by {_number(suggestion['sum_of_decreases'])} in sum, together by "
        f"{_number(together)}."
    )
    for one in result["comparisons"]:
        sign = 1 if one["lower_by"] >= 0 else -1
        ends = sorted(sign * end for end in one["interval"])
        said.append(
            f"Beside the {one['beside']}, the suggestion's held-out loss is {'lower' if sign > 0 else 'higher'} by "
            f"{_number(sign * one['lower_by'])} ({_interval(ends)}): {one['verdict']} after {result['probe_steps']} steps."
        )
    return said


def _at_the_edge(result: _Result) -> list[str]:
    """A warning about those whose best rate is the lowest or highest tried: a verdict on them may be one on the rates."""
    rates = result["learning_rates"]
    measured = [one for one in (*result["candidates"], *result["sets"]) if one["learning_rate"] is not None]
    if len(rates) == 1:
        return [f"One learning rate was tried, {rates[0]:g}: what is worse here may only need another. Give several."]
    said = []
    for rate, word, remedy in ((rates[0], "lowest", "lower"), (rates[-1], "highest", "higher")):
        if names := [one["name"] for one in measured if one["learning_rate"] == rate]:
            said.append(f"Best at the {word} rate tried, {rate:g}, and perhaps better at a {remedy} one: {', '.join(names)}.")
    return said


def _number(value: float | None) -> str:
    """Three digits that count."""
    return _DASH if value is None else f"{value:.3g}"


def _interval(ends: Sequence[float] | None) -> str:
    return _DASH if ends is None else f"{_number(ends[0])} to {_number(ends[1])}"


def _rate(value: float | None) -> str:
    return _DASH if value is None else f"{value:g}"


# ── the page ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_page(result: _Result, path: Path) -> None:
    """Nothing; `path` is a page with the tables and plots, which needs no network."""
    said = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences(result))
    bars, maps = figures(result)[:2], figures(result)[2:]
    sections = [
        Section("short", "In short", f"<ul>{said}</ul>"),
        Section("groups", "Groups", _NARROW + report_page.table(_HEADS, _cells(result)) + _plots(bars)),
        Section("together", "Trained together", report_page.table(_SET_HEADS, _set_cells(result))),
        Section("blocks", "Blocks", _plots(maps)),
    ]
    lead = "Each group trained alone for a few steps, on the same windows with the same noise, before any real training."
    shown = [section for section in sections if section.body]
    write_file(path, report_page.page("mvwan sensitivity", "Which groups are worth training", lead, shown, __version__))


def _plots(drawn: Sequence[Mapping[str, Any]]) -> str:
    return "".join(report_page.plot(figure, figure["layout"]["height"]) for figure in drawn if figure["data"])


def figures(result: _Result) -> list[dict[str, Any]]:
    """Bars of the decrease and of the decrease per million parameters; maps of blocks, Fisher and decrease."""
    chosen = set(result["suggestion"]["groups"])
    known = [one for one in result["candidates"] if one["decrease"] is not None]
    return [
        _bars(sorted(known, key=lambda one: one["decrease"]), "decrease", "Decrease of the held-out loss, with 95 % intervals", chosen),
        _bars(known[::-1], "decrease_per_million", "The same per million parameters", chosen),
        _fisher_map(result["candidates"]),
        _decrease_map(result["candidates"]),
    ]


def _bars(rows: Sequence[Mapping[str, Any]], field: str, title: str, chosen: set[str]) -> dict[str, Any]:
    scales = [one[field] / one["decrease"] if one["decrease"] else 0.0 for one in rows]
    bar = {
        "type": "bar",
        "orientation": "h",
        "x": [one[field] for one in rows],
        "y": [one["name"] for one in rows],
        "marker": {"color": [_BLUE if one["name"] in chosen else _GREY for one in rows]},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [(one["interval"][1] - one["decrease"]) * scale for one, scale in zip(rows, scales, strict=True)],
            "arrayminus": [(one["decrease"] - one["interval"][0]) * scale for one, scale in zip(rows, scales, strict=True)],
            "thickness": 1,
            "width": 3,
        },
        "hovertemplate": "%{y}: %{x:.4g}<extra></extra>",
    }
    suffix = "; blue: suggested" if chosen else ""
    axis = "decrease" if field == "decrease" else "decrease per million parameters"
    return {"data": [bar] if rows else [], "layout": _layout(title + suffix, len(rows), {"title": {"text": axis}})}


def _fisher_map(candidates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """log10 of the squared gradient per live parameter, a row per group and a column per block; empty where no gradient was."""
    rows = [one for one in candidates if one["live_parameters"]][::-1]
    places = _places(place for one in rows for place in one["fisher_by_block"])
    values = [
        [_log10(one["fisher_by_block"].get(place, {}).get("per_parameter", 0.0)) for place in places] for one in rows
    ]  # fmt: skip
    hover = "%{y}, block %{x}: 10^%{z:.2f}<extra></extra>"
    data = _map(rows, places, values, hover, colorscale=_SCALE, colorbar={"title": {"text": "log10"}})
    return {
        "data": data,
        "layout": _layout("Squared gradient per live parameter", len(rows), {"title": {"text": "block"}, "type": "category"}),
    }


def _decrease_map(candidates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each block's part of its group's decrease, as a share of the largest part in its row: rows differ by orders of magnitude."""
    rows = [one for one in candidates if one["block_decrease"]][::-1]
    places = _places(place for one in rows for place in one["block_decrease"])
    values: list[list[float | None]] = []
    for one in rows:
        largest = max(map(abs, one["block_decrease"].values())) or 1.0
        values.append([one["block_decrease"][place] / largest if place in one["block_decrease"] else None for place in places])
    hover = "%{y}, block %{x}: %{z:.2f} of the row's largest<extra></extra>"
    data = _map(rows, places, values, hover, colorscale=_DIVERGING, zmin=-1, zmax=1, colorbar={"title": {"text": "of row"}})
    title = "What the loss rises by when one block goes back to its start, as a share of its row's largest"
    return {"data": data, "layout": _layout(title, len(rows), _BLOCKS)}


def _map(rows: Sequence[Mapping[str, Any]], places: Sequence[str], values: Any, hover: str, **style: Any) -> list[dict[str, Any]]:
    names = [one["name"] for one in rows]
    return (
        [{"type": "heatmap", "x": places, "y": names, "z": values, "hovertemplate": hover, "xgap": 1, "ygap": 1, **style}] if rows else []
    )


def _places(found: Any) -> list[str]:
    """Blocks in order, then `outside`."""
    return sorted(set(found), key=lambda place: math.inf if place == "outside" else int(place))


def _log10(value: float) -> float | None:
    return math.log10(value) if value > 0 else None


def _layout(title: str, rows: int, x: dict[str, Any]) -> dict[str, Any]:
    return {
        "title": {"text": title, "x": 0, "xanchor": "left", "font": {"size": 15}},
        "height": 130 + 24 * rows,
        "margin": {"l": 170, "r": 30, "t": 50, "b": 50},
        "xaxis": {"zeroline": True, **x},
        "yaxis": {"type": "category", "automargin": True, "showgrid": False},
    }
