"""Numbers -> figures as plain dicts that Plotly draws in the report. Colours are names of the page's CSS variables (`var:on`).

A source is `off`, `on`, `hold` (the first frame held), `nearest` (training demonstration) or `truth`. Knows no files and no HTML.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Figure = dict[str, Any]
Points = Sequence[tuple[float, float | None]]

NAMES = {"hold": "hold first frame", "nearest": "nearest demonstration"}
WIDTHS = {"off": 5.0}
"""Where two runs agree, the narrow line of one lies on the wide line of the other, and both are seen."""
MARKS = {
    "off": {"symbol": "circle-open", "size": 14, "line": {"width": 3}},
    "on": {"symbol": "circle", "size": 8},
    "hold": {"symbol": "line-ew-open", "size": 18, "line": {"width": 3}},
}


def training_loss(stream: str, by_run: Mapping[str, Points]) -> Figure:
    """Loss of one stream over steps: every step faint, the running mean over a twentieth of them strong."""
    data = []
    for run, points in by_run.items():
        data.append(_line(run, points, width=1, opacity=0.25, legend=False))
        data.append(_line(run, smoothed(points, max(1, len(points) // 20))))
    return _figure(data, f"Training, {stream}", "step", "mean squared error", yaxis={"type": "log"}, hovermode="x unified")


def held_out_loss(stream: str, by_run: Mapping[str, Mapping[str, Points]]) -> Figure:
    """Held-out loss of one stream over steps, one line per run and sigma band; bands differ by dash."""
    dashes = ("solid", "dash", "dashdot", "dot")
    data = [
        _line(run, points, name=f"{run}, sigma {band}", dash=dashes[place % len(dashes)], markers=True)
        for run, bands in by_run.items()
        for place, (band, points) in enumerate(bands.items())
    ]
    return _figure(data, f"Held out, {stream}", "step", "mean squared error", yaxis={"type": "log"})


def movement(by_run: Mapping[str, Mapping[str, float | None]], title: str, x: str) -> Figure:
    """How far each group went, a dot per run on a log scale; groups without a number have no dot."""
    known = {run: {group: change for group, change in changes.items() if change is not None} for run, changes in by_run.items()}
    data = [_dots(run, list(changes.values()), list(changes), "%{y}: %{x:.3g}<extra>" + run + "</extra>") for run, changes in known.items()]
    order = list(
        dict.fromkeys(group for changes in by_run.values() for group in changes if any(group in found for found in known.values()))
    )
    groups = {"categoryorder": "array", "categoryarray": order[::-1]}
    shown = [change for changes in known.values() for change in changes.values() if change > 0]
    return _figure(data, title, x, "", xaxis={"type": "log", **_powers_of_ten(shown)}, yaxis=groups)


def _powers_of_ten(shown: Sequence[float]) -> dict[str, Any]:
    """Ticks of a log axis: powers of ten, and what is 2 and 5 times as much where `shown` lies within two of them."""
    if not shown or max(shown) >= 100 * min(shown):
        return {"dtick": 1, "exponentformat": "power"}
    powers = range(math.floor(math.log10(min(shown))), math.floor(math.log10(max(shown))) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    return {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def error_over_time(by_source: Mapping[str, Sequence[float | None]], given_frames: int, title: str, unit: str) -> Figure:
    """Mean error per frame, given frames left out."""
    data = [
        _line(source, [(frame, value) for frame, value in enumerate(values) if frame >= given_frames], markers=True)
        for source, values in by_source.items()
    ]
    return _figure(data, title, "frame", unit, yaxis={"rangemode": "tozero"}, hovermode="x unified")


def error_by_window(by_source: Mapping[str, Sequence[float | None]]) -> Figure:
    """One mark per window and source, windows in order."""
    data = [
        _dots(source, list(range(1, len(values) + 1)), list(values), "window %{x}: %{y:.2f} px<extra>" + source + "</extra>")
        for source, values in by_source.items()
    ]
    ticks = {"dtick": max(1, max(map(len, by_source.values())) // 8)}
    return _figure(data, "Peak error by window", "held-out window", "px", yaxis={"rangemode": "tozero"}, xaxis=ticks)


def paths_in_space(by_source: Mapping[str, Sequence[Sequence[float | None]]]) -> Figure:
    """3-D paths in metres around the true one; `by_source` maps `truth` and runs to points [F 3]."""
    data = [
        {
            "type": "scatter3d",
            "mode": "lines+markers",
            "name": source,
            "x": [point[0] for point in points],
            "y": [point[1] for point in points],
            "z": [point[2] for point in points],
            "line": {"color": f"var:{source}", "width": 9 if source == "off" else 4},
            "marker": {"color": f"var:{source}", "size": 2.5},
            "hovertemplate": "%{x:.3f}, %{y:.3f}, %{z:.3f} m<extra>" + source + "</extra>",
        }
        for source, points in by_source.items()
    ]
    axes = (("xaxis", "x, m"), ("yaxis", "y, m"), ("zaxis", "z, m"))
    scene: dict[str, Any] = {
        name: {"title": {"text": label}, "range": _around([point[axis] for point in by_source["truth"]])}
        for axis, (name, label) in enumerate(axes)
    }
    layout = {
        "title": _title("Path of the tool point"),
        "scene": {**scene, "aspectmode": "data"},
        "margin": {"l": 0, "r": 0, "t": 34, "b": 0},
    }
    return {"data": data, "layout": layout}


def _around(values: Sequence[float | None]) -> list[float]:
    """Range of an axis: the true values with room beside them, so that one lost point does not shrink the rest to nothing."""
    known = [value for value in values if value is not None] or [0.0]
    room = max(0.1, 0.5 * (max(known) - min(known)))
    return [min(known) - room, max(known) + room]


def smoothed(points: Points, window: int) -> list[tuple[float, float | None]]:
    """Each value averaged with up to `window` - 1 before it; missing values are left out."""
    known = [(x, y) for x, y in points if y is not None]
    averages: list[tuple[float, float | None]] = []
    for index, (x, _) in enumerate(known):
        recent = [y for _, y in known[max(0, index - window + 1) : index + 1]]
        averages.append((x, sum(recent) / len(recent)))
    return averages


def _figure(data: list[Any], title: str, x: str, y: str, **layout: Any) -> Figure:
    axes = {"xaxis": {"title": {"text": x}, **layout.pop("xaxis", {})}, "yaxis": {"title": {"text": y}, **layout.pop("yaxis", {})}}
    return {"data": data, "layout": {"title": _title(title), **axes, **layout}}


def _title(text: str) -> dict[str, Any]:
    return {"text": text, "x": 0, "xanchor": "left", "y": 0.98, "yanchor": "top", "font": {"size": 14}}


def _line(source: str, points: Points, *, name: str = "", **style: Any) -> dict[str, Any]:
    """One line in the colour of `source`; `style` may hold `dash`, `width`, `opacity`, `markers`, `legend`."""
    name = name or NAMES.get(source, source)
    return {
        "type": "scatter",
        "mode": "lines+markers" if style.get("markers") else "lines",
        "name": name,
        "x": [x for x, _ in points],
        "y": [y for _, y in points],
        "line": {"color": f"var:{source}", "dash": style.get("dash", "solid"), "width": style.get("width", WIDTHS.get(source, 2.0))},
        "marker": {"size": 8 if source == "off" else 5},
        "opacity": style.get("opacity", 1),
        "showlegend": style.get("legend", True),
        "hovertemplate": "%{y:.4g}<extra>" + name + "</extra>",
    }


def _dots(source: str, x: Sequence[Any], y: Sequence[Any], hover: str) -> dict[str, Any]:
    """One mark per pair in the colour and shape of `source`."""
    mark = {"color": f"var:{source}", **MARKS[source]}
    return {
        "type": "scatter",
        "mode": "markers",
        "name": NAMES.get(source, source),
        "x": x,
        "y": y,
        "marker": mark,
        "hovertemplate": hover,
    }
