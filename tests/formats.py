"""Episodes written in the formats that other systems record, so that one demonstration can be read through each of them."""

import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from mvwan.batch import Episode
from mvwan.cameras import Camera, look_at
from mvwan.sim.metaworld import SETTLE_STEPS, STEPS_PER_FRAME, Simulator, State, rig

BOX_PX = 12.0
RLBENCH_CAMERAS = {"left": "left_shoulder", "right": "right_shoulder", "top": "overhead"}
"""Our rig -> what RLBench calls such cameras."""


def write_mvtrack(root: Path, episodes: Sequence[Episode], splits: dict[str, str] | None = None) -> Path:
    """`root` with a scene per episode, `<word><number>`: the tracked point is the middle of a box, unseen where it is out of the picture.

    `splits` gives `train`, `val` or `test` by scene; a scene that it does not name is in no list.
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
        for name in [splits[scene]] if splits and scene in splits else []:
            with (root / f"{name}_split.txt").open("a") as file:
                file.writelines(f"{scene}-{view + 1}\n" for view in range(len(episode.cameras)))
    return root


def write_trail(root: Path, task: str, layouts: Sequence[int], size_px: int = 128) -> Path:
    """`root` with the folder `<task>` of the expert's runs on these layouts, trail_1 and up, as three depth cameras see them."""
    cameras = rig(size_px)
    with Simulator(task, cameras) as simulator:
        for number, layout in enumerate(layouts, 1):
            folder = root / simulator.task / f"trail_{number}"
            for frame, state in enumerate(_frames(simulator, layout)):
                quaternion = np.array([1.0, 0.0, 0.0, 0.0])
                _pickle(folder / "poses" / f"{frame:06d}.pkl", np.concatenate([state.point_m, quaternion]))
                _pickle(folder / "gripper_states" / f"{frame:06d}.pkl", bool(state.gripper_open >= 0.8))
                for place, (camera, rgb, depth_m) in enumerate(zip(cameras, simulator.render(), simulator.depth_m(), strict=True), 1):
                    _pickle(folder / f"3rd_{place}_pcd" / f"{frame:06d}.pkl", _in_camera(camera, depth_m))
                    _pickle(folder / f"3rd_{place}_bgr" / f"{frame:06d}.pkl", np.ascontiguousarray(rgb[..., ::-1]))
            extrinsics = {f"3rd_{place}": np.linalg.inv(camera.world_to_camera) for place, camera in enumerate(cameras, 1)}
            _pickle(folder / "extrinsics.pkl", extrinsics)
            (folder / "instruction.txt").write_text(simulator.instruction + "\n")
    return root


def write_rlbench(root: Path, task: str, layouts: Sequence[int], size_px: int = 128) -> Path:
    """`root` with PerAct's folders of the expert's runs on these layouts, episode0 and up, seen by the rig and by a camera on the hand."""
    cameras = rig(size_px)
    with Simulator(task, cameras) as simulator:
        for number, layout in enumerate(layouts):
            views: dict[str, list[Camera]] = {name: [] for name in (*RLBENCH_CAMERAS.values(), "wrist")}
            states, rgb = [], []
            for state in _frames(simulator, layout):
                hand = look_at(np.add(state.hand_m, (0, 0.05, 0.15)).tolist(), state.point_m.tolist(), (0, 1, 0))
                seen_by = (*cameras, replace(cameras[0], name="wrist", world_to_camera=hand))
                for camera in seen_by:
                    views[RLBENCH_CAMERAS.get(camera.name, camera.name)].append(camera)
                states.append(state)
                rgb.append(simulator.render(seen_by))
            write_rlbench_episode(
                root / simulator.task / "all_variations" / "episodes" / f"episode{number}",
                views,
                np.stack(rgb, axis=1),
                np.array([state.point_m for state in states]),
                [state.gripper_open for state in states],
                [simulator.instruction, "another way to say it"],
            )
    return root


def write_rlbench_episode(
    folder: Path,
    views: Mapping[str, Sequence[Camera]],
    rgb: np.ndarray,
    point_m: np.ndarray,
    gripper_open: Sequence[float],
    descriptions: Sequence[str] | None = None,
    quaternion_xyzw: Sequence[float] = (0.0, 0.0, 0.0, 1.0),
    protocol: int = 4,
) -> Path:
    """`folder` with one demonstration: of each view its camera per frame, its pictures rgb [V F H W 3], and depth that is no picture.

    The cameras' axes are turned round as RLBench has them, so that focal lengths are negative.
    """
    turn = np.diag([-1.0, -1.0, 1.0, 1.0])
    with rlbench_classes() as (demo_class, observation_class):
        demo = demo_class()
        demo._observations, demo.random_seed = [], np.random.RandomState(0).get_state()
        for frame, point in enumerate(point_m):
            observation = observation_class()
            observation.gripper_pose, observation.gripper_open = np.array([*point, *quaternion_xyzw]), float(gripper_open[frame])
            observation.joint_positions, observation.front_rgb, observation.misc = np.zeros(7), None, {"variation_index": 0}
            for name, cameras in views.items():
                camera = cameras[frame]
                observation.misc[f"{name}_camera_extrinsics"] = np.linalg.inv(turn @ camera.world_to_camera)
                observation.misc[f"{name}_camera_intrinsics"] = camera.intrinsics @ np.diag([-1.0, -1.0, 1.0])
                observation.misc[f"{name}_camera_near"] = 0.01
            demo._observations.append(observation)
        _pickle(folder / "low_dim_obs.pkl", demo, protocol)
    for name, pictures in zip(views, rgb, strict=True):
        for kind in ("rgb", "depth"):
            (folder / f"{name}_{kind}").mkdir()
        for frame, picture in enumerate(pictures):
            Image.fromarray(picture).save(folder / f"{name}_rgb" / f"{frame}.png")
            (folder / f"{name}_depth" / f"{frame}.png").write_bytes(b"not read")
    _pickle(folder / "variation_number.pkl", 0)
    if descriptions is not None:
        _pickle(folder / "variation_descriptions.pkl", list(descriptions))
    return folder


@contextmanager
def rlbench_classes() -> Iterator[tuple[type[Any], type[Any]]]:
    """Stand-ins for RLBench's Demo and Observation, which can be pickled under their names within the block and nowhere else."""
    names = {"rlbench.demo": "Demo", "rlbench.backend.observation": "Observation"}
    modules = {module: ModuleType(module) for module in ("rlbench", "rlbench.backend", *names)}
    classes = [type(name, (), {"__module__": module}) for module, name in names.items()]
    for stand_in in classes:
        setattr(modules[stand_in.__module__], stand_in.__name__, stand_in)
    sys.modules.update(modules)
    try:
        yield classes[0], classes[1]
    finally:
        for module in modules:
            del sys.modules[module]


def _frames(simulator: Simulator, layout: int) -> Iterator[State]:
    """The states of the expert's run that are recorded; the simulator stands in each while it is looked at."""
    state, since_success, step = simulator.reset(layout), 0, 0
    while since_success <= SETTLE_STEPS:
        if step % STEPS_PER_FRAME == 0:
            yield state
        state = simulator.step(simulator.expert_action())
        since_success += bool(since_success or state.success)
        step += 1


def _in_camera(camera: Any, depth_m: np.ndarray) -> np.ndarray:
    """[H W 3] float32 points in the camera's own frame."""
    rows, columns = np.mgrid[: depth_m.shape[0], : depth_m.shape[1]]
    slopes = camera.plane_coordinates(np.stack([columns + 0.25, rows + 0.25], axis=-1))
    return np.concatenate([slopes * depth_m[..., None], depth_m[..., None]], axis=-1).astype(np.float32)


def _pickle(path: Path, value: Any, protocol: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value, protocol))
