"""MVTrack read: what a LeRobot dataset of the same demonstrations says, view by view, and every mistake by its name."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mvwan.baselines import NearestDemonstration, constant_velocity
from mvwan.batch import Episode
from mvwan.config import DataConfig
from mvwan.data.dataset import WindowDataset, read_episodes
from mvwan.data.left_out import LeftOut
from mvwan.data.lerobot import read_lerobot
from mvwan.data.mvtrack import read_mvtrack
from mvwan.errors import MvwanError
from mvwan.latent_cache import build_cache
from mvwan.model.latents import LatentCodec
from tests.formats import write_mvtrack

DATA = DataConfig(num_frames=5, frame_interval=2, window_stride=1, height_px=64, width_px=64, heatmap_sigma_px=2.5, text_tokens=32)


@pytest.fixture(scope="module")
def recorded(tiny_demonstrations: Path) -> list[Episode]:
    return list(read_lerobot(tiny_demonstrations))


@pytest.fixture(scope="module")
def scenes(recorded: list[Episode], tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"ball0": "train", "ball1": "train", "ball2": "val", "ball3": "test"}
    return write_mvtrack(tmp_path_factory.mktemp("mvtrack") / "data", recorded, splits)


@pytest.fixture
def broken(recorded: list[Episode], tmp_path: Path) -> Path:
    """A scene to spoil."""
    return write_mvtrack(tmp_path / "data", recorded[:1])


def test_the_same_demonstration_is_read_through_both_formats(recorded: list[Episode], scenes: Path) -> None:
    for own, other in zip(read_episodes(scenes), recorded, strict=False):
        assert own.instruction == "Track the ball"
        assert [camera.name for camera in own.cameras] == ["view1", "view2", "view3"]
        for view, camera in enumerate(other.cameras):
            uv_px, depth_m = camera.project(other.point_m)
            seen = camera.inside(uv_px, depth_m)
            assert own.uv_px is not None
            assert np.array_equal(np.isfinite(own.uv_px[view]).all(axis=1), seen)
            np.testing.assert_allclose(own.uv_px[view][seen], uv_px[seen], atol=1e-3)
        frames = [0, 8, 3]
        difference = own.read_rgb(frames).astype(float) - other.read_rgb(frames)
        assert np.abs(difference).mean() < 4, "JPEG"


def test_the_datasets_own_splits_hold_and_test_scenes_stay_out(scenes: Path) -> None:
    episodes = read_episodes(scenes)
    assert [(episode.name, episode.split) for episode in episodes] == [("ball0", "train"), ("ball1", "train"), ("ball2", "validation")]
    for seed in range(3):
        training, held_out = (WindowDataset(episodes, DATA, 3, split, seed) for split in ("train", "validation"))
        assert {window.episode.name for window in training.windows} == {"ball0", "ball1"}
        assert {window.episode.name for window in held_out.windows} == {"ball2"}


def test_a_scene_that_no_split_names_is_not_dropped_in_silence(recorded: list[Episode], tmp_path: Path) -> None:
    root = write_mvtrack(tmp_path / "data", recorded, {"ball0": "train", "ball1": "train", "ball2": "val"})
    with pytest.raises(MvwanError, match="scene ball3: is in none of the split files"):
        read_episodes(root)
    left_out: list[LeftOut] = []
    assert [episode.name for episode in read_mvtrack(root, left_out=left_out)] == ["ball0", "ball1", "ball2"]
    assert [one.name for one in left_out] == ["ball3"]


def test_what_has_no_place_in_space_has_no_baseline_that_needs_one(scenes: Path) -> None:
    """Its numbers would be those of holding the first frame, under another name. The nearest demonstration has a path in pictures."""
    windows = WindowDataset(read_episodes(scenes), DATA, 3, "train", 0)
    sample = windows.sample(0)
    assert constant_velocity(sample, windows.windows[0], 1) is None
    answer = NearestDemonstration(windows, 1).answer(sample)
    assert answer is not None and not np.isfinite(answer.point_m).any()
    np.testing.assert_allclose(answer.uv_px[sample.visible], sample.uv_px[sample.visible], atol=1e-4)  # of a training window itself


def test_labels_follow_crops_and_resizes(scenes: Path, recorded: list[Episode]) -> None:
    data = DataConfig(**{**vars(DATA), "height_px": 96, "width_px": 128, "augment": {"variants": 1, "crop_share": 0.3}})
    ours, theirs = (
        WindowDataset([episode], data, 3, "train", 0)
        for episode in (next(episode for episode in read_episodes(scenes) if episode.name == "ball0"), recorded[0])
    )
    for index in range(len(ours)):
        mine, other = ours.sample(index), theirs.sample(index)
        assert np.array_equal(mine.visible, other.visible)
        np.testing.assert_allclose(mine.uv_px[mine.visible], other.uv_px[mine.visible], atol=1e-2)
    # A crop is drawn from the sample's name, which differs: the ball itself must be under the label.
    for index in range(len(ours)):
        sample = ours.sample(index, 1)
        for view, frame in np.argwhere(sample.visible):
            u, v = np.floor(sample.uv_px[view, frame]).astype(int)
            if 2 < u < 125 and 2 < v < 93:
                red, green, _ = sample.rgb[view, frame, v, u].astype(int)
                assert red > green + 80


def test_views_stay_in_step_where_one_loses_the_object(broken: Path) -> None:
    flags = broken / "ball0/ball0-2/invisible.txt"
    said = flags.read_text().split(",")
    said[4] = "1"
    flags.write_text("\n".join(said))  # one per line is understood too
    boxes = broken / "ball0/ball0-3/groundtruth.txt"
    lines = boxes.read_text().splitlines()
    lines[6] = "NaN NaN NaN NaN"
    lines[7] = "0,0,0,0"
    boxes.write_text("\n".join(lines))
    (episode,) = read_mvtrack(broken)
    dataset = WindowDataset([episode], DATA, 3, "train", 0)
    sample = dataset.sample(0)  # frames 0, 2, 4, 6, 8
    assert not sample.visible[1, 2]
    assert not sample.visible[2, 3]
    assert sample.visible[0].sum() == 5
    assert sample.visible[:, 0].all()


def test_the_labels_of_lost_views_are_masked_in_what_the_model_learns_from(broken: Path, tmp_path: Path) -> None:
    flags = broken / "ball0/ball0-2/invisible.txt"
    flags.write_text(",".join("1" if frame == 4 else "0" for frame in range(9)))
    dataset = WindowDataset(read_episodes(broken), DATA, 3, "train", 0)
    batch = build_cache(dataset, LatentCodec.load("tiny", 32), tmp_path / "latents", 2.5, progress=False).batch([0])
    assert batch.heat_valid[0].tolist() == [[True, True], [True, False], [True, True]]


def test_the_cache_follows_the_labels(broken: Path) -> None:
    before = WindowDataset(read_episodes(broken), DATA, 3, "train", 0).fingerprint
    boxes = broken / "ball0/ball0-1/groundtruth.txt"
    boxes.write_text(boxes.read_text().replace(",12.0,12.0", ",14.0,12.0", 1))
    assert WindowDataset(read_episodes(broken), DATA, 3, "train", 0).fingerprint != before


def test_views_of_other_sizes_and_oblong_pictures(broken: Path) -> None:
    for path in (broken / "ball0/ball0-1/img").iterdir():
        Image.open(path).resize((96, 64)).save(path, quality=95)
    boxes = broken / "ball0/ball0-1/groundtruth.txt"
    wide = []
    for line in boxes.read_text().splitlines():
        u, v, width, height = map(float, line.split(","))
        wide.append(f"{u * 1.5},{v},{width * 1.5},{height}\n")
    boxes.write_text("".join(wide))
    (episode,) = read_mvtrack(broken)
    assert {(camera.width_px, camera.height_px) for camera in episode.cameras} == {(96, 64)}
    assert episode.read_rgb([0]).shape == (3, 1, 64, 96, 3)
    sample = WindowDataset([episode], DATA, 3, "train", 0).sample(0)
    for view, frame in np.argwhere(sample.visible):
        u, v = np.floor(sample.uv_px[view, frame]).astype(int)
        red, green, _ = sample.rgb[view, frame, v, u].astype(int)
        assert red > green + 80, (view, frame)


def test_pictures_are_in_the_order_of_their_numbers(broken: Path) -> None:
    before = read_mvtrack(broken)[0].read_rgb(range(9))
    folder = broken / "ball0/ball0-1/img"
    for frame in range(9):
        (folder / f"{frame + 1}.jpg").rename(folder / f"x{frame}.jpg")
    for frame in range(9):
        (folder / f"x{frame}.jpg").rename(folder / f"{frame + 5}.jpg")  # 5 … 13
    assert np.array_equal(read_mvtrack(broken)[0].read_rgb(range(9)), before)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda root: (root / "ball0-1/groundtruth.txt").write_text("1,2,3\n" * 9),
            r"entry 1 is '1,2,3', needs 4 numbers",
        ),
        (lambda root: (root / "ball0-1/groundtruth.txt").write_text("1,2,3,4\n" * 8), r"groundtruth.txt: 8 entries for 9 pictures"),
        (lambda root: (root / "ball0-1/groundtruth.txt").write_text("1e9,2,3,4\n" * 9), r"entry 1 is '1e9,2,3,4'"),
        (lambda root: (root / "ball0-2/invisible.txt").write_text("0,0"), r"invisible.txt: 2 entries for 9 pictures"),
        (lambda root: (root / "ball0-2/invisible.txt").write_text("no"), r"invisible.txt: entry 1 is 'no', needs 1 number\."),
        (lambda root: (root / "ball0-3/img/9.jpg").unlink(), r"different numbers of pictures \(view1 9, view2 9, view3 8\)"),
        (lambda root: (root / "ball0-3/img/1.jpg").write_bytes(b"no"), r"1.jpg: cannot be decoded"),
    ],
)
def test_what_is_wrong_is_named(broken: Path, spoil, message: str) -> None:
    spoil(broken / "ball0")
    with pytest.raises(MvwanError, match=message):
        read_episodes(broken)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet="0123456789.,- \n\tenaif\x00é", max_size=120), st.sampled_from(["groundtruth.txt", "invisible.txt"]))
def test_labels_of_any_text_are_read_or_refused_in_a_sentence(broken: Path, text: str, name: str) -> None:
    path = broken / "ball0/ball0-2" / name
    before = path.read_text()
    path.write_text(text)
    try:
        read_mvtrack(broken)
    except MvwanError as error:
        assert str(error).isprintable()  # noqa: PT017 - it need not be refused
    finally:
        path.write_text(before)


def test_a_damaged_picture_is_named_with_its_episode_and_frame(broken: Path) -> None:
    path = broken / "ball0/ball0-3/img/5.jpg"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(MvwanError, match=r"episode ball0, frame 4: .*5\.jpg cannot be decoded"):
        read_mvtrack(broken)[0].read_rgb([3, 4])
    Image.new("RGB", (32, 64)).save(path)
    with pytest.raises(MvwanError, match=r"episode ball0, frame 4: .*5\.jpg is 64 x 32 px"):
        read_mvtrack(broken)[0].read_rgb([4])


def test_a_view_in_two_splits_and_a_scene_torn_apart_are_refused(broken: Path) -> None:
    (broken / "train_split.txt").write_text("ball0-1\nball0-2\n")
    (broken / "val_split.txt").write_text("ball0-3\n")
    with pytest.raises(MvwanError, match=r"scene ball0: its views are in different splits \(train, validation\)"):
        read_episodes(broken)
    (broken / "val_split.txt").write_text("ball0-1\n")
    with pytest.raises(MvwanError, match=r"val_split\.txt: ball0-1 is in the split train too"):
        read_episodes(broken)


def test_cameras_are_chosen_by_name(broken: Path) -> None:
    (episode,) = read_episodes(broken, ("view3", "view1"))
    assert [camera.name for camera in episode.cameras] == ["view1", "view3"]
    dataset = WindowDataset([episode], DataConfig(**{**vars(DATA), "cameras": ("view3", "view1")}), 2, "train", 0)
    assert [camera.name for camera in dataset.sample(0).cameras] == ["view3", "view1"]
    with pytest.raises(MvwanError, match=r"no camera 'view4'; available: view1, view2, view3"):
        WindowDataset(read_episodes(broken, ("view4",)), DataConfig(**{**vars(DATA), "cameras": ("view4",)}), 1, "train", 0)
