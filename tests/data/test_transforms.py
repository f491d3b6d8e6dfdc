"""Transforms: a spot drawn where a point projects is still where the point projects after every cut, resize and move."""

import numpy as np
import pytest

from mvwan.cameras import Camera, look_at
from mvwan.config import AugmentConfig
from mvwan.data.transforms import crop_and_resize, draw_augmentation, move, resize, rigid
from mvwan.heatmaps import peak, render

WIDTH_PX, HEIGHT_PX = 200, 160
POINTS = np.array([[0.0, 0.0, 0.1], [0.05, -0.04, 0.15], [-0.06, 0.05, 0.05]])


@pytest.fixture
def cameras():
    intrinsics = np.array([[220.0, 0, WIDTH_PX / 2], [0, 210.0, HEIGHT_PX / 2], [0, 0, 1]])
    poses = {"left": look_at((-0.9, -0.6, 0.6), (0, 0, 0.1)), "top": look_at((0, 0, 1.2), (0, 0, 0), (0, 1, 0))}
    return tuple(
        Camera(name=name, width_px=WIDTH_PX, height_px=HEIGHT_PX, intrinsics=intrinsics, world_to_camera=pose)
        for name, pose in poses.items()
    )


def pixels(cameras, points):
    return np.stack([camera.project(points)[0] for camera in cameras])


def pictures_of(cameras, points):
    """[V F H W 3] uint8: a soft white spot where each camera sees each point."""
    uv_px = pixels(cameras, points)
    heat = render(uv_px, np.ones(uv_px.shape[:2], bool), HEIGHT_PX, WIDTH_PX, 6.0)
    return np.rint(255 * heat)[..., None].repeat(3, axis=-1).astype(np.uint8)


def spots(rgb):
    return peak(rgb[..., 0] / 255)[0]


@pytest.mark.parametrize(("height_px", "width_px"), [(64, 96), (160, 200), (320, 320)])
def test_resized_content_stays_under_its_point(cameras, height_px, width_px):
    rgb, resized = resize(pictures_of(cameras, POINTS), cameras, height_px, width_px)
    assert rgb.shape == (2, 3, height_px, width_px, 3)
    assert rgb.dtype == np.uint8
    assert [(camera.width_px, camera.height_px) for camera in resized] == [(width_px, height_px)] * 2
    np.testing.assert_allclose(spots(rgb), pixels(resized, POINTS), atol=0.05)


def test_same_size_is_the_same_picture(cameras):
    rgb = np.random.default_rng(0).integers(0, 255, (2, 1, HEIGHT_PX, WIDTH_PX, 3), dtype=np.uint8)
    same, _ = resize(rgb, cameras, HEIGHT_PX, WIDTH_PX)
    np.testing.assert_array_equal(same, rgb)


def test_shrinking_averages_instead_of_skipping(cameras):
    stripes = np.zeros((2, 1, HEIGHT_PX, WIDTH_PX, 3), np.uint8)
    stripes[:, :, :, ::2] = 200
    small, _ = resize(stripes, cameras, HEIGHT_PX // 4, WIDTH_PX // 4)
    inner = small[..., 3:-3, 3:-3, :]
    assert np.abs(inner.astype(int) - 100).max() <= 6


def test_cropped_content_stays_under_its_point(cameras):
    boxes = np.array([[10.25, 5.5, 170.25, 133.5], [20.0, 8.0, 190.0, 144.0]])
    rgb, cropped = crop_and_resize(pictures_of(cameras, POINTS), cameras, boxes, 128, 160)
    np.testing.assert_allclose(spots(rgb), pixels(cropped, POINTS), atol=0.1)
    assert np.abs(pixels(cropped, POINTS) - pixels(cameras, POINTS)).max() > 3


def test_a_moved_world_is_seen_the_same(cameras):
    transform = rigid((0.1, -0.2, 0.7), (0.05, 0.02, -0.03))
    moved, points = move(cameras, POINTS, transform)
    np.testing.assert_allclose(pixels(moved, points), pixels(cameras, POINTS), atol=1e-9)
    assert np.linalg.norm(points - POINTS, axis=-1).min() > 0.02
    assert np.abs(pixels(cameras, points) - pixels(cameras, POINTS)).max() > 3, "moving the points alone is seen"


def test_rigid_turns_about_x_then_y_then_z():
    quarter = np.pi / 2
    for rotation, start, end in (
        ((quarter, 0, 0), (0, 1, 0), (0, 0, 1)),
        ((0, quarter, 0), (0, 0, 1), (1, 0, 0)),
        ((0, 0, quarter), (1, 0, 0), (0, 1, 0)),
        ((quarter, 0, quarter), (0, 0, 1), (1, 0, 0)),
    ):
        np.testing.assert_allclose(rigid(rotation, (1, 2, 3)) @ (*start, 1), (end[0] + 1, end[1] + 2, end[2] + 3, 1), atol=1e-12)


def test_augmentation_stays_within_its_limits(cameras):
    limits = AugmentConfig(crop_share=0.2, translation_m=0.05, rotation_deg=(0.0, 0.0, 10.0))
    drawn = [draw_augmentation(np.random.default_rng(seed), limits, cameras) for seed in range(200)]
    boxes = np.stack([one.boxes_px for one in drawn])
    sides = boxes[..., 2:] - boxes[..., :2]
    assert boxes[..., :2].min() >= 0
    assert (boxes[..., 2:] <= np.array([WIDTH_PX, HEIGHT_PX]) + 1e-9).all()
    assert (sides / (WIDTH_PX, HEIGHT_PX)).min() >= 0.8
    assert (sides / (WIDTH_PX, HEIGHT_PX)).min() < 0.82
    np.testing.assert_allclose(sides[..., 0] / sides[..., 1], WIDTH_PX / HEIGHT_PX)
    assert (boxes[:, 0] != boxes[:, 1]).any(axis=-1).all(), "each view is cut at its own place"
    transforms = np.stack([one.world_from_old_world for one in drawn])
    assert np.abs(transforms[:, :3, 3]).max() <= 0.05
    angles = np.degrees(np.arctan2(transforms[:, 1, 0], transforms[:, 0, 0]))
    assert 9 < np.abs(angles).max() <= 10
    np.testing.assert_allclose(transforms[:, 2, :3], np.tile([0, 0, 1], (200, 1)), atol=1e-12)


def test_no_augmentation_changes_nothing(cameras):
    none = draw_augmentation(np.random.default_rng(0), AugmentConfig(crop_share=0, translation_m=0, rotation_deg=(0, 0, 0)), cameras)
    np.testing.assert_array_equal(none.boxes_px, [[0, 0, WIDTH_PX, HEIGHT_PX]] * 2)
    np.testing.assert_array_equal(none.world_from_old_world, np.eye(4))
