"""Episodes written in the formats that other systems record, so that one demonstration can be read through each of them."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mvwan.batch import Episode
from mvwan.sim.metaworld import SETTLE_STEPS, STEPS_PER_FRAME, Simulator, rig

BOX_PX = 12.0


def write_mvtrack(root: Path, episodes: Sequence[Episode], splits: dict[str, str] | None = None) -> Path:
    """`root` with a scene per episode, `<word><number>`: the tracked point is the middle of a box, unseen where it is out of the picture.

    `splits` gives `train`, `val` or `test` by scene.
    """
    for number, episode in enumerate(episodes):
        scene = f"{episode.name.split('/')[0].split('-')[0]}{number}"
        rgb = episode.read_rgb(range(episode.num_frames))
        for view, camera in enumerate(episode.cameras):
            folder = root / scene / f"{scene}-{view + 1}"
            (folder / "img").mkdir(parents=True)
            uv_px, depth_m = camera.project(episode.point_m)
            seen = camera.inside(uv_px, depth_m)
            for frame, picture in enumerate(rgb[view]):
                Image.fromarray(picture).save(folder / "img" / f"{frame + 1}.jpg", quality=95, subsampling=0)
            corners = np.where(seen[:, None], uv_px - BOX_PX / 2, 0)
            lines = [f"{u:.3f},{v:.3f},{BOX_PX},{BOX_PX}\n" for u, v in corners]
            (folder / "groundtruth.txt").write_text("".join(lines))
            (folder / "invisible.txt").write_text(",".join(str(int(not flag)) for flag in seen))
        for name in [splits[scene]] if splits else []:
            with (root / f"{name}_split.txt").open("a") as file:
                file.writelines(f"{scene}-{view + 1}\n" for view in range(len(episode.cameras)))
    return root


def write_trail(root: Path, task: str, layouts: Sequence[int], size_px: int = 128) -> Path:
    """`root` with the folder `<task>` of the expert's runs on these layouts, trail_1 and up, as three depth cameras see them."""
    cameras = rig(size_px)
    with Simulator(task, cameras) as simulator:
        for number, layout in enumerate(layouts, 1):
            folder = root / simulator.task / f"trail_{number}"
            state, since_success, frame, step = simulator.reset(layout), 0, 0, 0
            while since_success <= SETTLE_STEPS:
                if step % STEPS_PER_FRAME == 0:
                    quaternion = np.array([1.0, 0.0, 0.0, 0.0])
                    _pickle(folder / "poses" / f"{frame:06d}.pkl", np.concatenate([state.point_m, quaternion]))
                    _pickle(folder / "gripper_states" / f"{frame:06d}.pkl", bool(state.gripper_open >= 0.8))
                    for place, (camera, rgb, depth_m) in enumerate(zip(cameras, simulator.render(), simulator.depth_m(), strict=True), 1):
                        _pickle(folder / f"3rd_{place}_pcd" / f"{frame:06d}.pkl", _in_camera(camera, depth_m))
                        _pickle(folder / f"3rd_{place}_bgr" / f"{frame:06d}.pkl", np.ascontiguousarray(rgb[..., ::-1]))
                    frame += 1
                state = simulator.step(simulator.expert_action())
                since_success += bool(since_success or state.success)
                step += 1
            extrinsics = {f"3rd_{place}": np.linalg.inv(camera.world_to_camera) for place, camera in enumerate(cameras, 1)}
            _pickle(folder / "extrinsics.pkl", extrinsics)
            (folder / "instruction.txt").write_text(simulator.instruction + "\n")
    return root


def _in_camera(camera: Any, depth_m: np.ndarray) -> np.ndarray:
    """[H W 3] float32 points in the camera's own frame."""
    rows, columns = np.mgrid[: depth_m.shape[0], : depth_m.shape[1]]
    slopes = camera.plane_coordinates(np.stack([columns + 0.25, rows + 0.25], axis=-1))
    return np.concatenate([slopes * depth_m[..., None], depth_m[..., None]], axis=-1).astype(np.float32)


def _pickle(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value))
