"""One episode as a Rerun recording, to play and to turn round: the only door to Rerun.

    instruction                         what was asked for
    world/point, world/path             the tracked point in each frame, and over all of them, metres
    world/cameras/<view>                a pinhole camera where it stands; views of any other kind are pictures/<view>
    <a view>/rgb, heat, point           the picture, the heatmap over it, and where the point is labelled, px
    gripper_open                        0 closed .. 1 open

Everything that changes stands on two timelines, `frame` and `time` (seconds since frame 0). What an episode does not know is not there.
Knows no dataset and no model.
"""

from pathlib import Path
from typing import Any

import numpy as np

from mvwan import pictures
from mvwan.batch import Episode
from mvwan.errors import MvwanError
from mvwan.files import write_file
from mvwan.heatmaps import colour, render

_READ_TOGETHER = 32
"""Frames that are in memory at recorded size at the same time."""
_JPEG_QUALITY = 90
_RED = (230, 40, 30)


def write_recording(episode: Episode, path: str | Path, sigma_px: float) -> int:
    """The size in bytes of the recording at `path`, written whole or not at all. Heatmaps are `sigma_px` wide at recorded size.

    Raises `MvwanError` when Rerun is not installed, a picture cannot be read, or `path` cannot be written.
    """
    data = recording(episode, sigma_px)
    write_file(path, data)
    return len(data)


def recording(episode: Episode, sigma_px: float) -> bytes:
    """The recording as the content of an .rrd file."""
    rerun = _rerun()
    stream = rerun.RecordingStream("mvwan", recording_id=episode.name, send_properties=False)
    stream.set_log_time_enabled(False)
    stream.set_log_tick_enabled(False)
    memory = stream.memory_recording()
    places = [f"{'world/cameras' if _stands(episode, view) else 'pictures'}/{camera.name}" for view, camera in enumerate(episode.cameras)]
    stream.log("instruction", rerun.TextDocument(episode.instruction), static=True)
    for view, place in enumerate(places):
        if _stands(episode, view):
            _log_camera(rerun, stream, place, episode, view)
    known, opened = np.asarray(np.isfinite(episode.point_m).all(axis=1)), np.isfinite(episode.gripper_open)
    if known.any():
        stream.log("world", rerun.ViewCoordinates.RIGHT_HAND_Z_UP, static=True)
        stream.log("world/path", rerun.LineStrips3D([episode.point_m[known]], colors=[_RED]), static=True)
    labels = [_labels(episode, view) for view in range(len(episode.cameras))]
    for start in range(0, episode.num_frames, _READ_TOGETHER):
        frames = range(start, min(start + _READ_TOGETHER, episode.num_frames))
        for frame, rgb in zip(frames, episode.read_rgb(frames).swapaxes(0, 1), strict=True):
            stream.set_time("frame", sequence=frame)
            stream.set_time("time", duration=frame / episode.fps)
            if known.any():
                stream.log("world/point", rerun.Points3D(_one(episode.point_m, known, frame), radii=0.01, colors=[_RED]))
            if opened.any():
                stream.log("gripper_open", rerun.Scalars(_one(episode.gripper_open, opened, frame)))
            for place, picture, (uv_px, seen) in zip(places, rgb, labels, strict=True):
                heat = render(uv_px[frame], seen[frame], picture.shape[0], picture.shape[1], sigma_px)
                over = np.concatenate([colour(heat), np.rint(255 * heat[..., None]).astype(np.uint8)], axis=-1)
                stream.log(f"{place}/rgb", rerun.Image(picture).compress(_JPEG_QUALITY))
                stream.log(f"{place}/heat", rerun.EncodedImage(contents=pictures.png(over), media_type="image/png", draw_order=1))
                stream.log(f"{place}/point", rerun.Points2D(_one(uv_px, seen, frame), radii=1.5, colors=[_RED]))
    return memory.drain_as_bytes()


def _one(values: np.ndarray, known: np.ndarray, frame: int) -> np.ndarray:
    """[1 ...] the value of a frame, or [0 ...] where it is not known."""
    frames = slice(frame, frame + 1)
    return values[frames][known[frames]]


def _rerun() -> Any:
    try:
        import rerun
    except ModuleNotFoundError:
        raise MvwanError("a recording for Rerun: the package rerun-sdk is not installed. Run `pip install 'mvwan[view]'`.") from None
    return rerun


def _stands(episode: Episode, view: int) -> bool:
    """Whether the view is a pinhole camera of which is known where it stands; Rerun has no others in space."""
    return episode.uv_px is None and episode.cameras[view].kind == "pinhole"


def _log_camera(rerun: Any, stream: Any, place: str, episode: Episode, view: int) -> None:
    camera = episode.cameras[view]
    axes, shift_m = camera.world_to_camera[:3, :3], camera.world_to_camera[:3, 3]
    lens = rerun.Pinhole(
        image_from_camera=camera.intrinsics,
        resolution=[camera.width_px, camera.height_px],
        camera_xyz=rerun.ViewCoordinates.RDF,
        image_plane_distance=0.15,
    )
    stream.log(place, rerun.Transform3D(translation=-axes.T @ shift_m, mat3x3=axes.T), lens, static=True)


def _labels(episode: Episode, view: int) -> tuple[np.ndarray, np.ndarray]:
    """(uv_px [F 2], seen [F]): where the point is labelled in the view, and whether it is and lies inside the picture."""
    camera = episode.cameras[view]
    if episode.uv_px is None:
        uv_px, depth_m = camera.project(episode.point_m)
    else:
        uv_px, depth_m = episode.uv_px[view], np.ones(episode.num_frames)
    return uv_px, camera.inside(uv_px, depth_m)
