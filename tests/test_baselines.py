"""Baselines on windows whose answer is known: the ball moves evenly, so going on is right and holding is not."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from mvwan.baselines import NearestDemonstration, constant_velocity, hold_first
from mvwan.config import DataConfig
from mvwan.data.dataset import WindowDataset, read_episodes

DATA = {"num_frames": 5, "frame_interval": 1, "window_stride": 1, "height_px": 64, "width_px": 64}


@pytest.fixture(scope="module")
def windows(tiny_demonstrations: Path) -> dict[str, WindowDataset]:
    episodes = read_episodes(tiny_demonstrations)
    return {split: WindowDataset(episodes, DataConfig(**DATA), 3, split, seed=0) for split in ("train", "validation")}


def test_holding_repeats_the_last_given_frame(windows) -> None:
    sample = windows["validation"].sample(0)
    held = hold_first(sample, 1)
    assert held.rgb is not None
    assert (held.rgb == sample.rgb[:, :1]).all() and (held.uv_px == sample.uv_px[:, :1]).all()
    assert (held.point_m == sample.point_m[0]).all()


@pytest.mark.parametrize("given", [1, 2])
def test_going_on_is_exact_where_the_point_moves_evenly(windows, given) -> None:
    validation = windows["validation"]
    answer = constant_velocity(validation.sample(2), validation.windows[2], given)
    assert answer.point_m == pytest.approx(validation.sample(2).point_m, abs=1e-5)
    assert answer.uv_px == pytest.approx(validation.sample(2).uv_px, abs=1e-2)
    assert answer.rgb is None


def test_at_the_start_of_an_episode_nothing_is_known_of_its_speed(windows) -> None:
    validation = windows["validation"]
    assert validation.windows[0].frames[0] == 0
    answer = constant_velocity(validation.sample(0), validation.windows[0], 1)
    assert (answer.point_m == validation.sample(0).point_m[0]).all()


def test_the_nearest_demonstration_of_a_training_window_is_itself(windows) -> None:
    training = windows["train"]
    nearest = NearestDemonstration(training, 1)
    for index in (0, 3, len(training) - 1):
        sample = training.sample(index)
        answer = nearest.answer(sample)
        assert answer is not None and answer.rgb is not None
        assert (answer.rgb == sample.rgb).all()
        assert answer.point_m == pytest.approx(sample.point_m)
        assert answer.uv_px == pytest.approx(sample.uv_px, abs=1e-3)


@pytest.mark.parametrize("given", [1, 2])
def test_the_nearest_demonstration_keeps_what_is_given_and_goes_its_own_way_from_there(windows, given) -> None:
    sample, last = windows["validation"].sample(1), given - 1
    answer = NearestDemonstration(windows["train"], given).answer(sample)
    assert answer is not None and answer.rgb is not None
    steps_m = [np.diff(windows["train"].sample(index).point_m[last:], axis=0) for index in range(len(windows["train"]))]
    assert (answer.point_m[:given] == sample.point_m[:given]).all() and (answer.rgb[:, :given] == sample.rgb[:, :given]).all()
    assert any(np.allclose(np.diff(answer.point_m[last:], axis=0), path, atol=1e-9) for path in steps_m)
    seen = np.stack([camera.project(answer.point_m)[0] for camera in sample.cameras])
    assert answer.uv_px == pytest.approx(seen)


def test_both_pictures_and_points_choose_the_nearest_demonstration(windows) -> None:
    """Pictures of one window with the point of another: whichever of the two is found, no third one is nearer in either."""
    training = windows["train"]
    nearest = NearestDemonstration(training, 1)
    one, other = training.sample(0), training.sample(len(training) - 1)
    by_point = nearest.answer(dataclasses.replace(one, rgb=np.full_like(one.rgb, 90)))
    by_picture = nearest.answer(dataclasses.replace(other, point_m=np.full_like(other.point_m, np.nan)))
    assert by_point is not None and by_picture is not None and by_picture.rgb is not None
    assert np.diff(by_point.point_m, axis=0) == pytest.approx(np.diff(one.point_m, axis=0), abs=1e-6)
    assert (by_picture.rgb[:, 1:] == other.rgb[:, 1:]).all()
    assert by_picture.point_m[1:] == pytest.approx(other.point_m[1:]), "a start without a label moves nothing"


def test_without_a_demonstration_of_the_instruction_there_is_no_answer(windows) -> None:
    sample = dataclasses.replace(windows["validation"].sample(0), instruction="dance")
    assert NearestDemonstration(windows["train"], 1).answer(sample) is None


def test_pictures_read_together_are_those_of_the_whole_samples(windows) -> None:
    training = windows["train"]
    wanted = [*range(len(training)), 0]
    read = list(training.pictures_at(wanted, 2))
    assert len(read) == len(wanted)
    assert all((pictures == training.sample(index).rgb[:, 2]).all() for pictures, index in zip(read, wanted, strict=True))


def test_a_predecessor_without_a_label_says_nothing_of_speed(windows) -> None:
    validation = windows["validation"]
    window = validation.windows[2]
    point_m = window.episode.point_m.copy()
    point_m[window.frames[0] - 1] = np.nan
    unlabelled = dataclasses.replace(window, episode=dataclasses.replace(window.episode, point_m=point_m))
    answer = constant_velocity(validation.sample(2), unlabelled, 1)
    assert (answer.point_m == validation.sample(2).point_m[0]).all()
