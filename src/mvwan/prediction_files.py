"""A prediction as files that people and programs open, and a user's own pictures and cameras read from files.

    <output>/trajectory.json        peaks, confidence, 3-D path, gripper, cameras; one entry per frame
    <output>/<view>.rgb.mp4         the predicted pictures of a view
    <output>/<view>.heat.mp4        its predicted heatmaps in JET colours
    <output>/sheet.png              frames in columns, both streams of every view in rows, predicted and true peaks marked

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
from mvwan.errors import MvwanError
from mvwan.files import read_json, whole_directory, write_file, write_json

FORMAT_VERSION = 1
TRUE_COLOUR = (255, 255, 255)
PREDICTED_COLOUR = (255, 0, 255)
_SHOWN_HEIGHT_PX = 192
_LABEL_PX = 96
_LINE_PX = 20


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
    _check_names([camera.name for camera in prediction.cameras])
    with whole_directory(output) as folder:
        write_json(folder / "trajectory.json", trajectory(prediction, fps))
        for view, camera in enumerate(prediction.cameras):
            write_file(folder / f"{camera.name}.rgb.mp4", pictures.mp4(prediction.rgb[view], fps))
            write_file(folder / f"{camera.name}.heat.mp4", pictures.mp4(heatmaps.colour(prediction.heat[view]), fps))
        write_file(folder / "sheet.png", pictures.png(sheet(prediction, fps, truth)))
    return sorted(output.iterdir())


def _check_names(names: Sequence[str]) -> None:
    """`MvwanError` for names of cameras that cannot name files."""
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
    for shift in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        picture = pictures.mark_points(picture, (uv_px + shift)[None], (0, 0, 0), radius_px, cross)
    return pictures.mark_points(picture, uv_px[None], colour, radius_px, cross)


def _write_words(
    draw: ImageDraw.ImageDraw, prompt: str, labels: Sequence[str], times_s: Sequence[float], size: tuple[int, ...], with_truth: bool
) -> None:
    """The prompt and the legend on the first line, times over the columns, views and streams beside the rows."""
    font = ImageFont.load_default(13)
    draw.text((_LABEL_PX, 2), prompt, fill="black", font=font)
    right = _LABEL_PX + size[1]
    _legend(draw, right - 130, "predicted peak", PREDICTED_COLOUR, cross=True)
    if with_truth:
        _legend(draw, right - 250, "true peak", TRUE_COLOUR, cross=False)
    for column, time_s in enumerate(times_s):
        left = _LABEL_PX + column * (size[1] + 2) / len(times_s)
        draw.text((left + 2, _LINE_PX + 2), "given" if column == 0 else f"+{time_s:.2f} s", fill="black", font=font)
    for row, label in enumerate(labels):
        draw.text((4, 2 * _LINE_PX + row * (size[0] + 2) / len(labels) + 4), label, fill="black", font=font)


def _legend(draw: ImageDraw.ImageDraw, left: int, words: str, colour: tuple[int, int, int], cross: bool) -> None:
    """A mark on a grey field and what it means; drawn, since the default font has no such signs."""
    draw.rectangle((left, 1, left + 18, _LINE_PX - 2), fill=(90, 90, 90))
    if cross:
        draw.line((left + 4, 5, left + 14, 14), fill=colour, width=2)
        draw.line((left + 4, 14, left + 14, 5), fill=colour, width=2)
    else:
        draw.ellipse((left + 4, 4, left + 14, 14), outline=colour, width=2)
    draw.text((left + 24, 2), words, fill="black", font=ImageFont.load_default(13))


def read_pictures(paths: Sequence[Path]) -> np.ndarray:
    """[V H W 3] uint8 of picture files, one per camera. Raises `MvwanError` for a file that is none, or for different sizes."""
    found = []
    for path in paths:
        try:
            with Image.open(path) as image:
                found.append(np.asarray(image.convert("RGB")))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise MvwanError(f"--image {path}: not a picture that can be read ({error}). PNG, JPEG and WebP are.") from None
    sizes = {picture.shape for picture in found}
    if len(sizes) > 1:
        raise MvwanError(f"--image: pictures of different sizes ({', '.join(f'{size[1]}x{size[0]}' for size in sorted(sizes))} px)")
    return np.stack(found)


def read_cameras(path: Path) -> tuple[Camera, ...]:
    """The cameras of a JSON file: a list of them, or a `trajectory.json`. Raises `MvwanError` for anything else."""
    value = read_json(path)
    listed = value.get("cameras") if isinstance(value, dict) else value
    if not isinstance(listed, list) or not listed or not all(isinstance(camera, dict) for camera in listed):
        raise MvwanError(f"--cameras {path}: needed is a list of cameras, or an object with `cameras`, as in a trajectory.json")
    return tuple(Camera.from_dict(camera) for camera in listed)
