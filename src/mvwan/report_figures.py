"""Numbers -> figures as plain dicts that Plotly draws in the report. Colours are names of the page's CSS variables (`var:on`).

Knows no files and no HTML.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Figure = dict[str, Any]
Points = Sequence[tuple[float, float | None]]


def _figure(data: list[Any], title: str, x: str, y: str, **layout: Any) -> Figure:
    axes = {"xaxis": {"title": {"text": x}, **layout.pop("xaxis", {})}, "yaxis": {"title": {"text": y}, **layout.pop("yaxis", {})}}
    heading = {"text": title, "x": 0, "xanchor": "left", "font": {"size": 14}}
    return {"data": data, "layout": {"title": heading, "margin": {"l": 58, "r": 12, "t": 62, "b": 46}, **axes, **layout}}


def _line(name: str, points: Points, colour: str, **style: Any) -> dict[str, Any]:
    """One line; `style` may hold `dash`, `width`, `opacity`, `markers`."""
    return {
        "type": "scatter",
        "mode": "lines+markers" if style.get("markers") else "lines",
        "name": name,
        "x": [x for x, _ in points],
        "y": [y for _, y in points],
        "line": {"color": f"var:{colour}", "dash": style.get("dash", "solid"), "width": style.get("width", 2)},
        "opacity": style.get("opacity", 1),
        "showlegend": style.get("legend", True),
        "hovertemplate": "%{y:.4g}<extra>" + name + "</extra>",
    }


def smoothed(points: Points, window: int) -> list[tuple[float, float | None]]:
    """Each value averaged with up to `window` - 1 before it; missing values are left out."""
    known = [(x, y) for x, y in points if y is not None]
    averages = []
    for index, (x, _) in enumerate(known):
        recent = [y for _, y in known[max(0, index - window + 1) : index + 1]]
        averages.append((x, sum(recent) / len(recent)))
    return averages


def training_loss(stream: str, by_run: Mapping[str, Points]) -> Figure:
    """Loss of one stream over steps: every step faint, the running mean over a twentieth of them strong."""
    data = []
    for run, points in by_run.items():
        data.append(_line(run, points, run, width=1, opacity=0.25, legend=False))
        data.append(_line(run, smoothed(points, max(1, len(points) // 20)), run))
    return _figure(data, f"Training, {stream}", "step", "mean squared error", yaxis={"type": "log"}, hovermode="x unified")


def held_out_loss(stream: str, by_run: Mapping[str, Mapping[str, Points]]) -> Figure:
    """Held-out loss of one stream over steps, one line per run and sigma band; bands differ by dash."""
    dashes = ("solid", "dash", "dashdot", "dot")
    data = []
    for run, bands in by_run.items():
        for place, (band, points) in enumerate(bands.items()):
            data.append(_line(f"{run}, sigma {band}", points, run, dash=dashes[place % len(dashes)], markers=True))
    return _figure(
        data, f"Held out, {stream}", "step", "mean squared error", yaxis={"type": "log"}, margin={"l": 58, "r": 12, "t": 112, "b": 46}
    )


def movement(by_run: Mapping[str, Mapping[str, float | None]]) -> Figure:
    """Relative change per group, one bar per run; log scale. Groups that were zero at the start have no bar."""
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": run,
            "y": list(changes),
            "x": list(changes.values()),
            "marker": {"color": f"var:{run}"},
            "hovertemplate": "%{y}: %{x:.3g}<extra>" + run + "</extra>",
        }
        for run, changes in by_run.items()
    ]
    return _figure(
        data,
        "Relative change by group",
        "norm of the change / norm at the start",
        "",
        xaxis={"type": "log", "exponentformat": "power"},
        yaxis={"autorange": "reversed"},
        barmode="group",
    )


def error_over_time(by_source: Mapping[str, Sequence[float | None]], given_frames: int) -> Figure:
    """Mean peak error per frame; source names are `off`, `on`, `hold`."""
    names = {"hold": "hold first frame"}
    data = [
        _line(
            names.get(source, source), [(frame, value) for frame, value in enumerate(values) if frame >= given_frames], source, markers=True
        )
        for source, values in by_source.items()
    ]
    return _figure(data, "Peak error by frame", "frame", "px", yaxis={"rangemode": "tozero"}, hovermode="x unified")


def error_by_window(by_source: Mapping[str, Sequence[float | None]]) -> Figure:
    """One dot per window and source, windows in order."""
    names = {"hold": "hold first frame"}
    data = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": names.get(source, source),
            "x": list(range(1, len(values) + 1)),
            "y": list(values),
            "marker": {"color": f"var:{source}", "size": 8, "symbol": "line-ew-open" if source == "hold" else "circle"},
            "hovertemplate": "window %{x}: %{y:.2f} px<extra>" + source + "</extra>",
        }
        for source, values in by_source.items()
    ]
    return _figure(
        data,
        "Peak error by window",
        "held-out window",
        "px",
        yaxis={"rangemode": "tozero"},
        xaxis={"dtick": max(1, max(map(len, by_source.values())) // 8)},
    )


def paths_in_space(by_source: Mapping[str, Sequence[Sequence[float | None]]]) -> Figure:
    """3-D paths in metres; `by_source` maps `truth`, `off`, `on` to points [F 3]."""
    data = [
        {
            "type": "scatter3d",
            "mode": "lines+markers",
            "name": source,
            "x": [point[0] for point in points],
            "y": [point[1] for point in points],
            "z": [point[2] for point in points],
            "line": {"color": f"var:{source}", "width": 5},
            "marker": {"color": f"var:{source}", "size": 2.5},
            "hovertemplate": "%{x:.3f}, %{y:.3f}, %{z:.3f} m<extra>" + source + "</extra>",
        }
        for source, points in by_source.items()
    ]
    scene = {name: {"title": {"text": f"{letter}, m"}} for name, letter in (("xaxis", "x"), ("yaxis", "y"), ("zaxis", "z"))}
    heading = {"text": "Path of the tool point", "x": 0, "xanchor": "left", "font": {"size": 14}}
    return {
        "data": data,
        "layout": {"title": heading, "scene": {**scene, "aspectmode": "data"}, "margin": {"l": 0, "r": 0, "t": 62, "b": 0}},
    }
