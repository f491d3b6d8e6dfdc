"""Demonstrations are repeatable, seen by cameras that tell the truth, and recorded only when they succeed."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from mvwan.cameras import Camera
from mvwan.data.lerobot import read_lerobot
from mvwan.errors import MvwanError
from mvwan.sim import metaworld
from mvwan.sim.metaworld import (
    RESERVED_LAYOUTS,
    SETTLE_STEPS,
    Simulator,
    pinhole,
    random_camera,
    record,
    rig,
    rollout,
)
from mvwan.sim.tasks import INSTRUCTIONS, WIDENED, task_name

FAST = "handle-press-v3"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    root = tmp_path_factory.mktemp("recorded") / "data"
    return root, record(FAST, 2, root, seed=5, size_px=32, progress=False)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(recorded, tmp_path):
    root, _ = recorded
    record(FAST, 2, tmp_path / "same", seed=5, size_px=32, progress=False)
    files = [path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file()]
    assert {file.suffix for file in files} >= {".parquet", ".json", ".mp4"}
    for file in files:
        assert (tmp_path / "same" / file).read_bytes() == (root / file).read_bytes(), file
    with Simulator(FAST, ()) as simulator:
        points = [rollout(simulator, layout).point_m for layout in (5, 6)]
    assert not np.array_equal(points[0][:20], points[1][:20])


def test_a_recording_holds_what_happened(recorded):
    root, report = recorded
    episodes = read_lerobot(root)
    assert (report.episodes, report.failed) == ({FAST: 2}, {FAST: 0})
    assert report.num_frames == sum(episode.num_frames for episode in episodes)
    assert report.seconds_per_demonstration == report.seconds / 2
    assert [episode.name for episode in episodes] == [f"{FAST}/000005", f"{FAST}/000006"]
    episode, run = episodes[1], rollout(FAST, 6, 32)
    assert (episode.instruction, episode.fps) == (INSTRUCTIONS[FAST], 40)
    np.testing.assert_allclose(episode.point_m, run.point_m, atol=1e-7)
    np.testing.assert_array_equal(episode.extra["action"], run.action)
    np.testing.assert_allclose(episode.point_m, episode.extra["hand_m"], atol=0.06)
    assert episode.extra["success"].any()
    assert 0 <= episode.gripper_open.min() <= episode.gripper_open.max() <= 1
    assert np.abs(episode.read_rgb(range(episode.num_frames)).astype(int) - run.rgb).mean() < 2
    assert json.loads((root / "meta/info.json").read_text())["robot_type"] == "sawyer"


def test_a_layout_does_not_depend_on_what_ran_before():
    for task in (FAST, "door-close-v3", "push-v3"):
        with Simulator(task, ()) as fresh, Simulator(task, ()) as used:
            for _ in range(2):
                used.reset(40)
                for _ in range(30):
                    used.step(used.expert_action())
            points = []
            for simulator in (fresh, used):
                start = simulator.reset(3).point_m
                points.append([start, *(simulator.step(simulator.expert_action()).point_m for _ in range(20))])
            np.testing.assert_array_equal(*points)


@pytest.mark.parametrize("task", ["drawer-open-v3", "faucet-open-v3", "window-open-v3", "plate-slide-v3"])
def test_the_first_picture_shows_the_new_layout_and_not_the_one_before(task):
    with Simulator(task, rig(64)) as simulator:
        simulator.reset(3)
        first, moved = simulator.render(), [simulator.step(np.zeros(4)) for _ in range(2)]
        assert len(moved) == 2
        later = simulator.render()
        simulator.reset(11)
        other = simulator.render()
        simulator.reset(3)
        assert np.array_equal(simulator.render(), first)
        assert np.abs(first.astype(int) - other).mean() > 0.4, "the objects stand elsewhere"
        assert np.abs(first.astype(int) - later).mean() < 0.5, "nothing but the arm has moved yet"


def test_the_rig_keeps_the_tool_point_in_every_picture():
    cameras = rig(128)
    assert [camera.name for camera in cameras] == ["left", "right", "top"]
    for task in ("door-close-v3", "door-open-v3", "lever-pull-v3", "sweep-v3", "button-press-topdown-v3", "shelf-place-v3"):
        with Simulator(task, ()) as simulator:
            state = simulator.reset(1)
            for _ in range(120):
                for camera in cameras:
                    uv, depth = camera.project(state.point_m)
                    assert camera.inside(uv, depth), (task, camera.name, uv)
                    assert np.all((uv > 4) & (uv < 124)), (task, camera.name, uv)
                state = simulator.step(simulator.expert_action())


def test_pictures_and_cameras_agree():
    """Each end-effector site, made visible in an otherwise empty scene, appears where the camera projects it."""
    tilted = pinhole("tilted", (0.35, 1.4, 0.5), (0.1, 0.5, 0.2), (0.3, 0.0, 1.0), 55, 128)
    cameras = [*rig(128), tilted, pinhole("close", (-0.3, 1.0, 0.6), (0.0, 0.6, 0.1), (0.0, 0.0, 1.0), 30, 128)]
    rows, columns = np.mgrid[0:128, 0:128] + 0.5
    with Simulator(FAST, cameras) as simulator:
        simulator.reset(0)
        for _ in range(12):
            simulator.step(simulator.expert_action())
        model = simulator._env.model
        model.geom_rgba[:, 3] = model.mat_rgba[:, 3] = 0
        plain = simulator.render().astype(int)
        sites = [simulator._env.data.site(name).xpos.copy() for name in ("rightEndEffector", "leftEndEffector")]
        np.testing.assert_allclose(simulator.state.point_m, np.mean(sites, axis=0))
        for name, position in zip(("rightEndEffector", "leftEndEffector"), sites, strict=True):
            model.site(name).rgba[:] = (0, 1, 0, 1)
            for camera, before, after in zip(cameras, plain, simulator.render().astype(int), strict=True):
                changed = np.abs(after - before).sum(axis=-1)
                assert changed.any(), camera.name
                seen = np.array([(columns * changed).sum(), (rows * changed).sum()]) / changed.sum()
                uv, _ = camera.project(position)
                assert np.abs(seen - uv).max() < 0.25, (camera.name, seen, uv)
            model.site(name).rgba[3] = 0


def test_only_tasks_whose_goal_is_nothing_but_a_mark_show_it():
    for task, shown in (("reach-v3", 1), ("drawer-open-v3", 0)):
        with Simulator(task, rig(32)) as simulator:
            assert (simulator._env.model.site_rgba[:, 3] > 0).sum() == shown


def test_a_run_settles_after_success_and_failures_are_left_out(tmp_path, monkeypatch):
    run = rollout(FAST, 0, cameras=rig(32))
    assert run.rgb.shape == (3, len(run.point_m), 32, 32, 3)
    first = int(run.success.argmax())
    assert SETTLE_STEPS // 2 <= len(run.success) - 1 - first <= SETTLE_STEPS // 2 + 1
    assert np.abs(run.action).max() <= 1
    assert not run.action[-1].any()
    with Simulator(FAST, ()) as simulator:
        lengths = {seed: 2 * int(rollout(simulator, seed).success.argmax()) for seed in range(3)}
    slow = max(lengths, key=lambda seed: lengths[seed])
    monkeypatch.setattr(metaworld, "MAX_CONTROL_STEPS", lengths[slow] - 2)
    report = record(FAST, 2, tmp_path / "data", seed=0, size_px=32, progress=False)
    assert report.failed[FAST] >= 1
    names = [episode.name for episode in read_lerobot(tmp_path / "data")]
    assert len(names) == 2
    assert f"{FAST}/{slow:06d}" not in names
    monkeypatch.setattr(metaworld, "MAX_CONTROL_STEPS", 4)
    with pytest.raises(MvwanError, match=rf"task {FAST}: only 0 of 13 runs succeeded"):
        record(FAST, 1, tmp_path / "none", size_px=16, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_every_task_has_an_expert_and_a_sentence():
    assert set(INSTRUCTIONS) == set(metaworld.ENV_POLICY_MAP)
    assert len(set(INSTRUCTIONS.values())) == len(INSTRUCTIONS)
    assert all(sentence.endswith(".") and sentence[0].isupper() for sentence in INSTRUCTIONS.values())
    assert task_name("drawer-open") == task_name("drawer-open-v3") == "drawer-open-v3"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": "drawer-opne"}, r"no such task\. Did you mean 'drawer-open-v3'\?"),
        ({"tasks": []}, "no task given"),
        ({"episodes": 0}, "episodes=0: at least 1"),
        ({"seed": RESERVED_LAYOUTS}, "seed=900000: .*reserved for final evaluation"),
        ({"seed": RESERVED_LAYOUTS - 3}, "reserved for final evaluation"),
        ({"seed": -1}, "seed=-1"),
        ({"steps_per_frame": 3}, "steps_per_frame=3: must divide 80"),
        ({"size_px": 15}, "size_px=15: pictures need an even side"),
    ],
)
def test_bad_wishes_are_refused_and_nothing_is_written(tmp_path, arguments, message):
    with pytest.raises(MvwanError, match=message):
        record(**({"tasks": FAST, "episodes": 1, "output": tmp_path / "data", "progress": False} | arguments))
    assert list(tmp_path.iterdir()) == []


def test_an_output_in_use_is_refused(recorded):
    root, _ = recorded
    before = sorted(root.rglob("*"))
    with pytest.raises(MvwanError, match="exists already"):
        record(FAST, 1, root, progress=False)
    assert sorted(root.rglob("*")) == before


def test_cameras_that_cannot_be_rendered_are_named():
    camera = rig(32)[0]
    with Simulator(FAST, (camera,)) as simulator:
        simulator.reset(0)
        for other, message in ((camera.cropped(4, 0, 32, 32), "optical axis in the middle"), (rig(64)[0], "64x64 px")):
            with pytest.raises(MvwanError, match=rf"camera left: .*{message}"):
                simulator.render([other])
    with Simulator(FAST, ()) as blind:
        assert blind.render().shape == (0, 0, 0, 3)
        with pytest.raises(MvwanError, match="made without cameras"):
            blind.render([camera])


def test_random_cameras_see_the_table():
    draw = np.random.default_rng(0)
    cameras = [random_camera(draw) for _ in range(50)]
    for camera in cameras:
        assert isinstance(camera, Camera)
        uv, depth = camera.project(np.array([0.0, 0.65, 0.15]))
        assert camera.inside(uv, depth)
    assert len({camera.world_to_camera.tobytes() for camera in cameras}) == 50
    assert random_camera(np.random.default_rng(3)).to_dict() == random_camera(np.random.default_rng(3)).to_dict()


@pytest.mark.parametrize("settings", [{"MUJOCO_GL": "nonsense"}, {"MUJOCO_GL": "egl", "MUJOCO_EGL_DEVICE_ID": "99"}])
def test_a_renderer_that_cannot_start_names_the_command_that_helps(settings):
    code = "from mvwan.sim.metaworld import Simulator, rig\nSimulator('reach', rig(32))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | settings, check=False)
    last = run.stderr.strip().splitlines()[-1]
    assert "Exception ignored" not in run.stderr
    assert run.returncode == 1
    assert "MvwanError: the renderer cannot start" in last
    assert "apt-get install -y libegl1 libegl-mesa0 libgl1-mesa-dri" in last


@pytest.mark.parametrize("task", sorted(WIDENED))
def test_widened_layouts_reach_beyond_the_stock_ones_and_other_axes_stay(task):
    stock, wide = metaworld.make_env(task)._random_reset_space, metaworld.make_env(task, widened=True)._random_reset_space
    for axis in range(len(stock.low)):
        if axis in WIDENED[task]:
            assert (wide.low[axis], wide.high[axis]) == pytest.approx(WIDENED[task][axis])
            assert wide.low[axis] < stock.low[axis] or wide.high[axis] > stock.high[axis]
        else:
            assert (wide.low[axis], wide.high[axis]) == (stock.low[axis], stock.high[axis])


def test_a_widened_recording_holds_layouts_that_the_stock_one_cannot_have(tmp_path):
    starts = {}
    for widened in (False, True):
        env = metaworld.make_env("button-press-topdown", widened)
        drawn = []
        for layout in range(20):
            env.seed(layout)
            env.reset()
            drawn.append(env.obj_init_pos[0])
        starts[widened] = np.abs(drawn).max()
    assert starts[False] <= 0.1 < 0.2 < starts[True] <= 0.3
    report = record("button-press-topdown", 1, tmp_path / "wide", size_px=32, progress=False, widened=True)
    assert report.episodes == {"button-press-topdown-v3": 1}
    assert [episode.name for episode in read_lerobot(tmp_path / "wide")] == ["button-press-topdown-v3/widened-000000"]


def test_a_task_without_widened_layouts_is_refused():
    with pytest.raises(MvwanError, match=r"door-lock-v3.*no widened layouts.*drawer-open-v3"):
        Simulator("door-lock", (), widened=True)
