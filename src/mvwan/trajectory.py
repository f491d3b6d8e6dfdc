"""Peaks in several views -> 3-D points with their residual, and smoothing of the path. Knows no pictures and no robot."""

from collections.abc import Sequence

import numpy as np

from mvwan.cameras import Camera, triangulate


def lift(uv_px: np.ndarray, confidence: np.ndarray, cameras: Sequence[Camera]) -> tuple[np.ndarray, np.ndarray]:
    """(point_m [F 3] float64, residual_px [F]): each frame's peaks uv_px [V F 2], weighted by confidence [V F], met in space.

    The residual is the confidence-weighted root mean square distance of the peaks to the projected point. Both are NaN in frames
    where fewer than two views have a peak (confidence above 0), or where the rays do not meet in front of the cameras.
    """
    return triangulate(cameras, uv_px, confidence)


def smooth(point_m: np.ndarray, window: int) -> np.ndarray:
    """point_m [F 3] averaged over `window` frames (odd) around each. The window shrinks evenly towards both ends, which stay put.

    NaN points stay NaN and take no part in their neighbours' averages: a gap is never filled.
    """
    assert window % 2 == 1, f"smooth: window={window} must be odd"
    points = np.asarray(point_m, np.float64)
    frames = len(points)
    known = np.asarray(np.isfinite(points).all(axis=-1))
    smoothed = np.full_like(points, np.nan)
    for frame in np.flatnonzero(known):
        reach = min(window // 2, frame, frames - 1 - frame)
        nearby = slice(frame - reach, frame + reach + 1)
        smoothed[frame] = points[nearby][known[nearby]].mean(axis=0)
    return smoothed
