"""Meta-World demonstrations seen by calibrated cameras: environments, scripted experts, rendering, recording. The only door to MuJoCo.

A control step is one command to the arm (80 per second); every second one is a frame, so that a demonstration has about 25 to 60
frames. The tracked point is the tool point, the mean of the two end-effector sites between the finger tips; `hand_m` is the wrist
that Meta-World commands, 45 mm above. Does not know the layout of a dataset on disk: `data/lerobot` writes it.
"""

import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mvwan.cameras import Camera, look_at
from mvwan.data.lerobot import LeRobotWriter, write_dataset
from mvwan.errors import MvwanError
from mvwan.sim.tasks import INSTRUCTIONS, WIDENED, task_name

_SYSTEM_LIBRARIES = "apt-get install -y libegl1 libegl-mesa0 libgl1-mesa-dri"


def no_renderer(cause: Exception) -> MvwanError:
    """The error to raise when OpenGL does not start, with the command that installs what it needs."""
    back_end = os.environ.get("MUJOCO_GL", "")
    return MvwanError(f"the renderer cannot start (MUJOCO_GL={back_end}: {cause}). Install its system libraries: {_SYSTEM_LIBRARIES}")


if sys.platform == "linux" and not os.environ.get("MUJOCO_GL") and not os.environ.get("DISPLAY"):
    os.environ["MUJOCO_GL"] = "egl"
try:
    import mujoco
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
    from metaworld.policies import ENV_POLICY_MAP
except ModuleNotFoundError as error:
    raise MvwanError(f"the simulator is not installed ({error}). Run `pip install 'mvwan[sim]'`.") from error
except Exception as error:  # a missing libEGL surfaces as ImportError, AttributeError or RuntimeError, by version
    raise no_renderer(error) from error

CONTROL_STEPS_PER_SECOND = 80
STEPS_PER_FRAME = 2
SETTLE_STEPS = 10
MAX_CONTROL_STEPS = 300
RESERVED_LAYOUTS = 900_000
_WORKSPACE_CENTRE_M = (0.0, 0.65, 0.17)
_OVERSAMPLING = 2
ACTION_NAMES = ("hand_dx_cm", "hand_dy_cm", "hand_dz_cm", "grip")

_VISIBLE_GOALS = ("reach-v3", "reach-wall-v3", "push-v3", "push-back-v3", "push-wall-v3", "pick-place-v3", "pick-place-wall-v3")


def pinhole(name: str, eye_m: Sequence[float], target_m: Sequence[float], up: Sequence[float], fov_deg: float, size_px: int) -> Camera:
    """A square pinhole camera of that vertical field of view with its axis through the middle of the picture."""
    focal_px = 0.5 * size_px / np.tan(np.radians(fov_deg) / 2)
    intrinsics = np.array([[focal_px, 0, size_px / 2], [0, focal_px, size_px / 2], [0, 0, 1]])
    return Camera(name=name, width_px=size_px, height_px=size_px, intrinsics=intrinsics, world_to_camera=look_at(eye_m, target_m, up))


def rig(size_px: int = 128) -> tuple[Camera, ...]:
    """The three standard cameras `left`, `right`, `top`: all keep the tool point in the picture on every expert step of all tasks."""
    _check_size(size_px)
    up, target = (0.0, 0.0, 1.0), (0.0, 0.65, 0.15)
    return (
        pinhole("left", (-1.0, 1.1, 0.75), target, up, 40, size_px),
        pinhole("right", (1.0, 1.1, 0.75), target, up, 40, size_px),
        pinhole("top", (0.0, 0.66, 1.75), (0.0, 0.65, 0.0), (0.0, 1.0, 0.0), 40, size_px),
    )


def random_camera(rng: np.random.Generator, size_px: int = 128, name: str = "random") -> Camera:
    """A camera somewhere around the table that looks at a spot near the middle of the workspace, tilted by up to 10 degrees."""
    _check_size(size_px)
    azimuth, elevation = rng.uniform(-np.pi, np.pi), np.radians(rng.uniform(15, 80))
    distance_m = rng.uniform(0.9, 1.7)
    target = np.array(_WORKSPACE_CENTRE_M) + rng.uniform(-0.08, 0.08, 3)
    eye = target + distance_m * np.array([np.cos(elevation) * np.sin(azimuth), np.cos(elevation) * np.cos(azimuth), np.sin(elevation)])
    tilt = np.radians(rng.uniform(-10, 10))
    up = (np.cos(azimuth) * np.sin(tilt), -np.sin(azimuth) * np.sin(tilt), np.cos(tilt))
    return pinhole(name, tuple(eye), tuple(target), up, rng.uniform(35, 55), size_px)


def _check_size(size_px: int) -> None:
    if size_px < 16 or size_px % 2:
        raise MvwanError(f"size_px={size_px}: pictures need an even side of at least 16 px. Set size_px, for example 128.")


def make_env(task: str, widened: bool = False) -> Any:
    """Meta-World's environment of a task with its goal in the observation, ready for `env.seed(layout); env.reset()`.

    `widened` spreads its layouts further; `MvwanError` for a task that `WIDENED` does not hold.
    """
    name = task_name(task)
    if widened and name not in WIDENED:
        raise MvwanError(f"task {name}: no widened layouts are known; there are for {', '.join(sorted(WIDENED))}")
    kind: Any = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{name}-goal-observable"]
    env = kind(seed=0)
    env._freeze_rand_vec = False
    env.seeded_rand_vec = True
    if widened:
        for axis, (low_m, high_m) in WIDENED[name].items():
            env._random_reset_space.low[axis], env._random_reset_space.high[axis] = low_m, high_m
    return env


@dataclass(frozen=True, kw_only=True)
class State:
    """What the robot measures at one control step."""

    point_m: np.ndarray
    """[3] float64, tool point in the world frame."""
    hand_m: np.ndarray
    """[3] float64, wrist."""
    gripper_open: float
    """0 closed .. 1 open, measured."""
    success: bool
    """Meta-World's own criterion, at this step."""


class Simulator:
    """One task with its environment, scripted expert and renderer; a context manager. Reuse it: a renderer takes 0.3 s to make."""

    def __init__(self, task: str, cameras: Sequence[Camera], widened: bool = False) -> None:
        self.task = task_name(task)
        self.instruction = INSTRUCTIONS[self.task]
        self.cameras = tuple(cameras)
        self._env = make_env(self.task, widened)
        self._expert: Any = None
        self._observation = np.zeros(0)
        self._success = False
        self._pictures = _Pictures(self._env, self.cameras, show_goal=self.task in _VISIBLE_GOALS) if self.cameras else None

    def __enter__(self) -> "Simulator":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Nothing; frees the renderer and the environment."""
        if self._pictures is not None:
            self._pictures.close()
        self._env.close()

    def reset(self, layout_seed: int) -> State:
        """The state at the start of a layout: same seed, same layout, whatever ran before."""
        self._env.seed(layout_seed)
        self._env.reset()
        # Meta-World moves some objects after it has computed where all things are: until the next step they were seen, in pictures and in
        # the expert's observation, where the layout before had them.
        bindings: Any = mujoco
        bindings.mj_forward(self._env.model, self._env.data)
        self._observation = self._env._get_obs()
        self._expert = ENV_POLICY_MAP[self.task]()
        self._success = False
        return self.state

    @property
    def state(self) -> State:
        """The state now."""
        return State(
            point_m=np.array(self._env.tcp_center, np.float64),
            hand_m=np.array(self._observation[:3], np.float64),
            gripper_open=float(self._observation[3]),
            success=self._success,
        )

    def expert_action(self) -> np.ndarray:
        """[4] float64 in -1..1: dx, dy, dz in centimetres and the grip command (1 closes) of the scripted expert."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            action = self._expert.get_action(self._observation)
        return np.clip(np.asarray(action, np.float64), -1, 1)

    def step(self, action: np.ndarray) -> State:
        """The state after one control step."""
        self._observation, _, _, _, info = self._env.step(action)
        self._success = bool(info["success"])
        return self.state

    def depth_m(self, cameras: Sequence[Camera] | None = None) -> np.ndarray:
        """[V H W] float32, metres along the optical axis, seen in the middle of the upper left quarter of each pixel of `render`."""
        if self._pictures is None:
            raise MvwanError(f"task {self.task}: made without cameras, so it has no depth. Give Simulator cameras.")
        return self._pictures.depth_m(self.cameras if cameras is None else cameras)

    def render(self, cameras: Sequence[Camera] | None = None) -> np.ndarray:
        """[V H W 3] uint8, one picture per camera (the simulator's own, or others of the same size); (0, 0, 0, 3) without cameras."""
        cameras = self.cameras if cameras is None else cameras
        if not cameras:
            return np.zeros((0, 0, 0, 3), np.uint8)
        if self._pictures is None:
            raise MvwanError("this simulator was made without cameras: pass cameras to Simulator to render")
        return self._pictures.render(cameras)


class _Renderer(mujoco.Renderer):
    """MuJoCo's renderer with the fields that its destructor reads, also when its constructor fails before setting them."""

    _gl_context: Any = None
    _mjr_context: Any = None


class _Pictures:
    """The renderer: any number of pinhole cameras of one size, rendered large and averaged down, without shadows and reflections."""

    def __init__(self, env: Any, cameras: Sequence[Camera], show_goal: bool) -> None:
        bindings: Any = mujoco  # its names come from a compiled module without types
        self._model, self._data = env.model, env.data
        self._size = cameras[0].height_px, cameras[0].width_px
        height, width = (side * _OVERSAMPLING for side in self._size)
        self._model.vis.quality.offsamples = 0
        self._model.vis.global_.offheight = max(height, self._model.vis.global_.offheight)
        self._model.vis.global_.offwidth = max(width, self._model.vis.global_.offwidth)
        for site in range(self._model.nsite):
            if not (show_goal and self._model.site(site).name == "goal"):
                self._model.site_rgba[site, 3] = 0
        try:
            self._renderer = _Renderer(self._model, height, width)
        except Exception as error:  # each OpenGL back end raises its own kind
            bindings.GLContext._context = None  # read by its destructor, which also runs when its constructor failed
            raise no_renderer(error) from error
        for flag in (bindings.mjtRndFlag.mjRND_SHADOW, bindings.mjtRndFlag.mjRND_REFLECTION):
            self._renderer.scene.flags[flag] = 0

    def render(self, cameras: Sequence[Camera]) -> np.ndarray:
        """[V H W 3] uint8."""
        return np.stack([self._picture(camera) for camera in cameras])

    def depth_m(self, cameras: Sequence[Camera]) -> np.ndarray:
        """[V H W] float32."""
        self._renderer.enable_depth_rendering()
        try:
            return np.stack([self._large(camera)[::_OVERSAMPLING, ::_OVERSAMPLING] for camera in cameras])
        finally:
            self._renderer.disable_depth_rendering()

    def _picture(self, camera: Camera) -> np.ndarray:
        return _halved(self._large(camera))

    def _large(self, camera: Camera) -> np.ndarray:
        """What the renderer gives for the camera, at twice its size."""
        height, width = self._size
        if (camera.height_px, camera.width_px) != self._size or camera.kind != "pinhole":
            raise MvwanError(
                f"camera {camera.name}: {camera.kind}, {camera.width_px}x{camera.height_px} px; the simulator renders pinhole cameras "
                f"of one size, here {width}x{height} px"
            )
        focal, centre = camera.intrinsics[[0, 1], [0, 1]], camera.intrinsics[:2, 2]
        if not (np.isclose(focal[0], focal[1]) and np.allclose(centre, (width / 2, height / 2)) and np.isclose(camera.intrinsics[0, 1], 0)):
            raise MvwanError(f"camera {camera.name}: the simulator needs square pixels and the optical axis in the middle of the picture")
        rotation = camera.world_to_camera[:3, :3]
        self._data.cam_xpos[0] = -rotation.T @ camera.world_to_camera[:3, 3]
        self._data.cam_xmat[0] = (rotation.T * (1, -1, -1)).ravel()
        self._model.cam_fovy[0] = np.degrees(2 * np.arctan(0.5 * height / focal[1]))
        self._renderer.update_scene(self._data, camera=0)
        return self._renderer.render()

    def close(self) -> None:
        """Nothing; frees the OpenGL context."""
        self._renderer.close()


def _halved(large: np.ndarray) -> np.ndarray:
    """[H W 3] uint8 of a picture [2H 2W 3]: a triangle filter, since a mere mean of four leaves the table's grain flickering.

    Weights 1 3 3 1 along both axes, edges repeated, in whole numbers: the same on every machine.
    """
    padded = np.pad(large.astype(np.uint16), ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[0:-2:2] + 3 * (padded[1:-2:2] + padded[2:-1:2]) + padded[3::2]
    both = rows[:, 0:-2:2] + 3 * (rows[:, 1:-2:2] + rows[:, 2:-1:2]) + rows[:, 3::2]
    return ((both + 32) // 64).astype(np.uint8)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollout:
    """One run of the scripted expert, every `STEPS_PER_FRAME`-th control step."""

    task: str
    layout_seed: int
    instruction: str
    cameras: tuple[Camera, ...]
    fps: float
    rgb: np.ndarray = field(repr=False)
    """[V F H W 3] uint8."""
    point_m: np.ndarray
    """[F 3] float64, tool point."""
    hand_m: np.ndarray
    """[F 3] float64, wrist."""
    gripper_open: np.ndarray
    """[F] float32, 0..1."""
    action: np.ndarray
    """[F 4] float32, mean command from this frame to the next; 0 on the last."""
    success: np.ndarray
    """[F] bool, the criterion is met at this frame."""

    @property
    def succeeded(self) -> bool:
        """Whether the expert ended the task."""
        return bool(self.success.any())


def rollout(
    task: str | Simulator,
    layout_seed: int,
    size_px: int = 128,
    cameras: Sequence[Camera] | None = None,
    steps_per_frame: int = STEPS_PER_FRAME,
) -> Rollout:
    """The expert's run on one layout, seen by `cameras` (None: the standard rig at `size_px`; none: numbers only, much faster).

    Pass a `Simulator` instead of a task name to reuse its renderer; `cameras` then may be any of its size. The run goes on for
    `SETTLE_STEPS` control steps after success and is given up after `MAX_CONTROL_STEPS`.
    """
    if isinstance(task, Simulator):
        return _run_expert(task, layout_seed, tuple(task.cameras if cameras is None else cameras), steps_per_frame)
    cameras = rig(size_px) if cameras is None else tuple(cameras)
    with Simulator(task, cameras) as simulator:
        return _run_expert(simulator, layout_seed, cameras, steps_per_frame)


def _run_expert(simulator: Simulator, layout_seed: int, cameras: tuple[Camera, ...], steps_per_frame: int) -> Rollout:
    state = simulator.reset(layout_seed)
    states, pictures, actions = [state], [simulator.render(cameras)], []
    success_step: int | None = None
    for control_step in range(1, MAX_CONTROL_STEPS + 1):
        action = simulator.expert_action()
        state = simulator.step(action)
        actions.append(action)
        if state.success and success_step is None:
            success_step = control_step
        if control_step % steps_per_frame == 0:
            states.append(state)
            pictures.append(simulator.render(cameras))
            if success_step is not None and control_step >= success_step + SETTLE_STEPS:
                break
    frames = len(states)
    grouped = np.array(actions[: (frames - 1) * steps_per_frame]).reshape(frames - 1, steps_per_frame, 4).mean(axis=1)
    return Rollout(
        task=simulator.task,
        layout_seed=layout_seed,
        instruction=simulator.instruction,
        cameras=cameras,
        fps=CONTROL_STEPS_PER_SECOND / steps_per_frame,
        rgb=np.stack(pictures, axis=1),
        point_m=np.array([state.point_m for state in states]),
        hand_m=np.array([state.hand_m for state in states]),
        gripper_open=np.array([state.gripper_open for state in states], np.float32),
        action=np.concatenate([grouped, np.zeros((1, 4))]).astype(np.float32),
        success=np.array([state.success for state in states]),
    )


@dataclass(frozen=True, kw_only=True)
class RecordReport:
    """What `record` wrote."""

    output: Path
    episodes: Mapping[str, int]
    """Task -> demonstrations kept."""
    failed: Mapping[str, int]
    """Task -> failed demonstrations: layouts on which the expert did not succeed, left out."""
    num_frames: int
    """Frames over all demonstrations, per camera."""
    seconds: float

    @property
    def seconds_per_demonstration(self) -> float:
        """Wall time per kept demonstration: physics, rendering of all cameras and encoding."""
        return self.seconds / sum(self.episodes.values())


def record(
    tasks: str | Sequence[str],
    episodes: int = 5,
    output: str | Path = "runs/demonstrations",
    seed: int = 0,
    size_px: int = 128,
    cameras: Sequence[Camera] | None = None,
    steps_per_frame: int = STEPS_PER_FRAME,
    progress: bool = True,
    widened: bool = False,
) -> RecordReport:
    """A report of the LeRobot v3 dataset written to `output`: `episodes` successful demonstrations of each task.

    Layouts have the seeds `seed`, `seed + 1`, ...; one on which the expert fails is left out and counted. The same arguments give
    the same bytes. `widened` layouts lie further apart. Raises `MvwanError` for an unknown task, an output that exists, a reserved
    layout seed (900000 and up is for final evaluation), or an expert that fails too often; nothing is written then.
    """
    names = list(dict.fromkeys(task_name(task) for task in ([tasks] if isinstance(tasks, str) else tasks)))
    attempts = 3 * episodes + 10
    _check_record(names, episodes, seed, attempts, steps_per_frame)
    views = rig(size_px) if cameras is None else tuple(cameras)
    started, failed, num_frames = time.monotonic(), dict.fromkeys(names, 0), 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    fps = CONTROL_STEPS_PER_SECOND // steps_per_frame
    with (
        write_dataset(output, cameras=views, fps=fps, action_names=ACTION_NAMES, robot_type="sawyer") as writer,
        Progress(*columns, disable=not progress) as bar,
    ):
        line = bar.add_task("recording", total=episodes * len(names))
        for name in names:
            bar.update(line, description=f"recording {name}")
            with Simulator(name, views, widened) as simulator:
                kept = 0
                for layout_seed in range(seed, seed + attempts):
                    run = rollout(simulator, layout_seed, steps_per_frame=steps_per_frame)
                    if not run.succeeded:
                        failed[name] += 1
                        continue
                    _add(writer, run, widened)
                    num_frames += len(run.point_m)
                    bar.advance(line)
                    kept += 1
                    if kept == episodes:
                        break
                else:
                    raise MvwanError(f"task {name}: only {kept} of {attempts} runs succeeded, {episodes} are needed. Set fewer episodes.")
    return RecordReport(
        output=Path(output),
        episodes=dict.fromkeys(names, episodes),
        failed=failed,
        num_frames=num_frames,
        seconds=time.monotonic() - started,
    )


def _check_record(names: Sequence[str], episodes: int, seed: int, attempts: int, steps_per_frame: int) -> None:
    if not names:
        raise MvwanError(f"no task given. Name one or more of: {', '.join(sorted(INSTRUCTIONS))}")
    if episodes < 1:
        raise MvwanError(f"episodes={episodes}: at least 1 demonstration per task. Set episodes.")
    if seed < 0 or seed + attempts > RESERVED_LAYOUTS:
        raise MvwanError(
            f"seed={seed}: layouts run from seed to seed + {attempts - 1} and must stay within 0 to {RESERVED_LAYOUTS - 1}; "
            f"{RESERVED_LAYOUTS} and up is reserved for final evaluation. Set a seed up to {RESERVED_LAYOUTS - attempts}."
        )
    if steps_per_frame < 1 or CONTROL_STEPS_PER_SECOND % steps_per_frame:
        raise MvwanError(
            f"steps_per_frame={steps_per_frame}: must divide {CONTROL_STEPS_PER_SECOND}, for example 2 for 40 frames per second. "
            "Set steps_per_frame."
        )


def _add(writer: LeRobotWriter, run: Rollout, widened: bool) -> None:
    writer.add_episode(
        name=f"{run.task}/{'widened-' if widened else ''}{run.layout_seed:06d}",
        instruction=run.instruction,
        layout_seed=run.layout_seed,
        rgb=run.rgb,
        point_m=run.point_m,
        hand_m=run.hand_m,
        gripper_open=run.gripper_open,
        action=run.action,
        success=run.success,
    )
