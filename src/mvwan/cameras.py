"""Pinhole and orthographic cameras: project, unproject, triangulate, and follow their picture through crops and resizes.

Metres, OpenCV axes (x right, y down, z forward), float64. Pixel coordinates are continuous: (0, 0) is the outer corner of the
first pixel, its centre is (0.5, 0.5). Knows no pictures, no heatmaps and no file format; cameras have no lens distortion.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mvwan.errors import MvwanError

_ROTATION_TOLERANCE = 1e-4
_PARALLEL_RAYS = 1e-10
_REFINE_STEPS = 8
_LARGEST_PX = 2**15


@dataclass(frozen=True, kw_only=True, eq=False)
class Camera:
    """A camera that stands still. Raises `MvwanError` naming the camera and the field when a value cannot be one."""

    name: str
    """Unique in its rig, for example `left`."""
    width_px: int
    height_px: int
    intrinsics: np.ndarray
    """[3 3] float64, last row 0 0 1. Pinhole: px per unit slope. Orthographic: px per metre."""
    world_to_camera: np.ndarray
    """[4 4] float64, a rotation and a shift in metres."""
    kind: Literal["pinhole", "orthographic"] = "pinhole"

    def __post_init__(self) -> None:
        if type(self.name) is not str or not self.name:
            raise MvwanError(f"camera {self.name!r}: name must be a text")
        for field, shape in (("intrinsics", (3, 3)), ("world_to_camera", (4, 4))):
            object.__setattr__(self, field, _matrix(self.name, field, getattr(self, field), shape))
        for field in ("width_px", "height_px"):
            if type(getattr(self, field)) is not int or not 1 <= getattr(self, field) <= _LARGEST_PX:
                raise MvwanError(f"camera {self.name}: {field}={getattr(self, field)!r}, must be a whole number from 1 to {_LARGEST_PX}")
        if self.kind not in ("pinhole", "orthographic"):
            raise MvwanError(f"camera {self.name}: kind={self.kind!r}, must be 'pinhole' or 'orthographic'")
        if not np.allclose(self.intrinsics[2], (0, 0, 1)) or abs(np.linalg.det(self.intrinsics)) == 0:
            raise MvwanError(f"camera {self.name}: intrinsics must be invertible with last row 0 0 1, got {self.intrinsics.tolist()}")
        rotation = self.world_to_camera[:3, :3]
        proper = np.allclose(rotation @ rotation.T, np.eye(3), atol=_ROTATION_TOLERANCE) and np.linalg.det(rotation) > 0
        if not proper or not np.allclose(self.world_to_camera[3], (0, 0, 0, 1)):
            raise MvwanError(
                f"camera {self.name}: world_to_camera must be a rotation (right-handed, no scale) and a shift with last row 0 0 0 1, "
                f"got {self.world_to_camera.tolist()}"
            )

    def project(self, points_m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(uv_px [... 2], depth_m [...]) of world points [... 3]. uv is NaN where a pinhole camera has the point behind it."""
        local = np.asarray(points_m, np.float64) @ self.world_to_camera[:3, :3].T + self.world_to_camera[:3, 3]
        depth_m = local[..., 2]
        plane = local[..., :2]
        if self.kind == "pinhole":
            plane = plane / np.where(depth_m > 0, depth_m, np.nan)[..., None]
        return plane @ self.intrinsics[:2, :2].T + self.intrinsics[:2, 2], depth_m

    def unproject(self, uv_px: np.ndarray, depth_m: np.ndarray | float) -> np.ndarray:
        """World points [... 3] in metres seen at uv_px [... 2] and depth_m [...]: the inverse of `project`."""
        depth = np.asarray(depth_m, np.float64)[..., None]
        plane = self.plane_coordinates(uv_px)
        if self.kind == "pinhole":
            plane = plane * depth
        local = np.concatenate([plane, np.broadcast_to(depth, (*plane.shape[:-1], 1))], axis=-1)
        return (local - self.world_to_camera[:3, 3]) @ self.world_to_camera[:3, :3]

    def plane_coordinates(self, uv_px: np.ndarray) -> np.ndarray:
        """[... 2] uv_px without the intrinsics: slopes x/z, y/z of a pinhole camera, metres x, y of an orthographic one."""
        return (np.asarray(uv_px, np.float64) - self.intrinsics[:2, 2]) @ np.linalg.inv(self.intrinsics[:2, :2]).T

    def rays(self, rows: int, columns: int) -> np.ndarray:
        """[6 rows columns] float32: the rays through the middles of a grid over the picture, Plücker coordinates in the world.

        The first three are the direction, of length 1; the others the moment, point of the ray x direction, in metres: the same
        whichever point is taken. Source: Plücker, as cameras are told to networks in Sitzmann et al., arXiv 2106.02634, eq. 2.
        """
        down, across = np.meshgrid((np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns, indexing="ij")
        near, far = (self.unproject(np.stack([across * self.width_px, down * self.height_px], axis=-1), depth) for depth in (1.0, 2.0))
        direction = (far - near) / np.linalg.norm(far - near, axis=-1, keepdims=True)
        return np.concatenate([direction, np.cross(near, direction)], axis=-1).transpose(2, 0, 1).astype(np.float32)

    def inside(self, uv_px: np.ndarray, depth_m: np.ndarray) -> np.ndarray:
        """[...] bool: within the picture and, for a pinhole camera, in front of it. NaN is outside."""
        uv = np.asarray(uv_px, np.float64)
        with np.errstate(invalid="ignore"):
            seen = np.all((uv >= 0) & (uv < (self.width_px, self.height_px)), axis=-1)
            return seen & (np.asarray(depth_m) > 0) if self.kind == "pinhole" else seen & np.isfinite(depth_m)

    def cropped(self, left_px: float, top_px: float, width_px: int, height_px: int) -> "Camera":
        """The camera of the picture cut out at (left_px, top_px) with the given size."""
        return self.of_box((left_px, top_px, left_px + width_px, top_px + height_px), width_px, height_px)

    def resized(self, width_px: int, height_px: int) -> "Camera":
        """The camera of the whole picture scaled to another size."""
        return self.of_box((0, 0, self.width_px, self.height_px), width_px, height_px)

    def of_box(self, box_px: tuple[float, float, float, float], width_px: int, height_px: int) -> "Camera":
        """The camera of the box (left, top, right, bottom) cut out of the picture and brought to another size."""
        left, top, right, bottom = box_px
        across, down = width_px / (right - left), height_px / (bottom - top)
        new_from_old = np.array([[across, 0, -left * across], [0, down, -top * down], [0, 0, 1]])
        return dataclasses.replace(self, intrinsics=new_from_old @ self.intrinsics, width_px=width_px, height_px=height_px)

    def moved(self, world_from_old_world: np.ndarray) -> "Camera":
        """The same camera told in a world frame moved by the rigid [4 4]: it sees T @ point where it saw point."""
        return dataclasses.replace(self, world_to_camera=self.world_to_camera @ np.linalg.inv(world_from_old_world))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, ready for JSON; `Camera.from_dict` reads them back equal to the bit."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Camera":
        """The camera written by `to_dict`. `MvwanError` for a missing, unknown or impossible field."""
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance] - it comes from a file
            raise MvwanError(f"camera {values!r}: must be an object; a camera has {names}")
        missing = [name for name in names if name not in values and name != "kind"]
        unknown = [name for name in values if name not in names]
        if missing or unknown:
            raise MvwanError(f"camera {values.get('name', '?')}: missing fields {missing}, unknown fields {unknown}; a camera has {names}")
        return cls(**values)


def _matrix(camera: str, field: str, values: Any, shape: tuple[int, int]) -> np.ndarray:
    """`values` as a read-only float64 array of that shape, or `MvwanError`."""
    try:
        array = np.array(values, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise MvwanError(f"camera {camera}: {field} must be numbers, got {values!r}") from None
    if array.shape != shape or not np.isfinite(array).all():
        raise MvwanError(f"camera {camera}: {field} has shape {array.shape}, needs {shape} finite numbers")
    array.setflags(write=False)
    return array


def look_at(eye_m: Sequence[float], target_m: Sequence[float], up: Sequence[float] = (0.0, 0.0, 1.0)) -> np.ndarray:
    """`world_to_camera` [4 4] of a camera at `eye_m` that looks at `target_m` with `up` pointing up in the picture.

    Looking along `up` itself is a programmer's error: choose another `up`.
    """
    eye = np.asarray(eye_m, np.float64)
    forward = np.asarray(target_m, np.float64) - eye
    right = np.cross(forward, np.asarray(up, np.float64))
    assert np.linalg.norm(right) > 1e-9 * np.linalg.norm(forward), "look_at: the line of sight is parallel to `up`"
    axes = np.stack([right, np.cross(forward, right), forward])
    rotation = axes / np.linalg.norm(axes, axis=1, keepdims=True)
    matrix = np.eye(4)
    matrix[:3, :3] = rotation
    matrix[:3, 3] = -rotation @ eye
    return matrix


def triangulate(cameras: Sequence[Camera], uv_px: np.ndarray, weight: np.ndarray, refine: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(point_m [N 3], residual_px [N]): the points that project closest to uv_px [V N 2] under weight [V N].

    The residual is the weighted root mean square distance in px. Views of weight 0 or with a NaN pixel are left out. Both results
    are NaN where fewer than two views remain, where their rays are parallel, or where they meet behind a pinhole camera. Without
    `refine` the linear answer is given: exact where the rays meet, cheap where there are thousands.
    Source: linear triangulation, then Gauss-Newton on the pixel error (Hartley and Zisserman, Multiple View Geometry, ch. 12).
    """
    uv = np.asarray(uv_px, np.float64)
    assert uv.shape == (*np.shape(weight), 2), f"triangulate: uv_px {uv.shape} for weight {np.shape(weight)}"
    used = (np.asarray(weight) > 0) & np.isfinite(uv).all(axis=-1)
    weights = np.where(used, weight, 0.0).astype(np.float64)
    weights /= np.maximum(weights.sum(axis=0), np.finfo(np.float64).tiny)
    uv = np.where(used[..., None], uv, 0.0)

    point = _linear_triangulation(cameras, uv, weights)
    point[used.sum(axis=0) < 2] = np.nan
    cost, normal, slope = _pixel_cost(cameras, point, uv, weights)
    for _ in range(_REFINE_STEPS if refine else 0):
        trial = point - _solve(normal, slope)
        trial_cost, trial_normal, trial_slope = _pixel_cost(cameras, trial, uv, weights)
        better = trial_cost < cost
        if not better.any():
            break
        point = np.where(better[:, None], trial, point)
        normal = np.where(better[:, None, None], trial_normal, normal)
        slope = np.where(better[:, None], trial_slope, slope)
        cost = np.where(better, trial_cost, cost)
    failed = np.logical_not(np.isfinite(cost) & np.isfinite(point).all(axis=-1))
    point[failed] = np.nan
    return point, np.where(failed, np.nan, np.sqrt(np.where(failed, 0.0, cost)))


def _linear_triangulation(cameras: Sequence[Camera], uv: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[N 3] least-squares crossing of the rays; NaN where they are parallel."""
    num_points = uv.shape[1]
    normal, right = np.zeros((num_points, 3, 3)), np.zeros((num_points, 3))
    for camera, pixels, weight in zip(cameras, uv, weights, strict=True):
        rotation, shift = camera.world_to_camera[:3, :3], camera.world_to_camera[:3, 3]
        plane = camera.plane_coordinates(pixels)
        if camera.kind == "pinhole":
            rows = rotation[:2] - plane[..., None] * rotation[2]
            values = plane * shift[2] - shift[:2]
        else:
            rows = np.broadcast_to(rotation[:2], (num_points, 2, 3))
            values = plane - shift[:2]
        normal += np.einsum("n,nki,nkj->nij", weight, rows, rows)
        right += np.einsum("n,nki,nk->ni", weight, rows, values)
    return _solve(normal, right)


def _pixel_cost(
    cameras: Sequence[Camera], point: np.ndarray, uv: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(cost [N] in px^2, normal matrix [N 3 3], slope [N 3]) of the weighted pixel error; cost is inf behind a used camera."""
    cost, normal, slope = np.zeros(len(point)), np.zeros((len(point), 3, 3)), np.zeros((len(point), 3))
    for camera, pixels, weight in zip(cameras, uv, weights, strict=True):
        error = camera.project(point)[0] - pixels
        jacobian = _projection_jacobian(camera, point)
        behind = np.logical_not(np.all(np.isfinite(error), axis=-1))
        error[behind], jacobian[behind] = 0.0, 0.0
        cost += np.where(behind & (weight > 0), np.inf, weight * np.square(error).sum(axis=-1))
        normal += np.einsum("n,nki,nkj->nij", weight, jacobian, jacobian)
        slope += np.einsum("n,nki,nk->ni", weight, jacobian, error)
    return cost, normal, slope


def _projection_jacobian(camera: Camera, point: np.ndarray) -> np.ndarray:
    """[N 2 3] px per metre of world movement."""
    rotation = camera.world_to_camera[:3, :3]
    local = point @ rotation.T + camera.world_to_camera[:3, 3]
    plane = np.broadcast_to(np.eye(2, 3), (len(point), 2, 3)).copy()
    if camera.kind == "pinhole":
        depth = np.where(local[:, 2] > 0, local[:, 2], np.nan)
        plane[:, :, 2] = -local[:, :2] / depth[:, None]
        plane /= depth[:, None, None]
    return camera.intrinsics[:2, :2] @ plane @ rotation


def _solve(normal: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[N 3] solutions of symmetric [N 3 3] systems; NaN where a system has no single answer."""
    finite = np.asarray(np.isfinite(normal).all(axis=(1, 2)) & np.isfinite(right).all(axis=1))
    spread = np.linalg.eigvalsh(np.where(finite[:, None, None], normal, 0.0))
    solvable = finite & (spread[:, 0] > _PARALLEL_RAYS * np.maximum(spread[:, 2], np.finfo(np.float64).tiny))
    answer = np.linalg.solve(np.where(solvable[:, None, None], normal, np.eye(3)), np.where(solvable[:, None], right, 0.0)[..., None])
    return np.where(solvable[:, None], answer[..., 0], np.nan)
