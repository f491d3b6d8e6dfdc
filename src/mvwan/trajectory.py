"""Peaks in several views -> 3-D points with their residual. Knows no pictures and no robot."""

from collections.abc import Sequence

import numpy as np

from mvwan.cameras import Camera, triangulate

SOFT_SHARE = 0.02
"""Of a picture's height: a peak this far off counts half."""
_ROUNDS = 8


def lift(uv_px: np.ndarray, confidence: np.ndarray, cameras: Sequence[Camera]) -> tuple[np.ndarray, np.ndarray]:
    """(point_m [F 3] float64, residual_px [F]): each frame's peaks uv_px [V F 2], weighted by confidence [V F], met in space.

    A view that contradicts the others counts for less the further it is off (Cauchy weights on a scale of `SOFT_SHARE`), so one wrong
    peak does not drag the point along. The residual still tells of it: the confidence-weighted root mean square distance of all peaks
    to the projected point. Both are NaN in frames where fewer than two views have a peak (confidence above 0), or where the rays do
    not meet in front of the cameras.
    """
    point_m, residual_px = triangulate(cameras, uv_px, confidence)
    if len(cameras) < 3:
        return point_m, residual_px
    scale_px = SOFT_SHARE * np.array([camera.height_px for camera in cameras])[:, None]
    for _ in range(_ROUNDS):
        distance_px = _distance_px(point_m, uv_px, cameras)
        point_m, _ = triangulate(cameras, uv_px, np.where(np.isfinite(distance_px), confidence / (1 + (distance_px / scale_px) ** 2), 0))
    squared = np.square(_distance_px(point_m, uv_px, cameras))
    weight = np.where(np.isfinite(squared), confidence, 0.0)
    total = np.where(np.isfinite(point_m).all(axis=-1), weight.sum(axis=0), np.nan)
    return point_m, np.sqrt((weight * np.nan_to_num(squared)).sum(axis=0) / total)


def _distance_px(point_m: np.ndarray, uv_px: np.ndarray, cameras: Sequence[Camera]) -> np.ndarray:
    """[V F] from the projected point to each peak."""
    return np.linalg.norm(np.stack([camera.project(point_m)[0] for camera in cameras]) - uv_px, axis=-1)
