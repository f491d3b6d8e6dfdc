"""RLBench read: the expert's runs as the recordings of the same layouts say, cameras that keep every pixel, and mistakes by name."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mvwan.cameras import Camera, look_at
from mvwan.config import DataConfig
from mvwan.data.dataset import WindowDataset, format_of, read_episodes
from mvwan.data.rlbench import read_rlbench
from mvwan.errors import MvwanError
from mvwan.sim.metaworld import record
from tests.formats import RLBENCH_CAMERAS, rlbench_classes, write_rlbench, write_rlbench_episode

TASK = "button-press-topdown-v3"
DATA = DataConfig(num_frames=5, height_px=64, width_px=64, heatmap_sigma_px=2.5, text_tokens=32)
FRAMES = 6


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rlbench(tmp_path_factory.mktemp("rlbench") / "data", TASK, (3, 4), size_px=64)


def write_ball(folder: Path, shift_m: float = 0.0, wrist: bool = True, **given: Any) -> Path:
    """A demonstration of six frames at 48 x 32 px: a point on its way, and every picture of a colour of its own."""
    eyes = {"overhead": (0.01, 0, 1.2), "alley": (1, 0.2, 0.3), "front": (0, -1, 0.4)}
    intrinsics = np.array([[50.0, 0.3, 25], [0, 55.0, 15], [0, 0, 1]])
    point_m = np.linspace((-0.1, 0, 0.05), (0.1, 0.1, 0.15), FRAMES) + shift_m
    views = {}
    for name, eye in eyes.items():
        still = Camera(name=name, width_px=48, height_px=32, intrinsics=intrinsics, world_to_camera=look_at(eye, (0, 0, 0.1)))
        views[name] = [still] * FRAMES
    if wrist:
        views["wrist"] = [
            replace(views["front"][0], world_to_camera=look_at(np.add(point, (0, 0.1, 0.2)).tolist(), point.tolist())) for point in point_m
        ]
    rgb = np.zeros((len(views), FRAMES, 32, 48, 3), np.uint8)
    rgb[..., 0] = 10 * np.arange(FRAMES)[:, None, None]
    rgb[..., 1] = 50 * np.arange(len(views))[:, None, None, None]
    return write_rlbench_episode(folder, views, rgb, point_m, np.linspace(1, 0, FRAMES).tolist(), **given)


@pytest.fixture
def episode(tmp_path: Path) -> Path:
    """One demonstration to spoil, under `push_ball`."""
    return write_ball(tmp_path / "data/push_ball/all_variations/episodes/episode0", descriptions=["push the ball", "push it"])


def respell(path: Path, change: Callable[[Any], Any]) -> None:
    """Unpickles a demonstration, changes it, and pickles what `change` returns, or the demonstration."""
    with rlbench_classes() as (demo_class, observation_class):
        demo = pickle.loads(path.read_bytes())  # noqa: S301 - its own
        assert isinstance(demo, demo_class) and isinstance(demo._observations[0], observation_class)
        path.write_bytes(pickle.dumps(change(demo) or demo))


def test_the_same_demonstration_is_read_through_both_formats(simulated: Path, tmp_path: Path) -> None:
    record(TASK, episodes=2, output=tmp_path / "recorded", seed=3, size_px=64, progress=False)
    assert format_of(simulated) == "RLBench"
    for number, (own, other) in enumerate(zip(read_episodes(simulated), read_episodes(tmp_path / "recorded"), strict=True)):
        assert (own.name, own.instruction) == (f"{TASK}/episode{number}", other.instruction)
        assert own.fps == 20, "RLBench does not say; it records so"
        assert [camera.name for camera in own.cameras] == ["left_shoulder", "right_shoulder", "overhead"]
        frames = min(own.num_frames, other.num_frames)
        assert abs(own.num_frames - other.num_frames) <= 1
        np.testing.assert_allclose(own.point_m[:frames], other.point_m[:frames], atol=1e-6)
        np.testing.assert_allclose(own.gripper_open[:frames], other.gripper_open[:frames], atol=1e-6)
        assert np.array_equal(own.extra["hand_quaternion_wxyz"], np.tile([1.0, 0, 0, 0], (own.num_frames, 1)))
        assert [RLBENCH_CAMERAS[camera.name] for camera in other.cameras] == [camera.name for camera in own.cameras]
        for mine, theirs in zip(own.cameras, other.cameras, strict=True):
            for one, two in zip(mine.project(own.point_m), theirs.project(own.point_m), strict=True):
                np.testing.assert_allclose(one, two, atol=1e-9)
            assert mine.intrinsics[0, 0] > 0 and mine.intrinsics[1, 1] > 0
        shown = [0, frames // 2, frames - 1]
        difference = np.abs(own.read_rgb(shown).astype(int) - other.read_rgb(shown))
        assert difference.mean() < 2, "theirs went through a video"


def test_every_pixel_is_where_rlbench_has_it(episode: Path) -> None:
    """Against K @ inv(extrinsics) as stored, with its negative focal lengths."""
    (read,) = read_rlbench(episode.parents[2])
    stored: dict[str, np.ndarray] = {}
    respell(episode / "low_dim_obs.pkl", lambda demo: stored.update(demo._observations[0].misc))
    points = np.random.default_rng(0).uniform(-0.4, 0.4, (50, 3))
    assert [camera.name for camera in read.cameras] == ["front", "overhead", "alley"]
    for camera in read.cameras:
        intrinsics, extrinsics = (stored[f"{camera.name}_camera_{what}"] for what in ("intrinsics", "extrinsics"))
        assert intrinsics[0, 0] < 0 and intrinsics[1, 1] < 0
        local = (np.c_[points, np.ones(50)] @ np.linalg.inv(extrinsics).T)[:, :3]
        pixels = local @ intrinsics.T
        uv_px, depth_m = camera.project(points)
        np.testing.assert_allclose(uv_px, pixels[:, :2] / pixels[:, 2:], atol=1e-9)
        np.testing.assert_allclose(depth_m, pixels[:, 2], atol=1e-12)
        np.testing.assert_allclose(camera.unproject(uv_px, depth_m), points, atol=1e-9)


def test_a_camera_of_positive_focal_lengths_is_read_as_it_is(episode: Path) -> None:
    before = read_rlbench(episode.parent)[0].cameras[0]

    def turn_round(demo: Any) -> None:
        for observation in demo._observations:
            observation.misc["front_camera_intrinsics"] = before.intrinsics
            observation.misc["front_camera_extrinsics"] = np.linalg.inv(before.world_to_camera)

    respell(episode / "low_dim_obs.pkl", turn_round)
    after = read_rlbench(episode.parent)[0].cameras[0]
    np.testing.assert_allclose(after.world_to_camera, before.world_to_camera, atol=1e-12)
    assert np.array_equal(after.intrinsics, before.intrinsics)


def test_numbers_and_pictures_are_those_that_were_written(tmp_path: Path) -> None:
    turned = (0.1, 0.2, 0.3, (1 - 0.14) ** 0.5)
    folder = write_ball(tmp_path / "push_ball/variation0/episodes/episode0", quaternion_xyzw=turned)
    (read,) = read_rlbench(tmp_path)
    assert read.instruction == "push ball", "nothing describes it"
    np.testing.assert_allclose(read.extra["hand_quaternion_wxyz"], np.tile([turned[3], *turned[:3]], (FRAMES, 1)))
    np.testing.assert_allclose(read.point_m[[0, -1]], [(-0.1, 0, 0.05), (0.1, 0.1, 0.15)])
    np.testing.assert_allclose(read.gripper_open, np.linspace(1, 0, FRAMES), atol=1e-7)
    frames = [5, 0, 2]
    pictures = read.read_rgb(frames)
    assert pictures.shape == (3, 3, 32, 48, 3)
    for view, name in enumerate(("front", "overhead", "alley")):
        for place, frame in enumerate(frames):
            assert np.array_equal(pictures[view, place], np.asarray(Image.open(folder / f"{name}_rgb/{frame}.png")))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol_are_read(tmp_path: Path, protocol: int) -> None:
    write_ball(tmp_path / "episodes/episode0", protocol=protocol)
    assert "rlbench" not in sys.modules
    assert read_rlbench(tmp_path)[0].num_frames == FRAMES


def test_a_camera_that_moves_is_left_out_and_refused_by_name(simulated: Path, episode: Path) -> None:
    assert (simulated / TASK / "all_variations/episodes/episode0/wrist_rgb/0.png").is_file()
    for root, name in ((simulated, TASK), (episode.parents[2], "push_ball")):
        with pytest.raises(MvwanError, match=rf"data\.cameras: episode {name}/episode0: camera 'wrist' moves \(frame 1\)"):
            read_episodes(root, ("overhead", "wrist"))
        assert "wrist" not in [camera.name for camera in read_episodes(root)[0].cameras]
    write_ball(episode.parent / "episode1", wrist=False)

    def push(demo: Any) -> None:
        demo._observations[-1].misc["front_camera_extrinsics"][0, 3] += 1e-5

    respell(episode.parent / "episode1/low_dim_obs.pkl", push)
    names = [[camera.name for camera in read.cameras] for read in read_rlbench(episode.parent)]
    assert names == [["overhead", "alley"]] * 2, "what moves in one is a view of none"
    with pytest.raises(MvwanError, match=r"episode push_ball/episode1: camera 'front' moves \(frame 5\)"):
        read_rlbench(episode.parent, ("front",))


def test_cameras_are_chosen_by_name(episode: Path) -> None:
    (read,) = read_episodes(episode.parent, ("alley", "front"))
    assert [camera.name for camera in read.cameras] == ["front", "alley"]
    data = replace(DATA, cameras=("alley", "front"))
    sample = WindowDataset([read], data, 2, "train", 0).sample(0)
    assert [camera.name for camera in sample.cameras] == ["alley", "front"]
    for view, frame in np.argwhere(sample.visible):
        np.testing.assert_allclose(sample.cameras[view].project(sample.point_m[frame])[0], sample.uv_px[view, frame], atol=1e-3)
    data = replace(DATA, cameras=("frnt",))
    with pytest.raises(MvwanError, match=r"no camera 'frnt'; available: front, overhead, alley\. Did you mean 'front'"):
        WindowDataset(read_episodes(episode.parent, data.cameras), data, 1, "train", 0)


def test_pictures_of_several_sizes_become_those_of_the_first_view_and_cameras_follow(episode: Path) -> None:
    before = read_rlbench(episode.parent)[0]
    for path in (episode / "overhead_rgb").iterdir():
        Image.open(path).resize((96, 64)).save(path)

    def double(demo: Any) -> None:
        for observation in demo._observations:
            observation.misc["overhead_camera_intrinsics"] = np.diag([2.0, 2, 1]) @ observation.misc["overhead_camera_intrinsics"]

    respell(episode / "low_dim_obs.pkl", double)
    after = read_rlbench(episode.parent)[0]
    assert after.read_rgb([0]).shape == (3, 1, 32, 48, 3)
    for one, other in zip(after.cameras, before.cameras, strict=True):
        np.testing.assert_allclose(one.project(after.point_m)[0], other.project(after.point_m)[0], atol=1e-9)


def test_every_level_of_the_tree_may_be_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (10, 2):
        write_ball(tmp_path / f"data/close_jar/all_variations/episodes/episode{number}", shift_m=0.01 * number)
    for variation, number in ((10, 0), (2, 1), (2, 0)):
        write_ball(tmp_path / f"data/open_box/variation{variation}/episodes/episode{number}")
    (tmp_path / "data/open_box/variation2/variation_descriptions.pkl").write_bytes(pickle.dumps(["open the box"]))
    names = ["close_jar/episode2", "close_jar/episode10"]
    boxes = ["open_box/variation2/episode0", "open_box/variation2/episode1", "open_box/variation10/episode0"]
    read = read_rlbench(tmp_path / "data")
    assert [episode.name for episode in read] == names + boxes
    assert [episode.instruction for episode in read] == ["close jar"] * 2 + ["open the box"] * 2 + ["open box"]
    for below in ("close_jar", "close_jar/all_variations", "close_jar/all_variations/episodes"):
        assert [episode.name for episode in read_episodes(tmp_path / "data" / below)] == names
    assert [episode.name for episode in read_episodes(tmp_path / "data/open_box/variation2/episodes")] == boxes[:2]
    monkeypatch.chdir(tmp_path / "data/close_jar/all_variations/episodes")
    assert [episode.name for episode in read_episodes(".")] == names
    (tmp_path / "data/close_jar/all_variations/episodes").rename(tmp_path / "jars")
    assert [episode.name for episode in read_episodes(tmp_path / "jars")] == ["jars/episode2", "jars/episode10"]


def first(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Spoils the observation of frame 2."""
    return lambda folder: respell(folder / "low_dim_obs.pkl", lambda demo: change(demo._observations[2]))


def put(name: str, value: Any) -> Callable[[Path], None]:
    return first(lambda observation: setattr(observation, name, value))


def calibrate(what: str, value: Any) -> Callable[[Path], None]:
    def everywhere(demo: Any) -> None:
        for observation in demo._observations:
            observation.misc[f"front_camera_{what}"] = value

    return lambda folder: respell(folder / "low_dim_obs.pkl", everywhere)


FOLDED: list[Any] = [1.0]
"""A list of one list, twice, 40 times over: a hundred bytes whose values would fill any memory."""
for _ in range(40):
    FOLDED = [FOLDED, FOLDED]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "low_dim_obs.pkl").unlink(), r"episode push_ball/episode1: .*low_dim_obs\.pkl: no such file"),
        (lambda folder: (folder / "low_dim_obs.pkl").write_bytes(b"no"), r"episode push_ball/episode1: .*not a readable pickle"),
        (lambda folder: (folder / "low_dim_obs.pkl").write_bytes(pickle.dumps(Path("/"))), r"episode1: .*refused, it names pathlib"),
        (
            lambda folder: (folder / "low_dim_obs.pkl").write_bytes(pickle.dumps([1])),
            r"holds list of length 1, needs a rlbench\.demo\.Demo",
        ),
        (lambda folder: respell(folder / "low_dim_obs.pkl", lambda demo: demo._observations.clear()), r"holds Record, needs a rlbench"),
        (lambda folder: respell(folder / "low_dim_obs.pkl", lambda demo: demo._observations[0]), r"needs a rlbench\.demo\.Demo"),
        (
            lambda folder: respell(folder / "low_dim_obs.pkl", lambda demo: demo._observations.insert(3, {})),
            r"episode1, frame 3: low_dim_obs\.pkl: holds dict of length 0, needs a rlbench\.backend\.observation\.Observation",
        ),
        (put("gripper_pose", None), r"episode push_ball/episode1, frame 2: gripper_pose: holds None, needs 7 numbers"),
        (put("gripper_pose", FOLDED), r"frame 2: gripper_pose: holds list of length 2, needs 7 numbers"),
        (put("gripper_pose", [FOLDED] * 7), r"frame 2: gripper_pose: holds list of length 7, needs 7 numbers"),
        (put("gripper_pose", np.full(7, np.nan)), r"frame 2: gripper_pose: NaN or infinity"),
        (put("gripper_pose", np.zeros(7)), r"hand_quaternion_wxyz of frame 2 is .*not of length 1"),
        (put("gripper_open", 1.5), r"frame 2: gripper_open: holds 1\.5, needs a number of 0 \(closed\) to 1"),
        (put("gripper_open", "open"), r"frame 2: gripper_open: holds 'open', needs a number of 0 to 1"),
        (put("misc", None), r"frame 2: misc front_camera_intrinsics: holds None, needs 3 x 3 numbers"),
        (
            first(lambda observation: observation.misc.update(overhead_camera_extrinsics=[])),
            r"frame 2: misc overhead_camera_extrinsics: holds",
        ),
        (calibrate("extrinsics", np.full((4, 4), np.inf)), r"frame 0: camera front: NaN or infinity in its calibration"),
        (calibrate("extrinsics", 2 * np.eye(4)), r"episode push_ball/episode1: camera front: world_to_camera must be a rotation"),
        (calibrate("intrinsics", np.diag([-50.0, 50, 1])), r"camera front has focal lengths -50 and 50 px, needs two of one sign"),
        (calibrate("intrinsics", np.diag([0.0, 50, 1])), r"camera front has focal lengths 0 and 50 px"),
        (calibrate("intrinsics", np.diag([50.0, 50, 2])), r"camera front: intrinsics must be invertible with last row"),
        (lambda folder: (folder / "alley_rgb/4.png").unlink(), r"episode1, frame 4: .*alley_rgb/4\.png: no such picture"),
        (
            lambda folder: (folder / "alley_rgb/6.png").write_bytes(b""),
            r"episode push_ball/episode1, frame 6: .*alley_rgb/6\.png: a picture beyond the 6 observations",
        ),
        (lambda folder: (folder / "front_rgb/0.png").write_bytes(b"no"), r"front_rgb/0\.png: cannot be decoded"),
        (
            lambda folder: [path.rename(folder / path.name.replace("_rgb", "_colour")) for path in folder.glob("*_rgb")],
            r"episode push_ball/episode1: .* holds no folder <camera>_rgb",
        ),
        (
            lambda folder: (folder / "variation_descriptions.pkl").write_bytes(pickle.dumps("push")),
            r"variation_descriptions\.pkl: holds 'push', needs a list of sentences",
        ),
    ],
)
def test_what_is_wrong_is_named(episode: Path, spoil: Callable[[Path], Any], message: str) -> None:
    spoil(write_ball(episode.parent / "episode1"))
    with pytest.raises(MvwanError, match=message):
        read_episodes(episode.parents[3])


def test_an_episode_whose_cameras_all_move_is_refused(tmp_path: Path) -> None:
    folder = write_ball(tmp_path / "episode0")

    def shake(demo: Any) -> None:
        for frame, observation in enumerate(demo._observations):
            for name in ("front", "alley", "overhead"):
                observation.misc[f"{name}_camera_intrinsics"] = observation.misc[f"{name}_camera_intrinsics"] + np.diag([frame, 0, 0])

    respell(folder / "low_dim_obs.pkl", shake)
    with pytest.raises(MvwanError, match=r"no camera stands still over all episodes \(front, overhead, alley, wrist move\)"):
        read_episodes(tmp_path)


def test_damaged_episodes_are_left_out_with_their_reason_where_that_is_asked_for(episode: Path) -> None:
    for number in (1, 2):
        write_ball(episode.parent / f"episode{number}")
    put("gripper_pose", None)(episode.parent / "episode1")
    (episode.parent / "episode2/front_rgb/3.png").unlink()
    read = read_episodes(episode.parent, on_corrupt="skip")
    assert [found.name for found in read] == ["push_ball/episode0"]
    assert [damaged.name for damaged in read.left_out] == ["push_ball/episode1", "push_ball/episode2"]
    assert "frame 2: gripper_pose" in read.left_out[0].reason and "no such picture" in read.left_out[1].reason
    with pytest.raises(MvwanError, match="'wrist' moves"):
        read_episodes(episode.parent, ("wrist",), on_corrupt="skip")


def test_a_gripper_that_was_not_recorded_is_unknown(tmp_path: Path) -> None:
    put("gripper_open", None)(write_ball(tmp_path / "episode0"))
    assert np.isnan(read_rlbench(tmp_path)[0].gripper_open).tolist() == [False, False, True, False, False, False]


def test_a_damaged_picture_is_named_with_its_episode_and_frame(episode: Path) -> None:
    path = episode / "front_rgb/4.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(MvwanError, match=r"episode push_ball/episode0, frame 4: .*front_rgb/4\.png cannot be decoded"):
        read_rlbench(episode.parent)[0].read_rgb([3, 4])


@settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["low_dim_obs.pkl", "variation_descriptions.pkl", "front_rgb/0.png", "alley_rgb/2.png"]), st.data())
def test_files_with_a_changed_byte_are_read_or_refused_in_a_sentence(episode: Path, name: str, draw: st.DataObject) -> None:
    path = episode / name
    whole = path.read_bytes()
    place, value = draw.draw(st.integers(0, len(whole) - 1)), draw.draw(st.integers(0, 255))
    cut = draw.draw(st.booleans())
    path.write_bytes(whole[:place] if cut else whole[:place] + bytes([value]) + whole[place + 1 :])
    try:
        with np.errstate(all="ignore"):
            read_rlbench(episode.parent)[0].read_rgb([0, 2])
    except MvwanError as error:
        assert str(error).isprintable()  # noqa: PT017 - it need not be refused
    finally:
        path.write_bytes(whole)


def test_the_cache_follows_what_is_stored(episode: Path) -> None:
    def fingerprint() -> str:
        return WindowDataset(read_episodes(episode.parent), DATA, 3, "train", 0).fingerprint

    before = fingerprint()
    put("gripper_open", 0.123)(episode)
    numbers = fingerprint()
    path = episode / "front_rgb/3.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)).save(path)
    assert len({before, numbers, fingerprint()}) == 3


def test_the_commands(simulated: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mvwan", "data"]
    settings = ["--set", "data.num_frames=5", "--set", "data.height_px=64", "--set", "data.width_px=64"]
    done = subprocess.run([*words, "inspect", str(simulated), *settings, "--json"], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert (told["format"], told["episodes"], told["fps"]) == ("RLBench", 2, [20.0])
    assert (told["points_share"], told["gripper_share"], told["rotation_share"]) == (1, 1, 1)
    assert [view["seen_share"] for view in told["views"]] == [1, 1, 1]
    subprocess.run([*words, "convert", str(simulated), str(tmp_path / "out")], capture_output=True, check=True)
    for one, other in zip(read_episodes(simulated), read_episodes(tmp_path / "out"), strict=True):
        assert (other.name, other.instruction, other.fps) == (one.name, one.instruction, one.fps)
        assert [camera.to_dict() for camera in other.cameras] == [camera.to_dict() for camera in one.cameras]
        np.testing.assert_allclose(other.point_m, one.point_m, atol=1e-6)
        np.testing.assert_allclose(other.extra["hand_quaternion_wxyz"], one.extra["hand_quaternion_wxyz"], atol=1e-6)
        assert np.abs(other.read_rgb([0]).astype(int) - one.read_rgb([0])).mean() < 2, "nearly lossless video"
    refused = subprocess.run(
        [*words, "inspect", str(simulated), "--set", "data.cameras=[wrist,overhead,left_shoulder]"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1 and "'wrist' moves" in refused.stderr
