"""Heat in several views -> 3-D points with their residual. Knows no robot, no time and no video."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from mvwan.cameras import Camera, triangulate

SOFT_SHARE = 0.02
"""Of a picture's height: a peak this far off counts half, and heat is blurred by this much before a search in space."""
AGREED_SHARE = 0.025
"""Of a picture's height: peaks with a larger residual do not speak of one point, and their heat is searched in space instead."""
_ROUNDS = 8
_CELLS = 32
"""Down a picture; the hottest pixel of a cell stands for it."""
_HOTTEST = 40
"""Cells of each view that are met with each of another view."""
_BLANK_HEAT = 0.05
"""Added to heat before the logarithm, so that one view that sees nothing cannot outvote the others."""
_FAINTEST_TRACE = 0.002
"""Blurred heat below this is none: two steps of JET's blue."""
_FINER_M = (0.03, 0.01, 0.004)
"""Half the side of the cubes around the best point so far that are searched, one after the other."""
_STEPS_OF_CUBE = 7


def lift(
    uv_px: np.ndarray, confidence: np.ndarray, cameras: Sequence[Camera], heat: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(point_m [F 3] float64, residual_px [F]): each frame's peaks uv_px [V F 2], weighted by confidence [V F], met in space.

    A view that contradicts the others counts for less the further it is off (Cauchy weights on a scale of `SOFT_SHARE`), so one wrong
    peak does not drag the point along. The residual still tells of it: the confidence-weighted root mean square distance of all peaks
    to the projected point. Both are NaN in frames where fewer than two views have a peak (confidence above 0), or where the rays do
    not meet in front of the cameras.

    With `heat` [V F H W] in 0..1, frames whose peaks are missing or disagree by more than `AGREED_SHARE` take the point in space that
    has most heat in all views together, `hottest_point`: a wide or twofold spot has no peak worth the name, but its views still cross.
    One view must have a peak, and another at least a trace of heat.
    """
    point_m, residual_px = _meet(uv_px, confidence, cameras)
    if heat is None or len(cameras) < 2:
        return point_m, residual_px
    with np.errstate(invalid="ignore"):
        agreed = residual_px <= AGREED_SHARE * min(camera.height_px for camera in cameras)
    for frame in np.flatnonzero(~agreed & (np.asarray(confidence) > 0).any(axis=0)):
        point_m[frame] = hottest_point(heat[:, frame], cameras)
    return point_m, _residual_px(point_m, uv_px, confidence, cameras)


def hottest_point(heat: np.ndarray, cameras: Sequence[Camera]) -> np.ndarray:
    """[3] metres: where in space the views' heat [V H W], blurred, has the largest sum of logarithms; NaN where no two views have any.

    Searched among the crossings of the hottest cells of each two views, then ever finer around the best. The same as the most probable
    point when each picture says, up to a constant, how probable each pixel is, and the pictures err independently.
    """
    pictures = _blurred(heat)
    candidates = np.concatenate(
        [
            _crossings([cameras[first], cameras[second]], _hot_cells(pictures[first]), _hot_cells(pictures[second]))
            for second in range(len(cameras))
            for first in range(second)
        ]
    )
    candidates = candidates[np.isfinite(candidates).all(axis=-1)]
    if not len(candidates):
        return np.full(3, np.nan)
    best = candidates[_log_heat(candidates, pictures, cameras).argmax()]
    for half_m in _FINER_M:
        offsets = np.linspace(-half_m, half_m, _STEPS_OF_CUBE)
        cube = best + np.stack(np.meshgrid(offsets, offsets, offsets, indexing="ij"), axis=-1).reshape(-1, 3)
        best = cube[_log_heat(cube, pictures, cameras).argmax()]
    seen = [_heat_at(picture, camera, best[None])[0] for picture, camera in zip(pictures, cameras, strict=True)]
    return best if np.count_nonzero(np.array(seen) >= _FAINTEST_TRACE) >= 2 else np.full(3, np.nan)


def _meet(uv_px: np.ndarray, confidence: np.ndarray, cameras: Sequence[Camera]) -> tuple[np.ndarray, np.ndarray]:
    """(point_m [F 3], residual_px [F]) of peaks alone."""
    point_m, residual_px = triangulate(cameras, uv_px, confidence)
    if len(cameras) < 3:
        return point_m, residual_px
    scale_px = SOFT_SHARE * np.array([camera.height_px for camera in cameras])[:, None]
    for _ in range(_ROUNDS):
        distance_px = _distance_px(point_m, uv_px, cameras)
        point_m, _ = triangulate(cameras, uv_px, np.where(np.isfinite(distance_px), confidence / (1 + (distance_px / scale_px) ** 2), 0))
    return point_m, _residual_px(point_m, uv_px, confidence, cameras)


def _residual_px(point_m: np.ndarray, uv_px: np.ndarray, confidence: np.ndarray, cameras: Sequence[Camera]) -> np.ndarray:
    """[F] of points [F 3]: the confidence-weighted root mean square distance of all peaks to the projected point."""
    squared = np.square(_distance_px(point_m, uv_px, cameras))
    weight = np.where(np.isfinite(squared), confidence, 0.0)
    total = np.where(np.isfinite(point_m).all(axis=-1), weight.sum(axis=0), np.nan)
    return np.sqrt((weight * np.nan_to_num(squared)).sum(axis=0) / total)


def _distance_px(point_m: np.ndarray, uv_px: np.ndarray, cameras: Sequence[Camera]) -> np.ndarray:
    """[V F] from the projected point to each peak."""
    return np.linalg.norm(np.stack([camera.project(point_m)[0] for camera in cameras]) - uv_px, axis=-1)


def _blurred(heat: np.ndarray) -> torch.Tensor:
    """[V H W] float32 of heat [V H W], blurred by a Gaussian of `SOFT_SHARE` of the height."""
    sigma_px = SOFT_SHARE * heat.shape[-2]
    offsets = torch.arange(-round(3 * sigma_px), round(3 * sigma_px) + 1)
    kernel = torch.exp(-0.5 * (offsets / sigma_px) ** 2)
    kernel, reach = kernel / kernel.sum(), len(offsets) // 2
    pictures = torch.from_numpy(np.ascontiguousarray(heat, np.float32))[:, None]
    pictures = functional.conv2d(pictures, kernel[None, None, :, None], padding=(reach, 0))
    return functional.conv2d(pictures, kernel[None, None, None, :], padding=(0, reach))[:, 0]


def _hot_cells(picture: torch.Tensor) -> np.ndarray:
    """[N 2] px: the hottest pixels of the hottest cells of picture [H W]."""
    side = max(1, picture.shape[0] // _CELLS)
    hottest, place = functional.max_pool2d(picture[None], side, return_indices=True)
    chosen = hottest.flatten().topk(min(_HOTTEST, hottest.numel())).indices
    rows, columns = np.divmod(place.flatten()[chosen].numpy(), picture.shape[1])
    return np.stack([columns + 0.5, rows + 0.5], axis=-1)


def _crossings(pair: Sequence[Camera], first_px: np.ndarray, second_px: np.ndarray) -> np.ndarray:
    """[N*M 3] where the rays through each of first_px [N 2] and each of second_px [M 2] come closest; NaN where they do not."""
    uv_px = np.stack([first_px.repeat(len(second_px), axis=0), np.tile(second_px, (len(first_px), 1))])
    return triangulate(pair, uv_px, np.ones(uv_px.shape[:2]), refine=False)[0]


def _log_heat(point_m: np.ndarray, pictures: torch.Tensor, cameras: Sequence[Camera]) -> np.ndarray:
    """[N] sum over the views of the logarithm of the heat at points [N 3]."""
    heats = [_heat_at(picture, camera, point_m) for picture, camera in zip(pictures, cameras, strict=True)]
    return np.log(np.stack(heats) + _BLANK_HEAT).sum(axis=0)


def _heat_at(picture: torch.Tensor, camera: Camera, point_m: np.ndarray) -> np.ndarray:
    """[N] bilinear heat of picture [H W] where camera sees points [N 3]; 0 outside and behind."""
    uv_px, depth_m = camera.project(point_m)
    place = np.nan_to_num(2 * uv_px / (camera.width_px, camera.height_px) - 1, nan=-9.0)
    grid = torch.from_numpy(np.clip(place, -9, 9).astype(np.float32))
    found = functional.grid_sample(picture[None, None], grid[None, None], align_corners=False)[0, 0, 0].numpy()
    return np.where(camera.inside(uv_px, depth_m), np.clip(found, 0, None), 0.0)
