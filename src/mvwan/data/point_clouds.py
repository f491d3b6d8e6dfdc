"""Point clouds -> pictures: each virtual camera shows the nearest point of every pixel. In torch, on any device, the same bits each time.

Knows no file and no demonstration.
"""

import numpy as np
import torch

from mvwan.cameras import Camera, look_at

_DEPTH_STEPS = 1 << 24
"""Depths are compared in so many steps over the depth of the cloud; of two points in one step the earlier one is seen."""
BACKGROUND = 0


def virtual_rig(scene_bounds_m: tuple[float, ...], size_px: int) -> tuple[Camera, ...]:
    """The orthographic cameras `top`, `front`, `side`, whose pictures hold the cube around the scene (x0, y0, z0, x1, y1, z1).

    `top` looks down with x up in the picture, `front` looks back along x, `side` along y; each pixel is the same share of a metre.
    """
    low, high = np.reshape(scene_bounds_m, (2, 3)).astype(np.float64)
    centre, side_m = (low + high) / 2, float((high - low).max())
    focal = size_px / side_m
    intrinsics = np.array([[focal, 0, size_px / 2], [0, focal, size_px / 2], [0, 0, 1]])
    views = {"top": ((0, 0, 1), (1, 0, 0)), "front": ((1, 0, 0), (0, 0, 1)), "side": ((0, -1, 0), (0, 0, 1))}
    return tuple(
        Camera(
            name=name,
            width_px=size_px,
            height_px=size_px,
            intrinsics=intrinsics,
            world_to_camera=look_at((centre + side_m * np.array(towards)).tolist(), centre.tolist(), up),
            kind="orthographic",
        )
        for name, (towards, up) in views.items()
    )


def splat(points_m: torch.Tensor, rgb: torch.Tensor, camera: Camera, radius_px: int = 1) -> torch.Tensor:
    """[H W 3] uint8 of points_m [N 3], world frame, and their colours rgb [N 3] uint8: squares of 2 * radius_px + 1 px, nearest in front.

    Pixels that no point covers are black. Points that are not finite, or behind a pinhole camera, are left out.
    """
    height, width, device = camera.height_px, camera.width_px, points_m.device
    pose = torch.tensor(camera.world_to_camera, dtype=torch.float64, device=device)
    intrinsics = torch.tensor(camera.intrinsics, dtype=torch.float64, device=device)
    local = points_m.double() @ pose[:3, :3].T + pose[:3, 3]
    depth = local[:, 2]
    kept = torch.isfinite(local).all(dim=1) & (depth > 0 if camera.kind == "pinhole" else torch.ones_like(depth, dtype=torch.bool))
    local, depth, rgb = local[kept], depth[kept], rgb[kept]
    plane = local[:, :2] / depth[:, None] if camera.kind == "pinhole" else local[:, :2]
    pixels = (plane @ intrinsics[:2, :2].T + intrinsics[:2, 2]).floor().long()
    if not len(depth):
        return torch.full((height, width, 3), BACKGROUND, dtype=torch.uint8, device=device)
    near, far = depth.min(), depth.max()
    steps = ((depth - near) / (far - near).clamp_min(1e-9) * (_DEPTH_STEPS - 1)).long()
    key = steps * len(depth) + torch.arange(len(depth), device=device)  # the depth decides, then the number
    empty = torch.iinfo(torch.int64).max
    nearest = torch.full((height * width,), empty, dtype=torch.int64, device=device)
    for down in range(-radius_px, radius_px + 1):
        for across in range(-radius_px, radius_px + 1):
            column, row = pixels[:, 0] + across, pixels[:, 1] + down
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            nearest.scatter_reduce_(0, (row * width + column)[inside], key[inside], "amin")
    covered = nearest < empty
    picture = torch.full((height * width, 3), BACKGROUND, dtype=torch.uint8, device=device)
    picture[covered] = rgb[nearest[covered] % len(depth)]
    return picture.reshape(height, width, 3)
