"""A prediction as files that people and programs open, and a user's own pictures and cameras read from files.

    <output>/trajectory.json        peaks, confidence, 3-D path, gripper, cameras; one entry per frame
    <output>/<view>.rgb.mp4         the predicted pictures of a view
    <output>/<view>.heat.mp4        its predicted heatmaps in JET colours
    <output>/sheet.png              frames in columns, both streams of every view in rows, predicted and true peaks marked

trajectory.json, format 1, holds `prompt`, `fps` (predicted frames per second), `cameras` as `Camera.from_dict` reads them, and `frames`,
the given ones first. A frame has `time_s` since the first, `point_m` in the cameras' world, `residual_px` (how far the views' peaks are
from that point), `gripper_open` (0 closed .. 1 open), `rotation_deg` (turn of the hand since the first frame), and per view, by the
camera's name, `uv_px` and `confidence` of its peak. What is not known is null. Pixels are those of `batch`: (0, 0) is the outer corner.

Knows no model and no data set.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mvwan import heatmaps, pictures
from mvwan.batch import Prediction
from mvwan.cameras import Camera
from mvwan.data.transforms import resize
from mvwan.errors import MvwanError
from mvwan.files import read_json, whole_directory, write_file, write_json

FORMAT_VERSION = 1
TRUE_COLOUR = (255, 255, 255)
PREDICTED_COLOUR = (255, 0, 255)
_SHOWN_HEIGHT_PX = 192
_LABEL_PX = 112
_LINE_PX = 28
_FONT_PX = 17


@dataclass(frozen=True, kw_only=True, eq=False)
class Truth:
    """What really happened, frame by frame beside a prediction."""

    rgb: np.ndarray
    """[V F H W 3] uint8."""
    uv_px: np.ndarray
    """[V F 2], NaN where the point is not visible."""


def write_prediction(prediction: Prediction, output: str | Path, fps: float, truth: Truth | None = None) -> list[Path]:
    """The files of the new folder `output`. `fps`: predicted frames per second. Raises `MvwanError` when the folder exists."""
    output = Path(output)
    check_place(output, prediction.cameras)
    with whole_directory(output) as folder:
        write_json(folder / "trajectory.json", trajectory(prediction, fps))
        for view, camera in enumerate(prediction.cameras):
            write_file(folder / f"{camera.name}.rgb.mp4", pictures.mp4(prediction.rgb[view], fps))
            write_file(folder / f"{camera.name}.heat.mp4", pictures.mp4(heatmaps.colour(prediction.heat[view]), fps))
        write_file(folder / "sheet.png", pictures.png(sheet(prediction, fps, truth)))
    return sorted(output.iterdir())


def check_place(output: str | Path, cameras: Sequence[Camera]) -> None:
    """Nothing, or `MvwanError` when `output` exists or a camera's name cannot name a file: known before a prediction is made."""
    if Path(output).exists():
        raise MvwanError(f"{output}: exists already. Remove it or choose another folder.")
    names = [camera.name for camera in cameras]
    for name in names:
        if not re.fullmatch(r"[\w-][\w.-]*", name):
            raise MvwanError(f"camera {name!r}: files are named after cameras; use letters, digits, `_`, `-` and `.` alone")
        if names.count(name) > 1:
            raise MvwanError(f"camera {name!r}: two cameras have this name, and files are named after cameras. Rename one.")


def trajectory(prediction: Prediction, fps: float) -> dict[str, Any]:
    """What `trajectory.json` holds: plain numbers, None where one is not known. Points in metres in the world frame of the cameras."""
    frames = []
    for frame in range(prediction.heat.shape[1]):
        views = {
            camera.name: {
                "uv_px": _listed(prediction.uv_px[view, frame]) if prediction.confidence[view, frame] > 0 else None,
                "confidence": float(prediction.confidence[view, frame]),
            }
            for view, camera in enumerate(prediction.cameras)
        }
        frames.append(
            {
                "time_s": frame / fps,
                "point_m": _listed(prediction.point_m[frame]),
                "residual_px": _listed(prediction.residual_px[frame]),
                "gripper_open": _listed(prediction.gripper_open[frame]),
                "rotation_deg": _listed(prediction.rotation_deg[frame]),
                "views": views,
            }
        )
    cameras = [camera.to_dict() for camera in prediction.cameras]
    return {"format_version": FORMAT_VERSION, "prompt": prediction.prompt, "fps": fps, "cameras": cameras, "frames": frames}


def _listed(values: Any) -> Any:
    """A number or a list of them; None unless all are finite."""
    return np.asarray(values, np.float64).tolist() if np.isfinite(values).all() else None


def sheet(prediction: Prediction, fps: float, truth: Truth | None = None) -> np.ndarray:
    """[H W 3] uint8: per view a row of true pictures (with `truth`), of predicted ones and of heatmaps, both peaks marked in each."""
    factor = max(1, round(_SHOWN_HEIGHT_PX / prediction.rgb.shape[2]))
    columns = pictures.columns_shown(prediction.rgb.shape[1])
    labels, rows = [], []
    for view, camera in enumerate(prediction.cameras):
        shown = [("predicted", prediction.rgb[view]), ("heatmap", heatmaps.colour(prediction.heat[view]))]
        for label, frames in ([("true", truth.rgb[view])] if truth else []) + shown:
            labels.append(f"{camera.name}\n{label}")
            rows.append([_marked(pictures.enlarge(frames[frame], factor), prediction, truth, view, frame, factor) for frame in columns])
    table = pictures.grid(np.array(rows))
    canvas = Image.new("RGB", (table.shape[1] + _LABEL_PX, table.shape[0] + 2 * _LINE_PX), "white")
    canvas.paste(Image.fromarray(table), (_LABEL_PX, 2 * _LINE_PX))
    _write_words(ImageDraw.Draw(canvas), prediction.prompt, labels, [frame / fps for frame in columns], table.shape, truth is not None)
    return np.asarray(canvas)


def _marked(picture: np.ndarray, prediction: Prediction, truth: Truth | None, view: int, frame: int, factor: int) -> np.ndarray:
    """The enlarged picture with both peaks, dark under bright so that they show on any ground."""
    if truth is not None:
        picture = _outlined(picture, factor * truth.uv_px[view, frame], TRUE_COLOUR, 3.0 * factor, cross=False)
    found = prediction.uv_px[view, frame] if prediction.confidence[view, frame] > 0 else np.full(2, np.nan)
    return _outlined(picture, factor * found, PREDICTED_COLOUR, 2.0 * factor, cross=True)


def _outlined(picture: np.ndarray, uv_px: np.ndarray, colour: tuple[int, int, int], radius_px: float, cross: bool) -> np.ndarray:
    picture = pictures.mark_points(picture, uv_px[None], (0, 0, 0), radius_px + 2, cross, width_px=7)
    return pictures.mark_points(picture, uv_px[None], colour, radius_px, cross, width_px=3)


def _write_words(
    draw: ImageDraw.ImageDraw, prompt: str, labels: Sequence[str], times_s: Sequence[float], size: tuple[int, ...], with_truth: bool
) -> None:
    """The prompt and the legend on the first line, times over the columns, views and streams beside the rows."""
    font = ImageFont.load_default(_FONT_PX)
    draw.text((_LABEL_PX, 2), prompt, fill="black", font=font)
    right = _LABEL_PX + size[1]
    _legend(draw, right - 170, "predicted peak", PREDICTED_COLOUR, cross=True)
    if with_truth:
        _legend(draw, right - 310, "true peak", TRUE_COLOUR, cross=False)
    for column, time_s in enumerate(times_s):
        left = _LABEL_PX + column * (size[1] + 2) / len(times_s)
        draw.text((left + 2, _LINE_PX + 2), "given" if column == 0 else f"+{time_s:.2f} s", fill="black", font=font)
    for row, label in enumerate(labels):
        draw.text((4, 2 * _LINE_PX + row * (size[0] + 2) / len(labels) + 4), label, fill="black", font=font)


def _legend(draw: ImageDraw.ImageDraw, left: int, words: str, colour: tuple[int, int, int], cross: bool) -> None:
    """A mark on a grey field and what it means; drawn, since the default font has no such signs."""
    draw.rectangle((left, 2, left + 22, 24), fill=(60, 60, 60))
    if cross:
        draw.line((left + 5, 7, left + 17, 19), fill=colour, width=3)
        draw.line((left + 5, 19, left + 17, 7), fill=colour, width=3)
    else:
        draw.ellipse((left + 4, 6, left + 18, 20), outline=colour, width=3)
    draw.text((left + 30, 2), words, fill="black", font=ImageFont.load_default(_FONT_PX))


def read_pictures(paths: Sequence[Path], cameras: Sequence[Camera], height_px: int, width_px: int) -> tuple[np.ndarray, tuple[Camera, ...]]:
    """([V height_px width_px 3] uint8, their cameras) of picture files, one per camera, each brought to that size with its camera.

    Raises `MvwanError` for a file that is no picture, and for a picture that is not of its camera's size.
    """
    if len(paths) != len(cameras):
        raise MvwanError(f"--image is given {len(paths)} times for {len(cameras)} cameras. Give one picture per camera, in the same order.")
    found, seen_by = [], []
    for path, camera in zip(paths, cameras, strict=True):
        try:
            with Image.open(path) as image:
                picture = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise MvwanError(f"--image {path}: not a picture that can be read ({error}). PNG, JPEG and WebP are.") from None
        if picture.shape[:2] != (camera.height_px, camera.width_px):
            raise MvwanError(
                f"--image {path}: {picture.shape[1]}x{picture.shape[0]} px, its camera {camera.name!r} is {camera.width_px}x"
                f"{camera.height_px} px. Give the picture as the camera took it, or cameras of this size."
            )
        resized, (smaller,) = resize(picture[None, None], [camera], height_px, width_px)
        found.append(resized[0, 0])
        seen_by.append(smaller)
    return np.stack(found), tuple(seen_by)


def read_cameras(path: Path) -> tuple[Camera, ...]:
    """The cameras of a JSON file: a list of them, or a `trajectory.json`. Raises `MvwanError` for anything else."""
    value = read_json(path)
    listed = value.get("cameras") if isinstance(value, dict) else value
    if not isinstance(listed, list) or not listed or not all(isinstance(camera, dict) for camera in listed):
        raise MvwanError(f"--cameras {path}: needed is a list of cameras, or an object with `cameras`, as in a trajectory.json")
    try:
        return tuple(Camera.from_dict(camera) for camera in listed)
    except MvwanError as error:
        raise MvwanError(f"--cameras {path}: {error}") from None
