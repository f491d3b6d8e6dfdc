"""Arrays -> pictures and videos in memory: strips, grids, marks, WebP, MP4 (H.264) and data URIs.

Knows no model, no run and no page; `report` and `mvwan sample` decide what is shown. Frames are uint8 `[N H W 3]`.
"""

import base64
import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from PIL import Image, ImageDraw


def strip(frames: np.ndarray, gap_px: int = 2, background: int = 255) -> np.ndarray:
    """The frames `[N H W 3]` side by side, `[H N*W+(N-1)*gap 3]` uint8."""
    return grid(frames[None], gap_px, background)


def grid(frames: np.ndarray, gap_px: int = 2, background: int = 255) -> np.ndarray:
    """Frames `[rows columns H W 3]` as one picture, uint8, with `gap_px` between neighbours."""
    assert frames.dtype == np.uint8 and frames.ndim == 5, (frames.dtype, frames.shape)
    rows, columns, height, width = frames.shape[:4]
    size = (rows * (height + gap_px) - gap_px, columns * (width + gap_px) - gap_px, 3)
    picture = np.full(size, background, np.uint8)
    for row in range(rows):
        for column in range(columns):
            top, left = row * (height + gap_px), column * (width + gap_px)
            picture[top : top + height, left : left + width] = frames[row, column]
    return picture


def enlarge(picture: np.ndarray, factor: int) -> np.ndarray:
    """The picture `[H W 3]` with sides `factor` times as long, smoothly."""
    height, width = picture.shape[:2]
    return np.asarray(Image.fromarray(picture).resize((width * factor, height * factor), Image.Resampling.LANCZOS))


def mark_points(
    picture: np.ndarray, uv_px: np.ndarray, colour: tuple[int, int, int], radius_px: float = 3.0, cross: bool = False, width_px: int = 1
) -> np.ndarray:
    """A copy of `[H W 3]` with a ring, or a cross, at each point `[N 2]`; points that are not finite are left out."""
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    for u, v in uv_px[np.isfinite(uv_px).all(axis=-1)]:
        if cross:
            draw.line((u - radius_px, v - radius_px, u + radius_px, v + radius_px), fill=colour, width=width_px)
            draw.line((u - radius_px, v + radius_px, u + radius_px, v - radius_px), fill=colour, width=width_px)
        else:
            draw.ellipse((u - radius_px, v - radius_px, u + radius_px, v + radius_px), outline=colour, width=width_px)
    return np.asarray(image)


def draw_path(picture: np.ndarray, uv_px: np.ndarray, colour: tuple[int, int, int], width_px: int = 2) -> np.ndarray:
    """A copy of `[H W 3]` with the points `[N 2]` joined in order and a dot on the last; points that are not finite are skipped."""
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    points = [(float(u), float(v)) for u, v in uv_px[np.isfinite(uv_px).all(axis=-1)]]
    if len(points) > 1:
        draw.line(points, fill=colour, width=width_px, joint="curve")
    if points:
        u, v = points[-1]
        draw.ellipse((u - width_px - 1, v - width_px - 1, u + width_px + 1, v + width_px + 1), fill=colour)
    return np.asarray(image)


def webp(picture: np.ndarray, quality: int = 88) -> bytes:
    """The picture `[H W 3]` uint8 as WebP."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", quality=quality, method=4)
    return buffer.getvalue()


def png(picture: np.ndarray) -> bytes:
    """The picture `[H W 3]` uint8, or `[H W 4]` with opacity, as PNG, losslessly."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def mp4(frames: np.ndarray, fps: float, quality: int = 20) -> bytes:
    """The frames `[F H W 3]` uint8 as an H.264 video that browsers play; sides are even. `quality` is x264's crf, lower is better."""
    assert frames.dtype == np.uint8 and frames.shape[1] % 2 == 0 and frames.shape[2] % 2 == 0, (frames.dtype, frames.shape)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(quality), "preset": "fast"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def data_uri(data: bytes, media_type: str) -> str:
    """`data:<media_type>;base64,…`, for `src` attributes of a page that needs no network."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"


def columns_shown(num_frames: int, at_most: int = 7) -> Sequence[int]:
    """Evenly spaced frame numbers, first and last among them, `at_most` of them."""
    if num_frames <= at_most:
        return range(num_frames)
    return [round(index * (num_frames - 1) / (at_most - 1)) for index in range(at_most)]
