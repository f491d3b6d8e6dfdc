"""Metrics by hand: given frames never count, lost points are counted as lost, means add up as sums and counts."""

import math

import numpy as np
import pytest

from mvwan import metrics
from mvwan.cameras import Camera, look_at
from mvwan.metrics import Tally


@pytest.fixture
def truth():
    """[2 views, 9 frames, 2]: 9 frames are 3 latent frames."""
    return np.random.default_rng(0).uniform(10, 50, (2, 9, 2))


def test_tallies_are_put_together_before_they_are_summarised():
    both = Tally(values=(10.0,), frames=(1,)) + Tally(values=(0.0, 1.0, 1.0), frames=(1, 2, 3), lost=2)
    assert both == Tally(values=(10.0, 0.0, 1.0, 1.0), frames=(1, 1, 2, 3), lost=2)
    assert both.at(1).values == (10, 0) and both.at(3).values == (1,) and both.at(0) == Tally()
    # By hand: 95 % of the way along the sorted 0, 1, 1, 10 is place 2.85, so 1 + 0.85 * 9.
    assert both.quantile(0.95) == pytest.approx(8.65)
    assert (both.count, both.mean, both.quantile(0.5), both.quantile(1.0)) == (4, 3, 1, 10)
    assert math.isnan(Tally().mean) and math.isnan(Tally().quantile(0.5))


@pytest.mark.parametrize(("condition_frames", "scored"), [(0, 9), (1, 8), (2, 4)])
def test_given_frames_are_in_neither_sum_nor_count(truth, condition_frames, scored):
    predicted = truth + np.array([3, 4])
    predicted[:, : 9 - scored] += 1000
    tallies = metrics.peak_error_px(predicted, truth, np.ones((2, 9), bool), condition_frames)
    assert [tally.count for tally in tallies] == [scored, scored]
    np.testing.assert_allclose([tally.mean for tally in tallies], 5)


def test_invisible_points_do_not_count_and_lost_ones_are_told(truth):
    visible = np.ones((2, 9), bool)
    visible[1, 5] = False
    predicted = truth + np.array([3, 4])
    predicted[1, 5] = 1e6
    predicted[0, 3] = np.nan
    first, second = metrics.peak_error_px(predicted, truth, visible)
    assert (first.count, first.lost, second.count, second.lost) == (7, 1, 7, 0)
    assert (first.frames, second.frames) == ((1, 2, 4, 5, 6, 7, 8), (1, 2, 3, 4, 6, 7, 8))
    assert [(share.mean, share.count) for share in metrics.lost_share(predicted, visible)] == [(1 / 8, 8), (0, 7)]
    np.testing.assert_allclose((first.mean, second.mean), 5)
    found, _ = metrics.pck(predicted, truth, visible, 5.001)
    assert (sum(found.values), found.count) == (7, 8)


def test_pck_counts_within_the_threshold(truth):
    predicted = truth.copy()
    predicted[0, :, 0] += np.arange(9)
    first, second = metrics.pck(predicted, truth, np.ones((2, 9), bool), 4.001)
    assert (first.mean, second.mean) == (0.5, 1.0)


def test_error_in_space_is_in_millimetres():
    truth = np.zeros((5, 3))
    truth[4] = np.nan
    predicted = np.full((5, 3), 0.01)
    predicted[0] = 9
    predicted[2] = np.nan
    tally = metrics.error_3d_mm(predicted, truth)
    assert (tally.count, tally.lost) == (2, 1)
    np.testing.assert_allclose(tally.mean, 10 * math.sqrt(3))


def test_view_disagreement_is_zero_when_the_rays_meet():
    intrinsics = np.array([[300.0, 0, 128], [0, 300, 128], [0, 0, 1]])
    eyes = {"left": (-1, -0.5, 0.5), "right": (1, -0.5, 0.5), "front": (0, -1.2, 0.3)}
    cameras = [
        Camera(name=name, width_px=256, height_px=256, intrinsics=intrinsics, world_to_camera=look_at(eye, (0, 0, 0)))
        for name, eye in eyes.items()
    ]
    points = np.random.default_rng(0).uniform(-0.2, 0.2, (5, 3))
    uv_px = np.stack([camera.project(points)[0] for camera in cameras])
    confidence = np.ones((3, 5))
    assert max(tally.mean for tally in metrics.view_disagreement_px(uv_px, confidence, cameras)) < 1e-6

    uv_px[0] += (0, 10)
    first, second, third = metrics.view_disagreement_px(uv_px, confidence, cameras)
    assert first.mean > 1
    assert first.count == second.count == third.count == 4

    confidence[0, 1:3] = 0
    confidence[1, 2] = 0
    first, second, third = metrics.view_disagreement_px(uv_px, confidence, cameras)
    assert [(tally.count, tally.lost) for tally in (first, second, third)] == [(2, 0), (3, 0), (3, 1)]


def test_psnr_by_hand_and_of_equal_pictures():
    true = np.full((2, 5, 32, 32, 3), 100, np.uint8)
    predicted = true.copy()
    predicted[0, 1:] += 16
    predicted[:, 0] = 0
    first, second = metrics.squared_error(predicted, true)
    assert first.mean == 256
    assert first.count == 4
    np.testing.assert_allclose(metrics.psnr_db(first.mean), 20 * math.log10(255 / 16))
    assert metrics.psnr_db(second.mean) == math.inf


def test_ssim_of_equal_and_of_unlike_pictures():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 255, (2, 5, 32, 32, 3), dtype=np.uint8)
    predicted = true.copy()
    predicted[1] = rng.integers(0, 255, predicted[1].shape, dtype=np.uint8)
    predicted[:, 0] = 0
    same, unlike = metrics.ssim(predicted, true)
    assert (same.count, unlike.count) == (4, 4) and same.frames == (1, 2, 3, 4)
    np.testing.assert_allclose(same.mean, 1, atol=1e-5)
    assert abs(unlike.mean) < 0.1


def test_ssim_of_even_pictures_by_hand():
    true = np.full((1, 5, 32, 32, 3), 100, np.uint8)
    # Without any structure only the means are left of equation 13: (2 * 100 * 150 + c) / (100^2 + 150^2 + c), c = (0.01 * 255)^2.
    by_hand = (2 * 100 * 150 + 2.55**2) / (100**2 + 150**2 + 2.55**2)
    assert metrics.ssim(true + np.uint8(50), true)[0].mean == pytest.approx(by_hand, abs=5e-4), "float32 costs 2e-4"


def test_hold_first_and_constant_velocity():
    line = np.arange(9.0)[None, :, None] * np.array([1.0, -2.0])
    held = metrics.hold_first(line + 5, 1)
    assert held.shape == line.shape
    assert (held == 5).all()
    assert metrics.hold_first(line, 1, num_given=3)[0, :, 0].tolist() == [0, 1, 2, 2, 2, 2, 2, 2, 2]
    np.testing.assert_allclose(metrics.constant_velocity(line, 1, 5), line)
    bent = line.copy()
    bent[:, 5:] = 77
    np.testing.assert_allclose(metrics.constant_velocity(bent, 1, 5), line)
    assert bent[0, 5, 0] == 77, "the input stays as it is"
    with pytest.raises(AssertionError, match="two or more"):
        metrics.constant_velocity(line, 1, 1)


def test_intervals_are_wilsons():
    # Wilson (1927), the worked example of Newcombe (1998): 81 of 263 gives 0.2553 to 0.3662.
    rate = metrics.success_rate([True] * 81 + [False] * 182)
    assert (rate["low"], rate["high"]) == (pytest.approx(0.2553, abs=5e-4), pytest.approx(0.3662, abs=5e-4))
    assert metrics.success_rate([True] * 25)["low"] == pytest.approx(0.8668, abs=1e-3)
    assert metrics.rate_in_words(metrics.success_rate([True] * 21 + [False] * 4)) == "21/25, 65–94 %"
