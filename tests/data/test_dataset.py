"""Windows, splits and orders as pure functions; labels that follow pixels; fingerprints; refusals."""

from dataclasses import replace

import numpy as np
import pytest

from mvwan.batch import Episode
from mvwan.cameras import Camera, look_at
from mvwan.config import AugmentConfig, DataConfig
from mvwan.data.dataset import WindowDataset, global_indices, heat_video, held_out, order, read_episodes
from mvwan.data.lerobot import write_dataset
from mvwan.data.transforms import resize
from mvwan.data.windows import spread
from mvwan.errors import MvwanError
from mvwan.heatmaps import peak, render, uncolour

SIZE_PX = 96
POSES = {
    "left": look_at((-0.9, -0.6, 0.6), (0, 0, 0.1)),
    "right": look_at((0.9, -0.6, 0.6), (0, 0, 0.1)),
    "top": look_at((0, 0, 1.2), (0, 0, 0), (0, 1, 0)),
}
CAMERAS = tuple(
    Camera(
        name=name,
        width_px=SIZE_PX,
        height_px=SIZE_PX,
        intrinsics=np.array([[100.0, 0, SIZE_PX / 2], [0, 100.0, SIZE_PX / 2], [0, 0, 1]]),
        world_to_camera=pose,
    )
    for name, pose in POSES.items()
)


def make_episode(name="task/0", num_frames=20, cameras=CAMERAS, point_m=None, **fields):
    """A soft white spot that moves through the workspace, as every camera sees it."""
    if point_m is None:
        point_m = np.linspace((-0.1, -0.1, 0.05), (0.1, 0.1, 0.2), num_frames)
    seen = [camera.project(point_m) for camera in cameras]
    visible = np.stack([camera.inside(*one) for camera, one in zip(cameras, seen, strict=True)])
    heat = render(np.stack([uv_px for uv_px, _ in seen]), visible, SIZE_PX, SIZE_PX, 4.0)
    rgb = np.rint(255 * heat)[..., None].repeat(3, axis=-1).astype(np.uint8)
    return Episode(
        name=name,
        instruction="push the button",
        cameras=cameras,
        fps=10.0,
        point_m=point_m,
        gripper_open=np.linspace(0, 1, len(point_m), dtype=np.float32),
        read_rgb=lambda frames: rgb[:, list(frames)],
        **fields,
    )


def settings(**fields):
    return DataConfig(**{"num_frames": 9, "window_stride": 4, "height_px": 64, "width_px": 96, "validation_share": 0.0, **fields})


def make_dataset(episodes=None, split="train", seed=0, views=3, **fields):
    return WindowDataset([make_episode()] if episodes is None else episodes, settings(**fields), views, split, seed)


# --- windows


@pytest.mark.parametrize(
    ("num_frames", "interval", "stride", "starts"),
    [(20, 1, 4, [0, 4, 8, 11]), (17, 1, 4, [0, 4, 8]), (9, 1, 4, [0]), (10, 1, 100, [0, 1]), (20, 2, 2, [0, 2, 3])],
)
def test_windows_cover_the_episode_to_its_last_frame(num_frames, interval, stride, starts):
    dataset = make_dataset([make_episode(num_frames=num_frames)], frame_interval=interval, window_stride=stride)
    assert [window.frames[0] for window in dataset.windows] == starts
    assert all(len(window.frames) == 9 and set(np.diff(window.frames)) == {interval} for window in dataset.windows)
    assert dataset.windows[-1].frames[-1] == num_frames - 1
    assert len(dataset) == len(starts)


def test_short_episodes_are_named_not_padded():
    dataset = make_dataset([make_episode("b", 8), make_episode("a", 9), make_episode("c", 3)])
    assert dataset.skipped == ("b", "c")
    assert [window.episode.name for window in dataset.windows] == ["a"]


def test_no_episode_long_enough_is_an_error():
    with pytest.raises(MvwanError, match=r"spans 17 recorded frames; the longest of 2 train episodes has 16.*data\.num_frames"):
        make_dataset([make_episode("a", 16), make_episode("b", 10)], frame_interval=2)


def test_windows_do_not_depend_on_the_order_of_the_files():
    episodes = [make_episode(name, frames) for name, frames in (("b", 12), ("a", 15), ("c", 9))]
    ids = [[data.sample_id(index) for index in range(len(data))] for data in (make_dataset(episodes), make_dataset(episodes[::-1]))]
    assert ids[0] == ids[1] == ["a@0#0", "a@4#0", "a@6#0", "b@0#0", "b@3#0", "c@0#0"]


@pytest.mark.parametrize(
    ("past_end", "starts"), [(1, [0, 4, 8, 9]), (6, [0, 4, 8, 12, 14]), (8, [0, 4, 8, 12, 16]), (50, [0, 4, 8, 12, 16])]
)
def test_windows_run_past_the_end_of_an_episode_where_all_stands_still(past_end, starts):
    episode = make_episode(num_frames=17)
    dataset = make_dataset([episode], past_end=past_end)
    assert [window.frames[0] for window in dataset.windows] == starts
    last = dataset.sample(len(dataset) - 1)
    frames = np.minimum(np.arange(starts[-1], starts[-1] + 9), 16)
    np.testing.assert_array_equal(last.point_m, episode.point_m[frames])
    np.testing.assert_array_equal(last.rgb, resize(episode.read_rgb(frames.tolist()), episode.cameras, 64, 96)[0])
    assert len({dataset.sample_id(index) for index in range(len(dataset))}) == len(dataset)


def test_a_short_episode_has_windows_when_they_may_run_past_its_end():
    dataset = make_dataset([make_episode("a", 3)], past_end=6)
    assert dataset.skipped == () and [window.frames for window in dataset.windows] == [(0, 1, *[2] * 7)]


# --- samples


def test_a_sample_shows_its_frames_from_every_view():
    episode = make_episode()
    dataset = make_dataset([episode], frame_interval=2, window_stride=2)
    sample = dataset.sample(1)
    frames = np.arange(2, 20, 2)
    assert sample.sample_id == "task/0@2#0"
    assert sample.rgb.shape == (3, 9, 64, 96, 3)
    np.testing.assert_array_equal(sample.point_m, episode.point_m[frames])
    np.testing.assert_array_equal(sample.gripper_open, episode.gripper_open[frames])
    assert sample.visible.all()
    found, _ = peak(sample.rgb[..., 0] / 255)
    np.testing.assert_allclose(found, sample.uv_px, atol=0.15)


def test_the_heat_video_peaks_at_the_point():
    sample = make_dataset().sample(0)
    video = heat_video(sample, 2.0)
    assert video.shape == sample.rgb.shape
    assert video.dtype == np.uint8
    found, confidence = peak(uncolour(video))
    np.testing.assert_allclose(found, sample.uv_px, atol=0.02)
    assert confidence.min() > 0.8


def test_points_outside_are_flagged_and_never_drawn_on_the_edge():
    """A point that leaves the picture through its side, one behind a camera and one without a label: none leaves a mark."""
    point_m = np.tile([0.0, 0.0, 0.1], (9, 1))
    point_m[3] = (0.9, 0.0, 0.1)
    point_m[5] = (0, 0, 2.0)
    point_m[7] = np.nan
    sample = make_dataset([make_episode(point_m=point_m)]).sample(0)
    top = list(POSES).index("top")
    assert sample.visible[top].tolist() == [True, True, True, False, True, False, True, False, True]
    assert not sample.visible[:, 7].any()
    assert sample.uv_px[top, 3, 0] > 96, "the label tells where the point is; it is not moved to the edge"
    video = heat_video(sample, 2.0)
    empty = video[~sample.visible]
    np.testing.assert_array_equal(empty, np.broadcast_to(np.array([0, 0, 128], np.uint8), empty.shape))
    assert all(len(np.unique(picture)) > 5 for picture in video[sample.visible])


def test_cameras_are_chosen_by_name_and_in_order():
    every, chosen = make_dataset().sample(0), make_dataset(views=2, cameras=("top", "left")).sample(0)
    assert [camera.name for camera in chosen.cameras] == ["top", "left"]
    np.testing.assert_array_equal(chosen.rgb, every.rgb[[2, 0]])
    np.testing.assert_array_equal(chosen.uv_px, every.uv_px[[2, 0]])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"views": 2}, r"model\.views=2, but 3 cameras are chosen .*available: left, right, top"),
        ({"cameras": ("left", "right", "topp")}, r"no camera 'topp'; available: left, right, top. Did you mean 'top'"),
        ({"cameras": ("left", "left", "top")}, "named twice"),
        ({"episodes": []}, r"no episodes.*data\.root"),
        ({"episodes": [make_episode("a"), make_episode("a")]}, "'a' occurs twice"),
        ({"episodes": [make_episode("a"), make_episode("b", cameras=CAMERAS[:2])]}, "episode b has no camera 'top'"),
        ({"validation_share": 1.0}, r"data\.validation_share=1\.0: no episode of 1 is left"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(fields, words):
    with pytest.raises(MvwanError, match=words):
        make_dataset(**fields)


def test_pictures_of_another_size_than_the_camera_states_are_refused():
    wide = replace(make_episode(), read_rgb=lambda frames: np.zeros((3, len(frames), SIZE_PX, SIZE_PX + 1, 3), np.uint8))
    with pytest.raises(MvwanError, match=r"task/0: pictures are .*97.*camera left needs"):
        make_dataset([wide]).sample(0)


# --- variants


def test_variants_are_drawn_from_seed_and_name_and_keep_labels_on_the_pixels():
    augment = AugmentConfig(variants=2, crop_share=0.2)
    dataset = make_dataset(augment=augment)
    assert dataset.num_variants == 3
    plain, first, again, second = (dataset.sample(1, variant) for variant in (0, 1, 1, 2))
    np.testing.assert_array_equal(plain.rgb, make_dataset().sample(1).rgb)
    np.testing.assert_array_equal(first.rgb, again.rgb)
    np.testing.assert_array_equal(first.point_m, again.point_m)
    assert first.sample_id == "task/0@4#1"
    for one, other in ((plain, first), (first, second), (first, make_dataset(augment=augment, seed=1).sample(1, 1))):
        assert (one.rgb != other.rgb).any()
        assert np.abs(one.point_m - other.point_m).max() > 1e-3
    for sample in (first, second):
        found, _ = peak(sample.rgb[..., 0] / 255)
        np.testing.assert_allclose(found[sample.visible], sample.uv_px[sample.visible], atol=0.3)
        projected = np.stack([camera.project(sample.point_m)[0] for camera in sample.cameras])
        np.testing.assert_allclose(projected, sample.uv_px, atol=1e-3)


def test_validation_is_never_augmented():
    episodes = [make_episode(str(name)) for name in range(4)]
    dataset = make_dataset(episodes, "validation", validation_share=0.5, augment=AugmentConfig(variants=2))
    assert dataset.num_variants == 1
    with pytest.raises(AssertionError, match="variant 1 of 1"):
        dataset.sample(0, 1)


# --- what the gripper and the hand did


def turning(name="turn", num_frames=20, **fields):
    """An episode whose hand turns 10 degrees per frame about its own z."""
    angle_rad = np.radians(10.0 * np.arange(num_frames))
    quaternion = np.stack([np.cos(angle_rad / 2), 0 * angle_rad, 0 * angle_rad, np.sin(angle_rad / 2)], axis=1)
    return make_episode(name, num_frames, extra={"hand_quaternion_wxyz": quaternion}, **fields)


def test_turns_are_since_the_first_frame_of_the_window_and_the_same_in_every_variant():
    dataset = make_dataset([turning()], augment=AugmentConfig(variants=1, rotation_deg=(30.0, 30.0, 30.0)))
    for index in (0, 2):
        gripper_open, rotation_deg = dataset.actions(index)
        np.testing.assert_allclose(rotation_deg, [(0, 0, 10 * frame) for frame in range(9)], atol=1e-4)
        for sample in (dataset.sample(index), dataset.sample(index, 1)):
            np.testing.assert_array_equal(sample.rotation_deg, rotation_deg)
            np.testing.assert_array_equal(sample.gripper_open, gripper_open)
    assert not np.allclose(dataset.actions(0)[0], dataset.actions(2)[0])
    gripper_open, rotation_deg = make_dataset().actions(0)
    assert np.isnan(rotation_deg).all() and np.isfinite(gripper_open).all()


@pytest.mark.parametrize("quaternion", [np.zeros((20, 4)), np.ones((20, 4)), np.ones((20, 3))])
def test_what_is_no_orientation_is_refused(quaternion):
    with pytest.raises(MvwanError, match="episode task/0: hand_quaternion_wxyz "):
        make_episode(extra={"hand_quaternion_wxyz": quaternion}).check()
    turning().check()


def test_a_head_needs_labels_in_some_window():
    unknown = replace(make_episode(), gripper_open=np.full(20, np.nan, np.float32))
    for episodes, heads in (([make_episode()], ("none", "gripper")), ([unknown], ("none",)), ([unknown, turning()], ("gripper_rotation",))):
        for head in heads:
            make_dataset(episodes).check_actions(head)
    for head in ("gripper", "gripper_rotation"):
        with pytest.raises(MvwanError, match=rf"model\.action_head={head}: no window of the dataset says how far the gripper is open"):
            make_dataset([unknown]).check_actions(head)
    with pytest.raises(MvwanError, match=r"model\.action_head=gripper_rotation: .* how the hand is turned .*hand_qw.* or set .*=gripper\."):
        make_dataset().check_actions("gripper_rotation")
    wide = replace(make_episode(), gripper_open=np.linspace(0, 0.08, 20, dtype=np.float32) * 1000)
    with pytest.raises(MvwanError, match=r"episode task/0 has gripper_open=4\.21053, needs 0 \(closed\) to 1 \(open\)"):
        make_dataset([wide]).check_actions("gripper")
    make_dataset([wide]).check_actions("none")


# --- split and order


def test_the_split_is_by_episode_and_a_function_of_seed_and_names():
    names = [f"task/{index:03}" for index in range(20)]
    first = held_out(names, 0, 0.2)
    assert first == held_out(names[::-1], 0, 0.2)
    assert len(first) == 4
    assert first < set(names)
    assert first != held_out(names, 1, 0.2)
    more = held_out([*names, "task/020"], 0, 0.2)
    assert len(first & more) >= 3, "one more episode moves at most one"


@pytest.mark.parametrize(
    ("count", "share", "held"), [(1, 0.2, 0), (2, 0.1, 1), (2, 0.9, 1), (5, 0.2, 1), (5, 0.0, 0), (5, 1.0, 5), (0, 0.2, 0)]
)
def test_how_many_are_held_out(count, share, held):
    assert len(held_out([str(index) for index in range(count)], 0, share)) == held


def test_splits_share_no_episode():
    episodes = [make_episode(str(name), 9) for name in range(5)]
    train, validation = (make_dataset(episodes, split, validation_share=0.4) for split in ("train", "validation"))
    names = [{window.episode.name for window in dataset.windows} for dataset in (train, validation)]
    assert [len(one) for one in names] == [3, 2]
    assert not names[0] & names[1]


def test_one_episode_leaves_validation_empty():
    assert len(make_dataset(split="validation", validation_share=0.2)) == 0
    assert len(make_dataset(split="train", validation_share=0.2)) == 4


def test_order_is_a_permutation_of_seed_and_epoch():
    assert sorted(order(3, 5, 50)) == list(range(50))
    np.testing.assert_array_equal(order(3, 5, 50), order(3, 5, 50))
    for other in (order(3, 6, 50), order(4, 5, 50)):
        assert (order(3, 5, 50) != other).any()


@pytest.mark.parametrize(("items_per_step", "num_items"), [(4, 10), (3, 9), (7, 3), (1, 1)])
def test_steps_walk_through_the_epochs_without_a_gap(items_per_step, num_items):
    steps = 12
    walked = np.concatenate([global_indices(5, step, items_per_step, num_items) for step in range(steps)])
    epochs = np.concatenate([order(5, epoch, num_items) for epoch in range(steps * items_per_step // num_items + 1)])
    np.testing.assert_array_equal(walked, epochs[: len(walked)])


# --- fingerprints


def test_the_fingerprint_changes_with_whatever_pixels_and_labels_depend_on():
    augment = AugmentConfig(variants=1)
    base = make_dataset(augment=augment)
    moved = make_episode().point_m + 0.01
    others = [
        make_dataset(augment=augment, height_px=96),
        make_dataset(augment=augment, num_frames=5),
        make_dataset(augment=augment, frame_interval=2),
        make_dataset(augment=augment, window_stride=2),
        make_dataset(augment=augment, cameras=("right", "left", "top")),
        make_dataset(augment=augment, seed=1),
        make_dataset(augment=AugmentConfig(variants=2)),
        make_dataset(augment=AugmentConfig(variants=1, crop_share=0.2)),
        make_dataset(augment=AugmentConfig(variants=1, translation_m=0.2)),
        make_dataset([replace(make_episode(), instruction="pull")], augment=augment),
        make_dataset([replace(make_episode(), point_m=moved)], augment=augment),
        make_dataset([replace(make_episode(), gripper_open=np.zeros(20, np.float32))], augment=augment),
        make_dataset([turning("task/0")], augment=augment),
        make_dataset([make_episode(fingerprint="1")], augment=augment),
        make_dataset([make_episode(fingerprint="2")], augment=augment),
        make_dataset([make_episode(cameras=(CAMERAS[0].cropped(1, 0, SIZE_PX, SIZE_PX), *CAMERAS[1:]))], augment=augment),
        make_dataset(
            [replace(make_episode(), read_rgb=lambda frames: np.zeros((3, len(frames), SIZE_PX, SIZE_PX, 3), np.uint8))], augment=augment
        ),
    ]
    prints = [dataset.fingerprint for dataset in (base, *others)]
    assert len(set(prints)) == len(prints)
    assert make_dataset(augment=augment).fingerprint == base.fingerprint


def test_a_samples_fingerprint_ignores_what_it_does_not_depend_on():
    base = make_dataset().sample_fingerprint(0)
    assert make_dataset([make_episode(), make_episode("other")], window_stride=2).sample_fingerprint(1) != base
    assert make_dataset([make_episode("zz"), make_episode()], window_stride=2).sample_fingerprint(0) == base
    assert make_dataset(seed=1, augment=AugmentConfig(variants=3)).sample_fingerprint(0) == base
    augmented = make_dataset(seed=1, augment=AugmentConfig(variants=3))
    assert augmented.sample_fingerprint(0, 1) != make_dataset(seed=2, augment=AugmentConfig(variants=3)).sample_fingerprint(0, 1)
    assert augmented.sample_fingerprint(0, 1) == make_dataset(seed=1, augment=AugmentConfig(variants=1)).sample_fingerprint(0, 1)


# --- folders


def test_a_missing_folder_a_file_and_a_strange_folder_are_refused(tmp_path):
    with pytest.raises(MvwanError, match=r"no such folder\. mvwan reads LeRobot v3"):
        read_episodes(tmp_path / "nowhere")
    with pytest.raises(MvwanError, match=r"data\.root=''"):
        read_episodes("")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(MvwanError, match=r"found notes\.txt"):
        read_episodes(tmp_path)
    with pytest.raises(MvwanError, match="a file, not a folder"):
        read_episodes(tmp_path / "notes.txt")


def test_a_recorded_folder_becomes_samples(tmp_path):
    episodes = [make_episode("a", 11), make_episode("b", 9)]
    with write_dataset(tmp_path / "recorded", cameras=CAMERAS, fps=10, action_names=["x", "y", "z", "grip"], robot_type="point") as writer:
        for seed, episode in enumerate(episodes):
            writer.add_episode(
                name=episode.name,
                instruction=episode.instruction,
                layout_seed=seed,
                rgb=episode.read_rgb(range(episode.num_frames)),
                point_m=episode.point_m,
                hand_m=episode.point_m,
                gripper_open=episode.gripper_open,
                action=np.zeros((episode.num_frames, 4)),
                success=np.ones(episode.num_frames, bool),
            )
    dataset = make_dataset(read_episodes(tmp_path / "recorded", ("top", "left")), views=2)
    assert [dataset.sample_id(index) for index in range(len(dataset))] == ["a@0#0", "a@2#0", "b@0#0"]
    wanted = make_dataset(episodes, views=2, cameras=("top", "left"))
    for index in range(3):
        sample, true = dataset.sample(index), wanted.sample(index)
        np.testing.assert_allclose(sample.uv_px, true.uv_px, atol=1e-4)
        np.testing.assert_allclose(peak(sample.rgb[..., 0] / 255)[0], true.uv_px, atol=0.5)
    assert dataset.fingerprint == make_dataset(read_episodes(tmp_path / "recorded", ("top", "left")), views=2).fingerprint


def test_spread_takes_both_ends() -> None:
    assert spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(10, 4) == [0, 3, 6, 9]
    assert spread(7, 1) == [3]
    assert spread(7, 0) == []
