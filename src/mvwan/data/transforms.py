"""Crops, resizes and rigid moves of a window: pixels, cameras and points always change together.

A function here returns the cameras of the pictures that it returns, so that a point projects onto the same content before and
after. Knows no episodes and no heatmaps: those are drawn afterwards, at the final size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mvwan.cameras import Camera
from mvwan.config import AugmentConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class Augmentation:
    """What one window undergoes, the same in all its frames."""

    boxes_px: np.ndarray
    """[V 4] left, top, right, bottom of each view's crop, in px of the recorded picture."""
    world_from_old_world: np.ndarray
    """[4 4] rigid move of the world frame, metres."""


def resize(rgb: np.ndarray, cameras: Sequence[Camera], height_px: int, width_px: int) -> tuple[np.ndarray, tuple[Camera, ...]]:
    """(rgb [V F height_px width_px 3] uint8, their cameras) of rgb [V F H W 3] uint8; shrinking averages, so it does not alias."""
    return crop_and_resize(rgb, cameras, whole_pictures(cameras), height_px, width_px)


def whole_pictures(cameras: Sequence[Camera]) -> np.ndarray:
    """[V 4] the box that leaves nothing out, for each camera."""
    return np.array([(0, 0, camera.width_px, camera.height_px) for camera in cameras], np.float64)


def cropped_cameras(cameras: Sequence[Camera], boxes_px: np.ndarray, height_px: int, width_px: int) -> tuple[Camera, ...]:
    """The cameras that `crop_and_resize` returns."""
    boxes = boxes_px.tolist()
    return tuple(camera.of_box((box[0], box[1], box[2], box[3]), width_px, height_px) for camera, box in zip(cameras, boxes, strict=True))


def crop_and_resize(
    rgb: np.ndarray, cameras: Sequence[Camera], boxes_px: np.ndarray, height_px: int, width_px: int
) -> tuple[np.ndarray, tuple[Camera, ...]]:
    """(rgb [V F height_px width_px 3] uint8, their cameras): each view's box [V 4] cut out and brought to the new size at once."""
    views, frames, old_height_px, old_width_px, _ = rgb.shape
    assert len(cameras) == views == len(boxes_px), f"crop_and_resize: {len(cameras)} cameras, {len(boxes_px)} boxes for {views} views"
    resized = np.empty((views, frames, height_px, width_px, 3), np.uint8)
    for view, (camera, box) in enumerate(zip(cameras, boxes_px, strict=True)):
        assert (camera.width_px, camera.height_px) == (old_width_px, old_height_px), f"camera {camera.name} is not of this picture's size"
        left, top, right, bottom = box.tolist()
        for frame in range(frames):
            picture = Image.fromarray(rgb[view, frame])
            changed = picture.resize((width_px, height_px), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
            resized[view, frame] = np.asarray(changed)
    return resized, cropped_cameras(cameras, boxes_px, height_px, width_px)


def move(cameras: Sequence[Camera], point_m: np.ndarray, world_from_old_world: np.ndarray) -> tuple[tuple[Camera, ...], np.ndarray]:
    """(cameras, point_m [... 3]) told in a world frame moved by the rigid [4 4]. Projections, and so the pictures, stay the same."""
    moved = np.asarray(point_m, np.float64) @ world_from_old_world[:3, :3].T + world_from_old_world[:3, 3]
    return tuple(camera.moved(world_from_old_world) for camera in cameras), moved


def rigid(rotation_rad: Sequence[float], translation_m: Sequence[float]) -> np.ndarray:
    """[4 4] rotation about x, then y, then z of the world by rotation_rad [3], followed by a shift of translation_m [3]."""
    matrix = np.eye(4)
    for axis, angle in enumerate(rotation_rad):
        turn = np.eye(4)
        first, second = (axis + 1) % 3, (axis + 2) % 3
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[second, first] = np.sin(angle)
        turn[first, second] = -np.sin(angle)
        matrix = turn @ matrix
    matrix[:3, 3] = translation_m
    return matrix


def draw_augmentation(rng: np.random.Generator, augment: AugmentConfig, cameras: Sequence[Camera]) -> Augmentation:
    """A random `Augmentation` within the limits of `augment`: each view loses its own share of both sides, at its own place."""
    boxes = np.empty((len(cameras), 4))
    for view, camera in enumerate(cameras):
        size = np.array([camera.width_px, camera.height_px], np.float64)
        removed = size * rng.uniform(0, augment.crop_share)
        corner = removed * rng.uniform(0, 1, 2)
        boxes[view] = (*corner, *(corner + size - removed))
    rotation = np.radians(augment.rotation_deg) * rng.uniform(-1, 1, 3)
    translation = augment.translation_m * rng.uniform(-1, 1, 3)
    return Augmentation(boxes_px=boxes, world_from_old_world=rigid(rotation.tolist(), translation.tolist()))
