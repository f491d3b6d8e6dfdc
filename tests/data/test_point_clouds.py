"""Clouds to pictures: a point is where its camera projects it, the nearest one is seen, and the bits are always the same."""

import numpy as np
import pytest
import torch

from mvwan.cameras import Camera, look_at
from mvwan.data.point_clouds import splat, virtual_rig

BOUNDS = (-0.5, 0.0, 0.0, 0.5, 0.8, 0.6)
SIZE = 64


@pytest.fixture(params=["top", "front", "side", "pinhole"])
def camera(request: pytest.FixtureRequest) -> Camera:
    if request.param == "pinhole":
        intrinsics = np.array([[60.0, 0, 32], [0, 60.0, 32], [0, 0, 1]])
        pose = look_at((1.0, -0.8, 0.9), (0, 0.4, 0.3))
        return Camera(name="pinhole", width_px=SIZE, height_px=SIZE, intrinsics=intrinsics, world_to_camera=pose)
    return next(camera for camera in virtual_rig(BOUNDS, SIZE) if camera.name == request.param)


def test_the_cube_around_the_scene_fits_into_every_view_and_no_larger_one() -> None:
    corners = np.stack(np.meshgrid((-0.5, 0.5), (-0.1, 0.9), (-0.2, 0.8), indexing="ij"), axis=-1).reshape(-1, 3)  # centre 0, 0.4, 0.3
    for camera in virtual_rig(BOUNDS, SIZE):
        uv_px, depth_m = camera.project(corners)
        assert np.allclose(uv_px.min(axis=0), 0)
        assert np.allclose(uv_px.max(axis=0), SIZE)
        assert (depth_m > 0).all()
    top, front, side = (
        camera.project(np.array([[0, 0.4, 0.3], [0.1, 0.4, 0.3], [0, 0.4, 0.4]]))[0] for camera in virtual_rig(BOUNDS, SIZE)
    )
    assert top[1, 1] < top[0, 1], "x is up from above"
    assert front[2, 1] < front[0, 1]
    assert side[2, 1] < side[0, 1]
    assert side[1, 0] > side[0, 0]


def test_a_point_is_where_the_camera_projects_it(camera: Camera) -> None:
    rng = np.random.default_rng(0)
    for point_m in rng.uniform((-0.3, 0.2, 0.1), (0.3, 0.6, 0.5), (20, 3)):
        colour = torch.tensor([[200, 30, 90]], dtype=torch.uint8)
        picture = splat(torch.from_numpy(point_m[None]), colour, camera, radius_px=0)
        u, v = np.floor(camera.project(point_m)[0]).astype(int)
        lit = picture.any(dim=-1)
        assert lit.sum() == 1
        assert picture[v, u].tolist() == [200, 30, 90]


def test_the_nearest_point_is_seen_in_whatever_order_they_come(camera: Camera) -> None:
    rng = np.random.default_rng(1)
    uv_px, depth_m = rng.uniform(8, 56, (50, 2)), rng.uniform(0.9, 1.4, (50, 1))
    deeper = np.concatenate([depth_m, depth_m + 0.1, depth_m + 0.2], axis=1)
    points = np.stack([camera.unproject(uv_px, column) for column in deeper.T], axis=1).reshape(-1, 3)
    colours = np.tile(np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250]], np.uint8), (50, 1))
    order = rng.permutation(len(points))
    one, other = (splat(torch.from_numpy(points[rows]), torch.from_numpy(colours[rows]), camera, 0) for rows in (np.arange(150), order))
    assert torch.equal(one, other)
    for (u, v), depth in zip(np.floor(uv_px).astype(int), deeper[:, 0], strict=True):
        in_the_same_pixel = (np.floor(uv_px).astype(int) == (u, v)).all(axis=1)
        if deeper[in_the_same_pixel, 0].min() == depth:
            assert one[v, u].tolist() == [250, 0, 0]


def test_points_have_a_size_and_edges_cut_them(camera: Camera) -> None:
    point = camera.unproject(np.array([0.5, 10.5]), 1.0)
    picture = splat(torch.from_numpy(point[None]), torch.tensor([[9, 9, 9]], dtype=torch.uint8), camera, radius_px=2)
    assert picture.any(dim=-1).nonzero().tolist() == [[row, column] for row in range(8, 13) for column in range(3)]


def test_what_is_no_point_is_left_out(camera: Camera) -> None:
    middle = camera.unproject(np.array([32.5, 32.5]), 1.0)
    points = torch.from_numpy(np.stack([middle, np.full(3, np.nan), np.array([np.inf, 0, 0])]))
    picture = splat(points, torch.full((3, 3), 7, dtype=torch.uint8), camera, radius_px=0)
    assert picture.any(dim=-1).sum() == 1
    assert not splat(points[1:], torch.full((2, 3), 7, dtype=torch.uint8), camera).any()
    assert splat(points[:0], torch.zeros((0, 3), dtype=torch.uint8), camera).shape == (SIZE, SIZE, 3)
    if camera.kind == "pinhole":
        behind = torch.from_numpy(camera.unproject(np.array([32.5, 32.5]), -1.0)[None])
        assert not splat(behind, torch.full((1, 3), 7, dtype=torch.uint8), camera).any()
