"""Tool points -> control steps: drives the arm of a `Simulator` along a plan. Knows no model, no demonstration and no file.

Meta-World commands the wrist: an action of 1 moves it by at most 1 cm per control step. The wrist of a waypoint is the tool point plus
the distance of both at the start, since the orientation never changes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mvwan.errors import MvwanError
from mvwan.sim.metaworld import Simulator, State

GAIN_PER_M = 25.0
"""Action per metre of distance, before it is cut to -1..1. Meta-World's experts take 10, towards goals that are far; waypoints are near."""
ARRIVED_M = 0.01
PATIENCE_STEPS = 15
"""Beyond its stride, a waypoint is waited for so long at most."""
BLOCKED_M = 0.001
"""An arm that came nearer by less in `BLOCKED_STEPS` is held up by something: the next waypoint pushes on, or looks again."""
BLOCKED_STEPS = 3
DWELL_STEPS = 8
"""After the grip command changed."""
SETTLE_STEPS = 25
"""On the last waypoint of a plan that ends."""
CLOSED_BELOW = 0.8
"""Openings below this are a closed gripper: fingers that hold something stay apart."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Where the tool point shall go next."""

    point_m: np.ndarray
    """[K 3] float64, world frame, metres, all finite; K at least 1: to stay is a waypoint too."""
    gripper_open: np.ndarray
    """[K] float32, 0 closed .. 1 open; NaN leaves the gripper as it is."""
    stride: int
    """Control steps from one waypoint to the next."""
    is_whole: bool = False
    """Nothing comes after its last waypoint."""

    def check(self) -> "Plan":
        """Itself, or `MvwanError` that names the field at fault."""
        if self.point_m.ndim != 2 or self.point_m.shape[1] != 3 or not np.isfinite(self.point_m).all():
            raise MvwanError(f"plan: point_m is {self.point_m.shape}, needs (K, 3) finite metres; leave out waypoints that are not known")
        if not len(self.point_m):
            raise MvwanError("plan: no waypoint, and so no step to make. Give the place where the arm is to stay there.")
        if self.gripper_open.shape != (len(self.point_m),):
            raise MvwanError(f"plan: gripper_open is {self.gripper_open.shape}, needs ({len(self.point_m)},), NaN where it is not known")
        if self.stride < 1:
            raise MvwanError(f"plan: stride={self.stride} control steps; at least 1")
        return self


def stay(point_m: np.ndarray, waypoints: int, stride: int) -> Plan:
    """A plan of so many waypoints at point_m [3], the gripper as it is."""
    return Plan(point_m=np.repeat(point_m[None], waypoints, axis=0), gripper_open=np.full(waypoints, np.nan, np.float32), stride=stride)


class Arm:
    """The arm during one trial: it remembers the grip command from plan to plan and counts control steps.

    `watch` is called with the simulator after every control step. `limit` control steps end the trial.
    """

    def __init__(self, simulator: Simulator, limit: int, watch: Callable[[Simulator], None] | None = None) -> None:
        self.num_steps = 0
        self.succeeded = False
        self._simulator, self._limit, self._watch = simulator, limit, watch
        self._hand_from_point_m = simulator.state.hand_m - simulator.state.point_m
        self._is_closed = False

    @property
    def is_done(self) -> bool:
        """Meta-World's criterion was met, or the control steps are used up."""
        return self.succeeded or self.num_steps >= self._limit

    def follow(self, plan: Plan) -> None:
        """Nothing; every waypoint in turn, until the trial is done."""
        plan.check()
        for point_m, gripper_open in zip(plan.point_m, plan.gripper_open, strict=True):
            hand_m = point_m + self._hand_from_point_m
            is_closed = self._is_closed if np.isnan(gripper_open) else bool(gripper_open < CLOSED_BELOW)
            self._hold(hand_m, plan.stride)
            self._wait(hand_m)
            # Once there: a gripper that toggles on its way lets go too early.
            toggles, self._is_closed = is_closed != self._is_closed, is_closed
            self._hold(hand_m, DWELL_STEPS if toggles else 0)
            if self.is_done:
                return
        if plan.is_whole and len(plan.point_m):
            self._hold(plan.point_m[-1] + self._hand_from_point_m, SETTLE_STEPS)

    def _wait(self, hand_m: np.ndarray) -> None:
        left_m = [float(np.linalg.norm(hand_m - self._simulator.state.hand_m))]
        while left_m[-1] >= ARRIVED_M and len(left_m) <= PATIENCE_STEPS:
            if len(left_m) > BLOCKED_STEPS and left_m[-1 - BLOCKED_STEPS] - left_m[-1] < BLOCKED_M:
                return
            self._hold(hand_m, 1)
            left_m.append(float(np.linalg.norm(hand_m - self._simulator.state.hand_m)))

    def _hold(self, hand_m: np.ndarray, steps: int) -> None:
        for _ in range(steps):
            if self.is_done:
                return
            move = np.clip(GAIN_PER_M * (hand_m - self._simulator.state.hand_m), -1, 1)
            state: State = self._simulator.step(np.append(move, 1.0 if self._is_closed else -1.0))
            self.num_steps += 1
            self.succeeded = self.succeeded or state.success
            if self._watch is not None:
                self._watch(self._simulator)
