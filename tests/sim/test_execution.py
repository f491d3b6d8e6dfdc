"""The arm goes where it is told, within a centimetre, in the real simulator; trials end when they should."""

import numpy as np
import pytest

from mvwan.errors import MvwanError
from mvwan.policies import ExpertWaypoints, Seen
from mvwan.sim.execution import ARRIVED_M, DWELL_STEPS, SETTLE_STEPS, Arm, Plan
from mvwan.sim.metaworld import Simulator

TASK, LAYOUT = "button-press-topdown-v3", 800_001


@pytest.fixture(scope="module")
def blind():
    with Simulator(TASK, ()) as simulator:
        yield simulator


def plan(point_m, stride=4, opening=np.nan, **changes):
    points = np.atleast_2d(point_m).astype(np.float64)
    return Plan(point_m=points, gripper_open=np.full(len(points), opening, np.float32), stride=stride, **changes)


def test_every_waypoint_of_a_path_is_reached_within_a_centimetre(blind):
    start = blind.reset(LAYOUT).point_m
    path = start + np.linspace(0, 1, 9)[1:, None] * np.array([0.1, 0.08, 0.05])
    arm = Arm(blind, 500)
    for waypoint in path:
        arm.follow(plan(waypoint))
        assert np.linalg.norm(blind.state.point_m - waypoint) < ARRIVED_M + 0.003
    assert not arm.is_done


def test_a_waypoint_is_held_for_its_stride_and_waited_for_no_longer_than_allowed(blind):
    here = blind.reset(LAYOUT).point_m
    arm = Arm(blind, 500)
    arm.follow(plan(here, stride=7))
    assert arm.num_steps == 7
    arm.follow(plan(here + np.array([0, 0, 5.0]), stride=3))
    assert arm.num_steps == 7 + 3 + 15


def test_an_arm_that_is_held_up_goes_on_to_the_next_waypoint(blind):
    table = blind.reset(LAYOUT).point_m * (1, 1, 0)
    arm = Arm(blind, 500)
    arm.follow(plan(table + np.array([0, 0, 0.005]), stride=40))
    before = arm.num_steps
    arm.follow(plan(table - np.array([0, 0, 0.05]), stride=2))
    assert blind.state.point_m[2] > -0.02, "the table holds it up"
    assert arm.num_steps - before < 2 + 15


def test_the_gripper_closes_when_told_waits_and_keeps_its_command_where_none_is_known(blind):
    here = blind.reset(LAYOUT).point_m
    arm = Arm(blind, 500)
    arm.follow(plan(here, stride=2, opening=1.0))
    assert (arm.num_steps, blind.state.gripper_open) == (2, pytest.approx(1, abs=0.05))
    arm.follow(plan(here, stride=2, opening=0.3))
    assert arm.num_steps == 2 + 2 + DWELL_STEPS
    arm.follow(plan(np.repeat(here[None], 6, 0), stride=4))
    assert blind.state.gripper_open < 0.5
    arm.follow(plan(np.repeat(here[None], 6, 0), stride=4, opening=0.95))
    assert blind.state.gripper_open > 0.9


def test_a_whole_plan_settles_on_its_last_waypoint_and_the_limit_ends_a_trial(blind):
    here = blind.reset(LAYOUT).point_m
    arm = Arm(blind, 500)
    arm.follow(plan(here, stride=1, is_whole=True))
    assert arm.num_steps == 1 + SETTLE_STEPS
    blind.reset(LAYOUT)
    steps: list[str] = []
    short = Arm(blind, 5, watch=lambda simulator: steps.append(simulator.task))
    short.follow(plan(here, stride=50))
    assert short.is_done and not short.succeeded
    assert (short.num_steps, steps) == (5, [TASK] * 5)


@pytest.mark.parametrize("task", ["button-press-topdown-v3", "door-close-v3"])
def test_the_experts_waypoints_solve_the_task_and_a_trial_ends_with_its_success(task):
    with Simulator(task, ()) as simulator:
        simulator.reset(LAYOUT)
        policy = ExpertWaypoints(4)
        policy.begin(task, LAYOUT, widened=False)
        pictures = np.zeros((0, 0, 0, 3), np.uint8)
        arm = Arm(simulator, 500)
        arm.follow(policy.plan(Seen(rgb=pictures, cameras=(), state=simulator.state, instruction=simulator.instruction)))
        assert arm.succeeded and arm.num_steps < 500 and simulator.state.success


@pytest.mark.parametrize(
    ("point_m", "openings", "stride", "message"),
    [
        (np.array([[0, np.nan, 0]]), 1, 4, "point_m.*finite"),
        (np.zeros((2, 2)), 2, 4, r"point_m is \(2, 2\)"),
        (np.zeros((2, 3)), 1, 4, r"gripper_open is \(1,\), needs \(2,\)"),
        (np.zeros((1, 3)), 1, 0, "stride=0"),
        (np.zeros((0, 3)), 0, 4, "no waypoint"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(point_m, openings, stride, message):
    with pytest.raises(MvwanError, match=message):
        Plan(point_m=point_m, gripper_open=np.ones(openings, np.float32), stride=stride).check()
