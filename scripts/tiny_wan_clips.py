"""Pictures that the tiny Wan learns from: recorded single-view videos, synthetic heatmap tracks, and batches of both.

Knows no model. Every draw is a function of the generator it is given. Shapes: rgb uint8 [F H W 3], clips float32 [B 3 F H W] in -1..1.
"""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mvwan import heatmaps
from mvwan.cameras import Camera
from mvwan.files import whole_file
from mvwan.sim.metaworld import STEPS_PER_FRAME, Simulator, random_camera, rig, rollout
from mvwan.sim.tasks import INSTRUCTIONS

SIZE_PX = 128
NUM_FRAMES = 13
FRAME_INTERVAL = 2
RANDOM_CAMERAS = 4
"""Beside the three of the rig, for each layout."""
SIGMA_PX = 4.0
SPOTS = (1, 1, 3, 6)
"""Spots in a made-up heat clip, drawn evenly: several at once, since a lone one is a thousandth of the picture and teaches slowly."""
LARGEST_MOVE_PX = 8
"""Half the width of a latent, so that every content is seen at every place within one."""
EVALUATION_TASKS = (
    "button-press-topdown", "drawer-open", "door-open", "door-close", "button-press", "faucet-open", "faucet-close",
    "handle-press", "window-open", "coffee-button", "plate-slide", "drawer-close",
)  # fmt: skip
TRAINING_TASKS = tuple(name for name in sorted(INSTRUCTIONS) if name.removesuffix("-v3") not in EVALUATION_TASKS)
FIRST_LAYOUT = 5000
HELD_OUT_LAYOUTS = 2
"""Of each task, the last layouts are kept out of every training stage."""


@dataclass(frozen=True, kw_only=True)
class Video:
    """A window of `NUM_FRAMES` frames of one recorded run, `FRAME_INTERVAL` frames of a demonstration apart."""

    task: str
    instruction: str
    rgb: np.ndarray
    """[F H W 3] uint8."""
    uv_px: np.ndarray
    """[F 2] float32, the projected tool point."""
    visible: np.ndarray
    """[F] bool."""
    held_out: bool
    of_rig: bool
    """Seen by a camera of the standard rig, not by a random one."""


def record(folder: Path, layouts: int, seed: int, processes: int, say: Callable[[str], None]) -> None:
    """Nothing; one .npz per training task in `folder`, with `layouts` layouts, each seen by random cameras and those of the rig.

    Tasks whose file exists are left alone, so an interrupted recording continues.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [number for number, task in enumerate(TRAINING_TASKS) if not (folder / f"{task}.npz").exists()]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for task in pool.map(partial(_record_task, folder, layouts, seed), missing):
            say(f"recorded {task}")


def _record_task(folder: Path, layouts: int, seed: int, number: int) -> str:
    """The task's name; a window of `NUM_FRAMES` frames for each layout and camera is in its file."""
    task = TRAINING_TASKS[number]
    rng = np.random.default_rng([seed, number])
    arrays: dict[str, np.ndarray] = {}
    with Simulator(task, rig(SIZE_PX)) as simulator:
        for layout in range(layouts):
            cameras = tuple(random_camera(rng, SIZE_PX) for _ in range(RANDOM_CAMERAS)) + rig(SIZE_PX)
            held_out = layout >= layouts - HELD_OUT_LAYOUTS
            for view, window in enumerate(_windows(simulator, FIRST_LAYOUT + layout, cameras, rng)):
                key = f"{layout:03d}.{view}.{'held_out' if held_out else 'train'}"
                arrays |= {f"{key}.{name}": array for name, array in window.items()}
    with whole_file(folder / f"{task}.npz") as temporary, temporary.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)
    return task


def _windows(simulator: Simulator, layout: int, cameras: Sequence[Camera], rng: np.random.Generator) -> list[dict[str, np.ndarray]]:
    """One window of the expert's run for each camera, each begun somewhere else: rgb, uv_px, visible."""
    steps = FRAME_INTERVAL * STEPS_PER_FRAME
    last = STEPS_PER_FRAME * (len(rollout(simulator, layout, cameras=()).point_m) - 1)
    starts = rng.integers(0, max(1, last - (NUM_FRAMES - 1) * steps + 1), len(cameras))
    wanted = {view: start + steps * np.arange(NUM_FRAMES) for view, start in enumerate(starts)}
    rgb: list[list[np.ndarray]] = [[] for _ in cameras]
    points: list[list[np.ndarray]] = [[] for _ in cameras]
    state = simulator.reset(layout)
    for step in range(max(int(frames[-1]) for frames in wanted.values()) + 1):
        if step:
            state = simulator.step(simulator.expert_action())
        seen = [view for view, frames in wanted.items() if step in frames]
        if seen:
            for view, picture in zip(seen, simulator.render([cameras[view] for view in seen]), strict=True):
                rgb[view].append(picture)
                points[view].append(state.point_m)
    windows = []
    for view, camera in enumerate(cameras):
        uv_px, depth_m = camera.project(np.array(points[view]))
        visible = camera.inside(uv_px, depth_m)
        windows.append({"rgb": np.stack(rgb[view]), "uv_px": uv_px.astype(np.float32), "visible": visible})
    return windows


def load_videos(folder: Path) -> list[Video]:
    """The recorded windows, in the order of task, layout and view."""
    videos = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as arrays:
            for name in sorted(arrays.files):
                if name.endswith(".rgb"):
                    key = name.removesuffix(".rgb")
                    videos.append(
                        Video(
                            task=path.stem,
                            instruction=INSTRUCTIONS[path.stem],
                            rgb=arrays[name],
                            uv_px=arrays[f"{key}.uv_px"],
                            visible=arrays[f"{key}.visible"],
                            held_out=key.endswith("held_out"),
                            of_rig=int(key.split(".")[1]) >= RANDOM_CAMERAS,
                        )
                    )
    return videos


def window(video: Video, num_frames: int, interval: int, rng: np.random.Generator) -> np.ndarray:
    """[num_frames] indices of a random stretch of every `interval`-th frame."""
    start = rng.integers(0, len(video.rgb) - (num_frames - 1) * interval)
    return start + interval * np.arange(num_frames)


def track(num_frames: int, size_px: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(uv_px [F 2], visible [F]) of a smooth random walk; now and then it leaves the picture or was never in it."""
    if rng.random() < 0.04:
        return np.zeros((num_frames, 2), np.float32), np.zeros(num_frames, bool)
    speed = rng.choice([0.0, 1.0, 2.5, 5.0])
    velocity = rng.normal(0, 1, 2) * speed
    uv = [rng.uniform(0, size_px, 2)]
    for _ in range(num_frames - 1):
        velocity = 0.8 * velocity + rng.normal(0, 0.5, 2) * speed
        uv.append(uv[-1] + velocity)
    uv_px = np.array(uv, np.float32)
    return uv_px, np.all((uv_px >= 0) & (uv_px <= size_px), axis=-1)


def heat_pictures(uv_px: np.ndarray, visible: np.ndarray, size_px: int = SIZE_PX) -> np.ndarray:
    """[F H W 3] uint8 JET pictures of the heatmaps."""
    return heatmaps.colour(heat_of(uv_px, visible, size_px))


def heat_of(uv_px: np.ndarray, visible: np.ndarray, size_px: int = SIZE_PX) -> np.ndarray:
    """[F H W] float32 heatmaps of one point."""
    return heatmaps.render(uv_px, visible, size_px, size_px, SIGMA_PX)


def to_clips(pictures: np.ndarray) -> torch.Tensor:
    """[B 3 F H W] float32 in -1..1 of uint8 pictures [B F H W 3]."""
    return torch.from_numpy(pictures).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def vae_batch(videos: list[Video], num_rgb: int, num_heat: int, num_frames: int, rng: np.random.Generator) -> torch.Tensor:
    """[B 3 F H W] in -1..1: recorded RGB, moved by up to half a latent's width and mirrored now and then; after them heatmaps."""
    intervals = [interval for interval in (1, 2, 3) if (num_frames - 1) * interval < NUM_FRAMES]
    pictures = []
    for index in range(num_rgb + num_heat):
        video = videos[rng.integers(len(videos))]
        frames = window(video, num_frames, int(rng.choice(intervals)), rng)
        if index < num_rgb:
            pictures.append(_moved(video.rgb[frames], rng))
        elif rng.random() < 0.4:
            pictures.append(heat_pictures(video.uv_px[frames], video.visible[frames]))
        else:
            tracks = [track(num_frames, SIZE_PX, rng) for _ in range(rng.choice(SPOTS))]
            pictures.append(heatmaps.colour(np.max([heat_of(*one, SIZE_PX) for one in tracks], axis=0)))
    return to_clips(np.stack(pictures))


def _moved(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The pictures [F H W 3] moved by whole pixels, edges continued by reflection, mirrored in half of the cases."""
    down, right = rng.integers(0, 2 * LARGEST_MOVE_PX + 1, 2)
    margin = (LARGEST_MOVE_PX, LARGEST_MOVE_PX)
    wide = np.pad(pictures, ((0, 0), margin, margin, (0, 0)), mode="reflect")
    moved = wide[:, down : down + pictures.shape[1], right : right + pictures.shape[2]]
    return moved[:, :, :: -1 if rng.random() < 0.5 else 1]
