"""The whole way round: point -> project -> render -> (colours) -> peak -> lift -> the same point."""

import numpy as np
import pytest

from mvwan.cameras import Camera, look_at
from mvwan.heatmaps import colour, peak, render, uncolour
from mvwan.trajectory import lift

SIZE_PX = 256
FOCAL_PX = 0.5 * SIZE_PX / np.tan(np.radians(45) / 2)
POSES = {
    "left": ((-1.0, -0.7, 0.7), (0, 0, 0.1), (0, 0, 1)),
    "right": ((1.0, -0.7, 0.7), (0, 0, 0.1), (0, 0, 1)),
    "top": ((0, 0, 1.4), (0, 0, 0), (0, 1, 0)),
}


@pytest.fixture
def rig():
    intrinsics = np.array([[FOCAL_PX, 0, SIZE_PX / 2], [0, FOCAL_PX, SIZE_PX / 2], [0, 0, 1]])
    return tuple(
        Camera(name=name, width_px=SIZE_PX, height_px=SIZE_PX, intrinsics=intrinsics, world_to_camera=look_at(*pose))
        for name, pose in POSES.items()
    )


def seen_by(cameras, points):
    projected = [camera.project(points) for camera in cameras]
    visible = np.stack([camera.inside(*seen) for camera, seen in zip(cameras, projected, strict=True)])
    return np.stack([uv_px for uv_px, _ in projected]), visible


@pytest.mark.parametrize("sigma_px", [1.5, 2.0, 2.5])
@pytest.mark.parametrize("coloured", [False, True], ids=["heat", "jet"])
def test_a_point_returns_within_2_mm(rig, sigma_px, coloured):
    points = np.random.default_rng(0).uniform((-0.25, -0.25, 0), (0.25, 0.25, 0.25), (15, 3))
    uv_px, visible = seen_by(rig, points)
    assert visible.all()
    heat = render(uv_px, visible, SIZE_PX, SIZE_PX, sigma_px)
    found, residual_px = lift(*peak(uncolour(colour(heat)) if coloured else heat), rig)
    error_mm = 1000 * np.linalg.norm(found - points, axis=-1)
    assert error_mm.max() < (0.05 if coloured else 0.005), "far inside the 2 mm that are promised"
    assert residual_px.max() < 0.02


def test_a_view_that_does_not_see_the_point_is_left_out(rig):
    points = np.array([[0, 0, 0.1], [0.62, 0.0, 0.1], [0, -5.0, 0.1]])
    uv_px, visible = seen_by(rig, points)
    assert visible.sum(axis=0).tolist() == [3, 2, 0]
    found, residual_px = lift(*peak(render(uv_px, visible, SIZE_PX, SIZE_PX, 2.0)), rig)
    np.testing.assert_allclose(found[:2], points[:2], atol=1e-5)
    assert np.isnan(found[2]).all()
    assert np.isnan(residual_px).tolist() == [False, False, True]


def test_residual_tells_that_views_disagree(rig):
    uv_px, _ = seen_by(rig, np.zeros((4, 3)))
    uv_px[0, :, 1] += 12
    _, residual_px = lift(uv_px, np.ones((3, 4)), rig)
    assert (residual_px > 2).all()


@pytest.mark.parametrize(("confidence", "most_mm"), [(0.02, 2), (0.1, 2), (0.5, 5)])
def test_one_wrong_view_does_not_drag_the_point_and_the_residual_tells_of_it(rig, confidence, most_mm):
    draw = np.random.default_rng(3)
    points = draw.uniform((-0.2, -0.2, 0), (0.2, 0.2, 0.2), (20, 3))
    uv_px, _ = seen_by(rig, points)
    uv_px[1] += 57 * np.array([np.cos(0.7), np.sin(0.7)])
    weights = np.ones((3, 20))
    weights[1] = confidence
    found, residual_px = lift(uv_px, weights, rig)
    error_mm = 1000 * np.linalg.norm(found - points, axis=-1)
    assert np.median(error_mm) < most_mm
    projected, _ = seen_by(rig, found)
    squared = np.square(projected - uv_px).sum(axis=-1)
    assert residual_px == pytest.approx(np.sqrt((weights * squared).sum(axis=0) / weights.sum(axis=0)), rel=1e-6)
    assert residual_px.min() > 50 * np.sqrt(confidence / (2 + confidence))


def test_noise_in_all_views_is_averaged(rig):
    draw = np.random.default_rng(4)
    points = draw.uniform((-0.2, -0.2, 0), (0.2, 0.2, 0.2), (200, 3))
    uv_px, _ = seen_by(rig, points)
    found, _ = lift(uv_px + draw.normal(0, 0.5, uv_px.shape), np.ones((3, 200)), rig)
    # A pixel is 3 to 5 mm here.
    assert 1000 * np.linalg.norm(found - points, axis=-1).mean() < 3


@pytest.mark.parametrize("sigma_px", [2.0, 4.0])
def test_peaks_are_found_between_pixels_and_at_borders_through_jet(sigma_px):
    draw = np.random.default_rng(5)
    inner, border = draw.uniform(6, 122, (40, 2)), np.stack([draw.uniform(0.6, 3, 40), draw.uniform(6, 122, 40)], axis=-1)
    for uv_px in (inner, border, 128 - border[:, ::-1]):
        heat = render(uv_px[None], np.ones((1, 40), bool), 128, 128, sigma_px)
        found, confidence = peak(uncolour(colour(heat)))
        assert np.linalg.norm(found[0] - uv_px, axis=-1).max() < 0.1
        assert confidence.min() > 0.5


# ── heat that has no peak worth the name ──────────────────────────────────────────────────────────────────────────────────────────


def test_peaks_that_agree_are_kept_whatever_the_heat_says(rig):
    points = np.random.default_rng(0).uniform((-0.25, -0.25, 0), (0.25, 0.25, 0.25), (15, 3))
    heat = render(*seen_by(rig, points), SIZE_PX, SIZE_PX, 4.0)
    for alone, beside_heat in zip(lift(*peak(heat), rig), lift(*peak(heat), rig, heat), strict=True):
        np.testing.assert_array_equal(alone, beside_heat)


@pytest.mark.parametrize("kind", ["pinhole", "orthographic"])
def test_a_stronger_wrong_spot_in_each_of_two_views_is_outvoted(rig, kind):
    if kind == "orthographic":
        scale = np.array([[SIZE_PX / 1.6, 0, SIZE_PX / 2], [0, SIZE_PX / 1.6, SIZE_PX / 2], [0, 0, 1]])
        rig = [
            Camera(name=c.name, width_px=SIZE_PX, height_px=SIZE_PX, intrinsics=scale, world_to_camera=c.world_to_camera, kind=kind)
            for c in rig
        ]
    points = np.array([[0.05, -0.1, 0.1], [-0.15, 0.1, 0.05]])
    uv_px, visible = seen_by(rig, points)
    assert visible.all()
    heat = 0.6 * render(uv_px, visible, SIZE_PX, SIZE_PX, 5.0)
    wrong_px = uv_px[:2] + np.array([[[40.0, 10.0]], [[-15.0, 45.0]]])
    heat[:2] = np.maximum(heat[:2], 0.9 * render(wrong_px, visible[:2], SIZE_PX, SIZE_PX, 5.0))
    error_mm = [1000 * np.linalg.norm(lift(*peak(heat), rig, *given)[0] - points, axis=-1) for given in ((), (heat,))]
    assert error_mm[0].min() > 60, "peaks alone are led astray"
    assert error_mm[1].max() < 10


def test_a_trace_in_other_views_says_how_deep_a_lone_peak_lies(rig):
    point = np.array([[0.1, -0.05, 0.15]])
    uv_px, visible = seen_by(rig, point)
    heat = render(uv_px, visible, SIZE_PX, SIZE_PX, 8.0) * np.array([0.5, 0.01, 0.01])[:, None, None, None]
    assert np.isnan(lift(*peak(heat), rig)[0]).all()
    found, residual_px = lift(*peak(heat), rig, heat)
    assert 1000 * np.linalg.norm(found - point) < 10
    assert residual_px[0] < 2


def test_a_lone_peak_and_blank_heat_give_no_point(rig):
    uv_px, visible = seen_by(rig, np.array([[0.0, 0.0, 0.1]]))
    heat = render(uv_px, visible, SIZE_PX, SIZE_PX, 8.0)
    heat[1:] = 0
    for lost in (heat, np.zeros_like(heat)):
        found, residual_px = lift(*peak(lost), rig, lost)
        assert np.isnan(found).all()
        assert np.isnan(residual_px).all()


def test_a_single_view_gives_no_point(rig):
    heat = render(*seen_by(rig[:1], np.array([[0.0, 0.0, 0.1]])), SIZE_PX, SIZE_PX, 8.0)
    assert np.isnan(lift(*peak(heat), rig[:1], heat)[0]).all()
