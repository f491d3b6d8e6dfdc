"""Stored predictions -> HTML: a video, the paths of the point, and sheets of frames, true beside predicted. For `report`.

Everything is inlined as data URIs. Knows no numbers and no run folder.
"""

import html
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mvwan import pictures

Window = Mapping[str, dict[str, np.ndarray]]
"""Run label (`off`, `on`) -> what `evaluate.load_prediction` gives for one held-out window."""

SOURCE_NAMES = {
    "off": "switch off",
    "on": "switch on",
    "hold": "hold first frame",
    "velocity": "constant velocity",
    "nearest": "nearest demonstration",
    "codec": "encoded and back",
    "truth": "truth",
}
_COLOURS = {"truth": (29, 127, 209), "off": (240, 150, 50), "on": (35, 190, 175)}
_RING = (255, 255, 255)
_SHEET_WIDTH_PX = 840


def source_name(source: str) -> str:
    """The source's name with its dot of colour, as HTML."""
    return f'<span class="source"><span class="dot {source}"></span>{SOURCE_NAMES[source]}</span>'


def window_block(window: Window, given: int, number: int, beside: str = "") -> str:
    """Video, paths and frame sheets of one window; `given` frames are marked so, `beside` (HTML) stands next to the paths."""
    first = next(iter(window.values()))
    views = [str(view) for view in first["views"]]
    columns = list(pictures.columns_shown(first["true_rgb"].shape[1]))
    video = pictures.data_uri(pictures.mp4(_video(window, views), fps=5), "video/mp4")
    rows = ", ".join(["truth", *(f"switch {label}" for label in window)])
    paths = "".join(_path_figure(window, index, view) for index, view in enumerate(views))
    legend = " &ensp; ".join(source_name(source) for source in ("truth", *window))
    sheets = "".join(
        f"<details{' open' if index == 0 else ''}><summary>Frames of camera {html.escape(view)}</summary>"
        f"{_sheet(window, index, columns, given)}</details>"
        for index, view in enumerate(views)
    )
    name, prompt = html.escape(str(first["sample_id"])), html.escape(str(first["prompt"]))
    return (
        f"<h3>Window {number}: “{prompt}” <span class='soft'>{name}</span></h3>"
        f'<figure><video autoplay loop muted playsinline tabindex="0" title="press to pause" src="{video}"></video>'
        f"<figcaption>Rows: {rows}. Columns: RGB, then heatmap, of each camera.</figcaption></figure>"
        f'<div class="figures"><div><div class="paths">{paths}</div>'
        f'<p class="soft">Path of the point over the first frame: {legend}</p></div>'
        f"{beside}</div>{sheets}"
    )


def _path_figure(window: Window, view: int, name: str) -> str:
    name = html.escape(name)
    picture = _uri(_paths(window, view))
    return f'<figure><img alt="paths seen from {name}" src="{picture}"><figcaption>{name}</figcaption></figure>'


def _marked(heat: np.ndarray, uv_px: np.ndarray) -> np.ndarray:
    """Heat pictures [F H W 3] with a white ring at the true point [F 2]."""
    return np.stack(
        [pictures.mark_points(frame, uv[None], _RING, radius_px=0.04 * frame.shape[0]) for frame, uv in zip(heat, uv_px, strict=True)]
    )


def _rows(window: Window, view: int) -> list[tuple[str, str, np.ndarray]]:
    """(stream, source, frames [F H W 3]) of one view: truth first, then each run."""
    first = next(iter(window.values()))
    uv_px = first["true_uv_px"][view]
    rows = [("RGB", "truth", first["true_rgb"][view])]
    rows += [("RGB", label, stored["predicted_rgb"][view]) for label, stored in window.items()]
    rows += [("heat", "truth", first["true_heat"][view])]
    return rows + [("heat", label, _marked(stored["predicted_heat"][view], uv_px)) for label, stored in window.items()]


def _sheet(window: Window, view: int, columns: Sequence[int], given: int) -> str:
    """Frames of one view in columns: true and predicted RGB, then true and predicted heat."""
    width = next(iter(window.values()))["true_rgb"].shape[3] * len(columns) + 2 * (len(columns) - 1)
    shown = min(width, _SHEET_WIDTH_PX)
    heads = "".join(f"<span>{frame}{' (given)' if frame < given else ''}</span>" for frame in columns)
    cells = [f'<span></span><div class="heads" style="width:{shown}px;grid-template-columns:repeat({len(columns)},1fr)">{heads}</div>']
    for stream, source, frames in _rows(window, view):
        cells += ['<div class="gap"></div>'] if (stream, source) == ("heat", "truth") else []
        picture = _uri(pictures.strip(frames[list(columns)], background=128))
        label = f"{stream}, {source if source == 'truth' else 'predicted, ' + source}"
        cells.append(
            f'<span class="label"><span class="dot {source}"></span>{label}</span><img width="{shown}" alt="{label}" src="{picture}">'
        )
    return f'<div class="scroll"><div class="sheet">{"".join(cells)}</div></div>'


def _video(window: Window, views: Sequence[str]) -> np.ndarray:
    """[F H W 3]: rows truth and runs, columns RGB of each view, then heat of each view, under a line of names."""
    rows = [_rows(window, view) for view in range(len(views))]
    sources = list(dict.fromkeys(source for _, source, _ in rows[0]))
    lookup = {(stream, source, view): frames for view, entries in enumerate(rows) for stream, source, frames in entries}
    cells = [[lookup[stream, source, view] for stream in ("RGB", "heat") for view in range(len(views))] for source in sources]
    body = np.stack([pictures.grid(np.stack([[cell[frame] for cell in row] for row in cells])) for frame in range(len(cells[0][0]))])
    head = _names([f"{view} {stream}" for stream in ("RGB", "heat") for view in views], body.shape[2])
    framed = np.concatenate([np.broadcast_to(head, (len(body), *head.shape)), body], axis=1)
    return framed[:, : framed.shape[1] // 2 * 2, : framed.shape[2] // 2 * 2]


def _names(names: Sequence[str], width_px: int, height_px: int = 16) -> np.ndarray:
    """[height width 3] white line with the names over equal columns."""
    image = Image.new("RGB", (width_px, height_px), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    for index, name in enumerate(names):
        draw.text(((index + 0.5) * width_px / len(names), height_px / 2), name, fill="black", font=font, anchor="mm")
    return np.asarray(image)


def _paths(window: Window, view: int, factor: int = 2) -> np.ndarray:
    """The first frame, enlarged, with the true and the predicted paths of the point."""
    first = next(iter(window.values()))
    picture = pictures.enlarge(first["true_rgb"][view, 0], factor)
    picture = pictures.draw_path(picture, factor * first["true_uv_px"][view], _COLOURS["truth"], 3)
    for label, stored in window.items():
        picture = pictures.draw_path(picture, factor * stored["predicted_uv_px"][view], _COLOURS[label])
    return picture


def _uri(picture: np.ndarray) -> str:
    return pictures.data_uri(pictures.webp(picture), "image/webp")
