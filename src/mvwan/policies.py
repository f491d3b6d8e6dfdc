"""What decides where the arm goes next: a trained run, and the three controls that a success rate is shown beside.

`expert_waypoints` is the upper bound (the scripted expert's own path on this very layout, followed through waypoints), `replay` follows a
training demonstration without looking, `hold` stays. Knows no trial, no success and no file but demonstrations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np

from mvwan.batch import Episode
from mvwan.cameras import Camera
from mvwan.config import DataConfig
from mvwan.data.dataset import episodes_of, kept_out
from mvwan.data.transforms import resize
from mvwan.errors import MvwanError
from mvwan.files import sha256_json
from mvwan.sample import LoadedRun, predict
from mvwan.sim.execution import Plan, stay
from mvwan.sim.metaworld import CONTROL_STEPS_PER_SECOND, Simulator, State, rollout
from mvwan.sim.tasks import INSTRUCTIONS

PolicyName = Literal["predicted", "expert_waypoints", "replay", "hold"]
POLICIES: tuple[PolicyName, ...] = ("predicted", "expert_waypoints", "replay", "hold")


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """What a policy may look at."""

    rgb: np.ndarray
    """[V H W 3] uint8; no views when the policy is blind."""
    cameras: tuple[Camera, ...]
    state: State
    instruction: str


class Policy(Protocol):
    """One trial after another: `begin`, then `plan` whenever the last plan is used up."""

    looks: bool
    """Whether `plan` needs pictures."""

    def begin(self, task: str, layout_seed: int, widened: bool) -> None:
        """Nothing; a new trial starts."""
        ...

    def plan(self, seen: Seen) -> Plan:
        """Where to go next."""
        ...


class Predicted:
    """Follows the trained run: the first `execute` later frames of each prediction, then looks again."""

    looks = True

    def __init__(self, run: LoadedRun, stride: int, execute: int, denoise_steps: int, seed: int) -> None:
        self._run, self._stride, self._execute = run, stride, execute
        self._denoise_steps, self._seed = denoise_steps, seed
        self._numbers = [seed]
        self.residual_px: list[float] = []
        """Of each waypoint so far in this trial."""
        self.num_lost = 0
        """Waypoints of this trial whose point was not found, and which were left out."""

    def begin(self, task: str, layout_seed: int, widened: bool) -> None:
        """Nothing; the noise of a trial depends on the seed, its layout and the number of the plan."""
        self._numbers = [self._seed, layout_seed, 0]
        self.residual_px, self.num_lost = [], 0

    def plan(self, seen: Seen) -> Plan:
        """The predicted path from here. A frame without a point gives no waypoint; where none has one, the arm stays and looks again."""
        noise_seed = int(np.random.default_rng(self._numbers).integers(2**31))
        self._numbers[-1] += 1
        data = self._run.config.data
        # As training saw them: rendered at the recorded size, then brought to the run's.
        rgb, cameras = resize(seen.rgb[:, None], seen.cameras, data.height_px, data.width_px)
        prediction = predict(
            self._run,
            rgb[:, 0],
            seen.instruction,
            cameras,
            steps=self._denoise_steps,
            seed=noise_seed,
            point_m=seen.state.point_m,
            gripper_open=float(np.clip(seen.state.gripper_open, 0, 1)),
            heat_only=True,
        )
        later = slice(1, 1 + self._execute)
        point_m, residual_px = prediction.point_m[later], prediction.residual_px[later]
        found = np.isfinite(point_m).all(axis=-1)
        self.num_lost += int((~found).sum())
        self.residual_px += residual_px[found].tolist()
        if not found.any():
            return stay(seen.state.point_m, self._execute, self._stride)
        return Plan(point_m=point_m[found], gripper_open=prediction.gripper_open[later][found], stride=self._stride)


class ExpertWaypoints:
    """The scripted expert's own path on this layout, sampled at the stride."""

    looks = False

    def __init__(self, stride: int) -> None:
        self._stride = stride
        self._plan: Plan | None = None

    def begin(self, task: str, layout_seed: int, widened: bool) -> None:
        """Nothing; the expert has run on a copy of the layout."""
        with Simulator(task, (), widened) as simulator:
            run = rollout(simulator, layout_seed, steps_per_frame=1)
        self._plan = _path(run.point_m, run.gripper_open, self._stride, control_steps_per_frame=1)

    def plan(self, seen: Seen) -> Plan:
        """The whole path."""
        assert self._plan is not None, "begin comes first"
        return self._plan


class Replay:
    """A training demonstration of the task, drawn by seed and layout, followed without looking."""

    looks = False

    def __init__(self, demonstrations: Sequence[Episode], stride: int, seed: int) -> None:
        self._demonstrations, self._stride, self._seed = tuple(demonstrations), stride, seed
        self._chosen: Episode | None = None

    def begin(self, task: str, layout_seed: int, widened: bool) -> None:
        """Nothing; the demonstration is drawn. Raises `MvwanError` when the task has none."""
        fitting = [episode for episode in self._demonstrations if episode.instruction == INSTRUCTIONS[task]]
        if not fitting:
            raise MvwanError(f"task {task}: the run has no training demonstration of it to replay; choose among its own tasks with --task")
        self._chosen = fitting[int(np.random.default_rng([self._seed, layout_seed]).integers(len(fitting)))]

    def plan(self, seen: Seen) -> Plan:
        """The whole path."""
        assert self._chosen is not None, "begin comes first"
        steps = round(CONTROL_STEPS_PER_SECOND / self._chosen.fps)
        return _path(self._chosen.point_m, self._chosen.gripper_open, self._stride, steps)


class Hold:
    """Stays where it is."""

    looks = False

    def begin(self, task: str, layout_seed: int, widened: bool) -> None:
        """Nothing."""

    def plan(self, seen: Seen) -> Plan:
        """One waypoint: here."""
        return Plan(point_m=seen.state.point_m[None], gripper_open=np.full(1, np.nan, np.float32), stride=1, is_whole=True)


@dataclass(frozen=True, kw_only=True)
class Demonstrations:
    """What a run was trained on, as far as policies need it."""

    data: DataConfig
    seed: int

    @cached_property
    def training(self) -> tuple[Episode, ...]:
        """The episodes that are not held out."""
        episodes = episodes_of(self.data)
        validation = kept_out(episodes, self.seed, self.data.validation_share)
        return tuple(episode for episode in episodes if episode.name not in validation)

    @property
    def fingerprint(self) -> str:
        """64 hex digits that change with what a replay follows, and not with where it lies."""
        return sha256_json([[episode.name, episode.fingerprint] for episode in self.training])

    @property
    def are_widened(self) -> bool:
        """Whether they were recorded on widened layouts."""
        return any("/widened-" in episode.name for episode in self.training)

    @property
    def control_steps_per_frame(self) -> int:
        """Control steps from one recorded frame to the next. Raises `MvwanError` for other frame rates than Meta-World's."""
        fps = self.training[0].fps
        steps = CONTROL_STEPS_PER_SECOND / fps
        if steps != round(steps):
            raise MvwanError(
                f"{self.data.root}: {fps} frames per second; Meta-World's {CONTROL_STEPS_PER_SECOND} steps are no multiple of that"
            )
        return round(steps)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Meta-World's tasks among them, in the order of their names."""
        said = {episode.instruction for episode in self.training}
        return tuple(sorted(task for task, instruction in INSTRUCTIONS.items() if instruction in said))


def _path(point_m: np.ndarray, gripper_open: np.ndarray, stride: int, control_steps_per_frame: int) -> Plan:
    """Every `stride` control steps of a recorded path, and its last frame; frames without a point are left out."""
    every = max(1, round(stride / control_steps_per_frame))
    frames = np.unique([*range(every, len(point_m), every), len(point_m) - 1])
    frames = frames[np.isfinite(point_m[frames]).all(axis=-1)]
    return Plan(point_m=point_m[frames], gripper_open=np.asarray(gripper_open, np.float32)[frames], stride=stride, is_whole=True)
