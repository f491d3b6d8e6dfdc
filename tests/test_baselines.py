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
    nearest = NearestDemonstration(training)
    for index in (0, 3, len(training) - 1):
        sample = training.sample(index)
        answer = nearest.answer(sample, 1)
        assert answer.rgb is not None
        assert (answer.rgb == sample.rgb).all()
        assert answer.point_m == pytest.approx(sample.point_m)
        assert answer.uv_px == pytest.approx(sample.uv_px, abs=1e-3)


def test_the_nearest_demonstration_keeps_what_is_given_and_goes_its_own_way(windows) -> None:
    sample = windows["validation"].sample(1)
    answer = NearestDemonstration(windows["train"]).answer(sample, 1)
    paths = [windows["train"].sample(index).point_m[1:] for index in range(len(windows["train"]))]
    assert (answer.point_m[0] == sample.point_m[0]).all()
    assert any(np.array_equal(answer.point_m[1:], path) for path in paths)
    assert answer.rgb is not None and (answer.rgb[:, 0] == sample.rgb[:, 0]).all()


def test_without_a_demonstration_of_the_instruction_it_holds(windows) -> None:
    sample = dataclasses.replace(windows["validation"].sample(0), instruction="dance")
    answer = NearestDemonstration(windows["train"]).answer(sample, 1)
    assert (answer.point_m == sample.point_m[0]).all()


def test_first_pictures_are_those_of_the_whole_sample(windows) -> None:
    assert (windows["train"].first_pictures(2) == windows["train"].sample(2).rgb[:, 0]).all()
