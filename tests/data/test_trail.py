"""trail read: the expert's runs as the recordings of the same layouts say, clouds that move with their labels, and mistakes by name."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mvwan.config import DataConfig, TrailConfig, config_from_dict
from mvwan.data.dataset import WindowDataset, read_episodes
from mvwan.data.trail import CloudFiles, read_trail
from mvwan.errors import MvwanError
from mvwan.pickles import read_pickle
from mvwan.sim.metaworld import record
from tests.formats import write_trail

TASK = "button-press-topdown-v3"
SCENE = (-0.45, 0.3, -0.05, 0.45, 1.0, 0.6)
SETTINGS = TrailConfig(scene_bounds_m=SCENE, size_px=96)
DATA = DataConfig(num_frames=5, window_stride=4, height_px=96, width_px=96, heatmap_sigma_px=2.5, text_tokens=32, trail=SETTINGS)
RED = np.array([230, 20, 20], np.uint8)
FOLDED: list[Any] = [1.0]
"""A list of one list, twice, 40 times over: a hundred bytes whose values would fill any memory."""
for _ in range(40):
    FOLDED = [FOLDED, FOLDED]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trail(tmp_path_factory.mktemp("trail") / "data", TASK, (3, 4), size_px=64)


def put(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value))


@pytest.fixture
def ball(tmp_path: Path) -> Path:
    """Two demonstrations of 6 frames: a red ball at the pose over a grey floor, each half of the scene seen by a sensor of its own."""
    rows, columns = np.meshgrid(np.linspace(-0.4, 0.4, 60), np.linspace(0.32, 0.98, 60), indexing="ij")
    floor = np.stack([rows, columns, np.zeros_like(rows)], axis=-1)
    turn = np.array([[0.0, -1, 0, 0.2], [1, 0, 0, -0.1], [0, 0, 1, 0.3], [0, 0, 0, 1]])
    for number in (1, 2):
        folder = tmp_path / "data" / "push_ball" / f"trail_{number}"
        for frame in range(6):
            point = np.array([-0.2 + 0.08 * frame, 0.5 + 0.05 * number, 0.1 + 0.02 * frame])
            offsets = np.random.default_rng(0).normal(0, 0.008, (60, 60, 3))
            put(folder / "poses" / f"{frame:06d}.pkl", [*point.tolist(), 1.0, 0.0, 0.0, 0.0])
            put(folder / "gripper_states" / f"{frame:06d}.pkl", frame < 3)
            far = floor + np.array([0, 0, 5.0])
            seen = ((floor, (90, 90, 90)), (point + offsets, RED), (far, (0, 250, 0)))
            for sensor, (points, colour) in enumerate(seen, 1):
                local = (points - turn[:3, 3]) @ turn[:3, :3]
                put(folder / f"3rd_{sensor}_pcd" / f"{frame:06d}.pkl", local.astype(np.float32))
                put(
                    folder / f"3rd_{sensor}_bgr" / f"{frame:06d}.pkl",
                    np.broadcast_to(np.array(colour, np.uint8)[::-1], points.shape).copy(),
                )
        put(folder / "extrinsics.pkl", {f"3rd_{sensor}": turn for sensor in (1, 2, 3)})
        (folder / "instruction.txt").write_text("Push the ball.\n")
    return tmp_path / "data"


def test_the_same_demonstration_is_read_through_both_formats(simulated: Path, tmp_path: Path) -> None:
    record(TASK, episodes=2, output=tmp_path / "recorded", seed=3, size_px=64, progress=False)
    for own, other in zip(read_trail(simulated, SETTINGS), read_episodes(tmp_path / "recorded"), strict=True):
        assert own.instruction == other.instruction
        assert [camera.name for camera in own.cameras] == ["top", "front", "side"]
        frames = min(own.num_frames, other.num_frames)
        assert abs(own.num_frames - other.num_frames) <= 1
        np.testing.assert_allclose(own.point_m[:frames], other.point_m[:frames], atol=1e-6)
        assert np.array_equal(own.gripper_open[:frames], other.gripper_open[:frames] >= 0.8)


def test_views_show_the_scene_where_the_labels_are(simulated: Path) -> None:
    """Around the tool point there are fingers, and far from all that stands there is nothing."""
    episode = read_trail(simulated, SETTINGS)[0]
    pictures = episode.read_rgb([0])
    covered = pictures.any(axis=-1)[:, 0]
    assert covered[0].mean() > 0.5, "from above the table fills the view"
    for view, camera in enumerate(episode.cameras):
        u, v = np.floor(camera.project(episode.point_m[0])[0]).astype(int)
        assert covered[view, v - 8 : v + 9, u - 8 : u + 9].mean() > 0.1
    assert not covered[1, :4].any(), "nothing hangs in the air above the arm"


def test_a_scene_moves_with_its_pose_and_its_label(ball: Path) -> None:
    data = replace(DATA, num_frames=5, augment=replace(DATA.augment, variants=3, translation_m=0.08, crop_share=0.2))
    dataset = WindowDataset(read_episodes(ball, None, SETTINGS), data, 3, "train", 0)
    moved = set()
    for variant in range(4):
        sample = dataset.sample(0, variant)
        assert sample.visible.mean() > 0.7
        moved.add(tuple(sample.point_m[0].round(4)))
        for view, frame in np.argwhere(sample.visible):
            camera = sample.cameras[view]
            np.testing.assert_allclose(camera.project(sample.point_m[frame])[0], sample.uv_px[view, frame], atol=1e-3)
            u, v = np.floor(sample.uv_px[view, frame]).astype(int)
            assert np.abs(sample.rgb[view, frame, v, u].astype(int) - RED).max() < 70, (variant, view, frame)
    assert len(moved) == 4, "one move per clip and variant"


def test_a_clip_is_moved_as_one_and_turns_are_told_in_the_hands_own_frame(ball: Path) -> None:
    dataset = WindowDataset(read_episodes(ball, None, SETTINGS), replace(DATA, augment=replace(DATA.augment, variants=1)), 3, "train", 0)
    plain, moved = dataset.sample(0), dataset.sample(0, 1)
    steps, other = np.diff(plain.point_m, axis=0), np.diff(moved.point_m, axis=0)
    np.testing.assert_allclose(np.linalg.norm(steps, axis=1), np.linalg.norm(other, axis=1))
    np.testing.assert_allclose(plain.rotation_deg, moved.rotation_deg, atol=1e-4)


def test_colours_are_noisy_in_augmented_variants_alone(ball: Path) -> None:
    still = replace(DATA.augment, variants=1, translation_m=0.0, rotation_deg=(0.0, 0.0, 0.0), crop_share=0.0, colour_noise=0.1)
    episodes = read_episodes(ball, None, SETTINGS)
    noisy = WindowDataset(episodes, replace(DATA, augment=still), 3, "train", 0)
    quiet = WindowDataset(episodes, replace(DATA, augment=replace(still, colour_noise=0.0)), 3, "train", 0)
    assert np.array_equal(noisy.sample(0).rgb, quiet.sample(0, 1).rgb)
    difference = noisy.sample(0, 1).rgb.astype(float) - quiet.sample(0, 1).rgb
    floor = quiet.sample(0, 1).rgb[0] == 90
    assert 15 < difference[0][floor].std() < 35
    assert np.array_equal(noisy.sample(0, 1).rgb, noisy.sample(0, 1).rgb)


def test_clouds_are_merged_or_each_view_has_its_own(ball: Path) -> None:
    merged = read_trail(ball, SETTINGS)[0].read_rgb([2])
    own = read_trail(ball, replace(SETTINGS, merged=False))[0].read_rgb([2])
    red = (merged[:, 0] == RED).all(axis=-1).any(axis=(1, 2)), (own[:, 0] == RED).all(axis=-1).any(axis=(1, 2))
    assert red[0].all()
    assert red[1].tolist() == [False, True, False], "the second sensor alone sees the ball"
    assert not (merged[..., 1] == 250).any(), "what lies outside of the scene is cut off"
    assert not own[2].any()


def test_settings_choose_trails_and_views(ball: Path) -> None:
    assert [episode.name for episode in read_trail(ball, SETTINGS)] == ["push_ball/trail_1", "push_ball/trail_2"]
    assert [episode.name for episode in read_trail(ball / "push_ball", replace(SETTINGS, first=2))] == ["push_ball/trail_2"]
    assert [episode.name for episode in read_trail(ball, replace(SETTINGS, last=1))] == ["push_ball/trail_1"]
    with pytest.raises(MvwanError, match=r"data\.trail\.last=0 leave no demonstration"):
        read_trail(ball, replace(SETTINGS, first=0, last=0))
    fingerprints = [read_trail(ball, replace(SETTINGS, radius_px=radius_px))[0].fingerprint for radius_px in (1, 8)]
    assert fingerprints[0] != fingerprints[1], "the radius makes other pictures"
    with pytest.raises(MvwanError, match=r"data\.trail\.first=7 .* leave no demonstration; there are trails 1 to 2"):
        read_trail(ball, replace(SETTINGS, first=7))
    (side,) = read_trail(ball, replace(SETTINGS, last=1), ["side"])
    assert side.read_rgb([0]).shape == (1, 1, 96, 96, 3)
    assert np.array_equal(side.read_rgb([0])[0], read_trail(ball, SETTINGS)[0].read_rgb([0])[2])
    with pytest.raises(MvwanError, match=r"scene_bounds_m=.*each end above its start"):
        config_from_dict({"data": {"trail": {"scene_bounds_m": [0, 0, 0, 1, 1, -1]}}})


def test_pictures_cross_to_worker_processes_and_depend_on_the_scene(ball: Path) -> None:
    episode = read_trail(ball, SETTINGS)[0]
    reader = episode.read_rgb
    assert isinstance(reader, CloudFiles)
    assert np.array_equal(pickle.loads(pickle.dumps(reader))([1]), reader([1]))  # noqa: S301 - its own
    smaller = read_trail(ball, replace(SETTINGS, scene_bounds_m=(-0.4, 0.3, -0.05, 0.45, 1.0, 0.6)))[0]
    assert smaller.fingerprint != episode.fingerprint


@pytest.mark.parametrize("kind", ["3rd_2_pcd", "3rd_1_bgr"])
def test_clouds_made_anew_are_other_pictures_although_of_the_same_size(ball: Path, tmp_path: Path, kind: str) -> None:
    before, copied = read_trail(ball, SETTINGS)[0], shutil.copytree(ball, tmp_path / "copied")
    assert read_trail(copied, SETTINGS)[0].fingerprint == before.fingerprint
    for path in (copied / "push_ball" / "trail_1" / kind).iterdir():
        cloud, size = read_pickle(path), path.stat().st_size
        put(path, cloud[::-1] if kind.endswith("pcd") else np.full_like(cloud, 7))
        assert path.stat().st_size == size
    assert read_trail(copied, SETTINGS)[0].fingerprint != before.fingerprint


@pytest.mark.parametrize(
    ("file", "value", "message"),
    [
        ("poses/000002.pkl", [1.0, 2.0], r"poses/000002\.pkl: holds list of length 2, needs 7 numbers"),
        ("poses/000002.pkl", [FOLDED] * 7, r"000002\.pkl: holds list of length 7, needs 7 numbers"),
        ("poses/000002.pkl", [np.nan, 0, 0, 1, 0, 0, 0], r"NaN or infinity in a pose"),
        ("poses/000002.pkl", [0, 0, 0, 5.0, 0, 0, 0], r"hand_quaternion_wxyz of frame 2"),
        ("gripper_states/000001.pkl", FOLDED, r"000001\.pkl: holds list of length 2, needs true \(open\) or false"),
        ("gripper_states/000001.pkl", "open", r"000001\.pkl: holds 'open', needs true \(open\) or false"),
        ("extrinsics.pkl", {"3rd_1": np.eye(4)}, r"extrinsics\.pkl: '3rd_2': holds None, needs 4 x 4 numbers"),
        ("extrinsics.pkl", {f"3rd_{sensor}": 2 * np.eye(4) for sensor in (1, 2, 3)}, r"'3rd_1' is no rotation and shift"),
        ("poses/000002.pkl", Path("/"), r"refused, it names pathlib"),
    ],
)
def test_what_is_wrong_is_named(ball: Path, file: str, value: object, message: str) -> None:
    put(ball / "push_ball" / "trail_1" / file, value)
    with pytest.raises(MvwanError, match=message):
        read_trail(ball, SETTINGS)


def test_a_damaged_cloud_is_named_with_its_episode_and_frame(ball: Path) -> None:
    path = ball / "push_ball" / "trail_2" / "3rd_2_pcd" / "000003.pkl"
    whole = path.read_bytes()
    episode = read_trail(ball, SETTINGS)[1]
    for damage, message in ((whole[:500], "not a readable pickle"), (pickle.dumps(np.zeros((4, 3))), "needs any x any x 3 numbers")):
        path.write_bytes(damage)
        with pytest.raises(MvwanError, match=rf"episode push_ball/trail_2, frame 3: .*000003\.pkl: .*{message}"):
            episode.read_rgb([2, 3])
