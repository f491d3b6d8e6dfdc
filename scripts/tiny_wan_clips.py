"""Pictures that the tiny Wan learns from: recorded single-view videos, synthetic heatmap tracks, and batches of both.

Knows no model. Every draw is a function of the generator it is given. Shapes: rgb uint8 [F H W 3], clips float32 [B 3 F H W] in -1..1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mvwan import heatmaps
from mvwan.files import whole_file
from mvwan.sim.metaworld import INSTRUCTIONS, Simulator, random_camera, rig, rollout

SIZE_PX = 128
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
HELD_OUT_LAYOUTS = 1
"""Of each task, the last layouts are kept out of every training stage."""


@dataclass(frozen=True, kw_only=True)
class Video:
    """One recorded single-view video."""

    task: str
    instruction: str
    rgb: np.ndarray
    """[F H W 3] uint8."""
    uv_px: np.ndarray
    """[F 2] float32, the projected tool point."""
    visible: np.ndarray
    """[F] bool."""
    held_out: bool


def record(folder: Path, layouts: int, seed: int, say: Callable[[str], None]) -> None:
    """Nothing; one .npz per training task in `folder`, with `layouts` layouts seen by one random camera and one of the rig each.

    Tasks whose file exists are left alone, so an interrupted recording continues.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, task in enumerate(TRAINING_TASKS):
        path = folder / f"{task}.npz"
        if path.exists():
            continue
        rng = np.random.default_rng([seed, number])
        arrays: dict[str, np.ndarray] = {}
        with Simulator(task, rig(SIZE_PX)) as simulator:
            for layout in range(layouts):
                cameras = (random_camera(rng, SIZE_PX), rig(SIZE_PX)[(layout + number) % 3])
                run = rollout(simulator, FIRST_LAYOUT + layout, cameras=cameras)
                held_out = layout >= layouts - HELD_OUT_LAYOUTS
                for view, camera in enumerate(cameras):
                    uv_px, depth_m = camera.project(run.point_m)
                    key = f"{layout}.{view}.{'held_out' if held_out else 'train'}"
                    arrays[f"{key}.rgb"] = run.rgb[view]
                    arrays[f"{key}.uv_px"] = uv_px.astype(np.float32)
                    arrays[f"{key}.visible"] = camera.inside(uv_px, depth_m)
        with whole_file(path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **arrays)
        say(f"recorded {task} ({number + 1} of {len(TRAINING_TASKS)})")


def load_videos(folder: Path) -> list[Video]:
    """The recorded videos, in the order of task, layout and view."""
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
                        )
                    )
    return videos


def window(video: Video, num_frames: int, interval: int, rng: np.random.Generator) -> np.ndarray:
    """[num_frames] indices of a random stretch; a video that is too short rests on its last frame."""
    start = rng.integers(0, max(1, len(video.rgb) - (num_frames - 1) * interval))
    return np.minimum(start + interval * np.arange(num_frames), len(video.rgb) - 1)


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
    pictures = []
    for index in range(num_rgb + num_heat):
        video = videos[rng.integers(len(videos))]
        frames = window(video, num_frames, int(rng.choice([1, 2, 4])), rng)
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
