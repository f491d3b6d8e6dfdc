"""Heatmaps: what is drawn, what is not, and how exactly it is found again through colours, blur and noise."""

import numpy as np
import pytest

from mvwan.heatmaps import colour, peak, render, uncolour


def distance_px(found, true):
    return np.linalg.norm(found - true, axis=-1)


def blurred(rgb, sigma_px):
    """rgb [N H W 3] uint8 through a Gaussian blur, as a video VAE softens its pictures."""
    kernel = np.exp(-0.5 * np.square(np.arange(-5, 6) / sigma_px))
    kernel /= kernel.sum()
    values = rgb.astype(np.float64)
    for axis in (1, 2):
        padded = np.pad(values, [(5, 5) if a == axis else (0, 0) for a in range(4)], mode="edge")
        values = sum(weight * np.take(padded, range(i, i + values.shape[axis]), axis) for i, weight in enumerate(kernel))
    return np.rint(values).astype(np.uint8)


def test_a_gaussian_at_pixel_centres():
    heat = render(np.array([2.5, 1.5]), np.array(True), 4, 6, 1.0)
    assert heat.shape == (4, 6)
    assert heat.dtype == np.float32
    assert heat[1, 2] == 1
    np.testing.assert_allclose(heat[1, 3], np.exp(-0.5), rtol=1e-6)
    np.testing.assert_allclose(heat[3, 4], np.exp(-0.5 * (2**2 + 2**2)), rtol=1e-6)


def test_invisible_points_leave_the_picture_empty():
    uv_px = np.array([[np.nan, np.nan], [-30.0, 10.0], [10.0, 10.0]])
    heat = render(uv_px, np.array([False, False, True]), 32, 32, 1.5)
    assert heat.max(axis=(1, 2)).tolist()[:2] == [0, 0]
    assert heat[2].max() > 0.8


def test_a_visible_point_outside_is_a_programmers_error():
    with pytest.raises(AssertionError, match="outside the picture"):
        render(np.array([[-3.0, 10.0]]), np.array([True]), 32, 32, 1.5)


def test_colours_are_jet():
    heat = np.array([0, 1 / 8, 3 / 8, 1 / 2, 5 / 8, 7 / 8, 1])
    wanted = [(0, 0, 128), (0, 0, 255), (0, 255, 255), (128, 255, 128), (255, 255, 0), (255, 0, 0), (128, 0, 0)]
    np.testing.assert_allclose(colour(heat).astype(int), wanted, atol=4)
    assert colour(np.array([0.0, 1.0])).tolist() == [[0, 0, 128], [128, 0, 0]]


def test_uncolour_is_the_inverse_of_colour():
    heat = np.linspace(0, 1, 2001).reshape(3, 667)
    assert np.abs(uncolour(colour(heat)) - heat).max() < 1 / 255


@pytest.mark.parametrize(("size_px", "sigma_px"), [(256, 1.5), (256, 2.0), (128, 2.5), (64, 1.0)])
def test_peak_finds_what_render_drew(size_px, sigma_px):
    uv_px = np.random.default_rng(0).uniform(0, size_px, (30, 2))
    heat = render(uv_px, np.ones(30, bool), size_px, size_px, sigma_px)
    found, confidence = peak(heat)
    assert distance_px(found, uv_px).max() < 1e-3
    assert confidence.min() > 0.7
    found, _ = peak(uncolour(colour(heat)))
    assert distance_px(found, uv_px).max() < 0.02


def test_a_spot_cut_by_the_edge_is_not_drawn_inwards():
    uv_px = np.array([[0.1, 30.0], [63.9, 63.9], [20.0, 0.0]])
    found, _ = peak(uncolour(colour(render(uv_px, np.ones(3, bool), 64, 64, 2.5))))
    assert distance_px(found, uv_px).max() < 0.05


@pytest.mark.parametrize(("size_px", "sigma_px"), [(256, 1.5), (128, 2.5)])
def test_peak_survives_blur_and_noise(size_px, sigma_px):
    rng = np.random.default_rng(0)
    uv_px = rng.uniform(8, size_px - 8, (15, 2))
    soft = blurred(colour(render(uv_px, np.ones(15, bool), size_px, size_px, sigma_px)), 0.8)
    noisy = np.clip(soft + rng.normal(0, 4, soft.shape), 0, 255).astype(np.uint8)
    found, confidence = peak(uncolour(noisy))
    assert distance_px(found, uv_px).mean() < 0.15
    assert distance_px(found, uv_px).max() < 0.6
    assert confidence.mean() > 0.6


@pytest.mark.parametrize("heat", [np.zeros((32, 64)), np.full((32, 64), 0.7), np.full((32, 64), 1.0)])
def test_a_flat_picture_has_no_peak(heat):
    uv_px, confidence = peak(heat)
    assert confidence == 0
    assert uv_px.tolist() == [32, 16]


def test_confidence_tells_a_lone_spot_from_two_and_from_noise():
    spots = render(np.array([[20.0, 30.0], [90.0, 100.0]]), np.ones(2, bool), 128, 128, 2.5)
    noise = np.random.default_rng(0).random((128, 128))
    uv_px, confidence = peak(np.stack([spots[0], 0.8 * spots[0] + spots[1], noise]))
    assert confidence[0] > 0.9
    assert 0.3 < confidence[1] < 0.7
    assert confidence[2] < 0.1
    assert distance_px(uv_px[1], (90, 100)) < 0.1


def test_a_faint_spot_is_less_sure():
    heat = render(np.full((3, 2), 40.3), np.ones(3, bool), 64, 64, 2.0) * np.array([1, 0.4, 0.005])[:, None, None]
    uv_px, confidence = peak(heat)
    assert confidence[0] > 0.9
    assert 0.3 < confidence[1] < 0.45
    assert confidence[2] == 0
    assert distance_px(uv_px[1], (40.3, 40.3)) < 0.01


def test_leading_axes_are_kept():
    heat = render(np.full((3, 5, 2), 10.0), np.ones((3, 5), bool), 32, 48, 1.5)
    uv_px, confidence = peak(heat)
    assert heat.shape == (3, 5, 32, 48)
    assert colour(heat).shape == (3, 5, 32, 48, 3)
    assert uv_px.shape == (3, 5, 2)
    assert confidence.shape == (3, 5)
    assert uv_px.dtype == confidence.dtype == np.float32
