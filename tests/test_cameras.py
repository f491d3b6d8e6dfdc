"""Cameras: projections by hand, inverses, pictures that are cut, scaled and moved, triangulation and its refusals."""

import json

import numpy as np
import pytest

from mvwan.cameras import Camera, look_at, triangulate
from mvwan.errors import MvwanError


def pinhole(name, eye_m, target_m, up=(0.0, 0.0, 1.0), width_px=256, height_px=256, fov_deg=45.0):
    focal = 0.5 * height_px / np.tan(np.radians(fov_deg) / 2)
    intrinsics = np.array([[focal, 0, width_px / 2], [0, focal, height_px / 2], [0, 0, 1]])
    return Camera(name=name, width_px=width_px, height_px=height_px, intrinsics=intrinsics, world_to_camera=look_at(eye_m, target_m, up))


def orthographic(name, eye_m, target_m, up=(0.0, 0.0, 1.0), size_px=256, extent_m=1.0):
    scale = size_px / extent_m
    intrinsics = np.array([[scale, 0, size_px / 2], [0, scale, size_px / 2], [0, 0, 1]])
    pose = look_at(eye_m, target_m, up)
    return Camera(name=name, width_px=size_px, height_px=size_px, intrinsics=intrinsics, world_to_camera=pose, kind="orthographic")


def rig():
    return (
        pinhole("left", (-1.0, -0.7, 0.7), (0, 0, 0.1)),
        pinhole("right", (1.0, -0.7, 0.7), (0, 0, 0.1)),
        pinhole("top", (0, 0, 1.4), (0, 0, 0), up=(0, 1, 0)),
    )


def workspace(count, seed=0):
    return np.random.default_rng(seed).uniform((-0.25, -0.25, 0), (0.25, 0.25, 0.25), (count, 3))


@pytest.fixture
def front():
    """At the origin, looking along +y of the world: picture right is +x, picture down is -z."""
    return pinhole("front", (0, 0, 0), (0, 1, 0), width_px=200, height_px=100, fov_deg=90.0)


def test_projection_by_hand(front):
    uv_px, depth_m = front.project(np.array([[0, 2, 0], [1, 2, 0], [0, 2, 1], [0, 4, 1]]))
    np.testing.assert_allclose(uv_px, [[100, 50], [125, 50], [100, 25], [100, 37.5]], atol=1e-12)
    np.testing.assert_allclose(depth_m, [2, 2, 2, 4])


def test_orthographic_projection_by_hand():
    camera = orthographic("front", (0, -1, 0), (0, 0, 0), size_px=100)
    uv_px, depth_m = camera.project(np.array([[0.25, 0, 0], [0.25, 0.5, 0], [0, 0, 0.25]]))
    np.testing.assert_allclose(uv_px, [[75, 50], [75, 50], [50, 25]], atol=1e-12)
    np.testing.assert_allclose(depth_m, [1, 1.5, 1])


@pytest.mark.parametrize("camera", [*rig(), orthographic("side", (1.0, 0.2, 0.3), (0, 0, 0))], ids=lambda camera: camera.name)
def test_unproject_is_the_inverse_of_project(camera):
    points = workspace(50).reshape(5, 10, 3)
    np.testing.assert_allclose(camera.unproject(*camera.project(points)), points, atol=1e-12)


@pytest.mark.parametrize("camera", [*rig(), orthographic("side", (1.0, 0.2, 0.3), (0, 0, 0))], ids=lambda camera: camera.name)
def test_a_ray_holds_every_point_that_its_pixel_shows(camera):
    rays = camera.rays(8, 4)
    assert (rays.shape, rays.dtype) == ((6, 8, 4), np.float32)
    np.testing.assert_allclose(np.linalg.norm(rays[:3], axis=0), 1, atol=1e-6)
    size = np.array([camera.width_px / 4, camera.height_px / 8])
    for depth in (0.3, 1.0, 2.5):
        point = camera.unproject(size * (2.5, 6.5), depth)  # the middle of column 2, row 6
        np.testing.assert_allclose(np.cross(point, rays[:3, 6, 2]), rays[3:, 6, 2], atol=1e-6)
    np.testing.assert_allclose(camera.of_box((0, 0, *(size * (2, 4))), 32, 32).rays(4, 2), rays[:, :4, :2], atol=1e-6)
    np.testing.assert_allclose(camera.resized(32, 64).rays(8, 4), rays, atol=1e-6)


def test_behind_a_pinhole_camera_is_nan_and_not_inside(front):
    uv_px, depth_m = front.project(np.array([[0.1, -2.0, 0.0], [0, 0, 0], [np.nan, 1, 1]]))
    assert np.isnan(uv_px).all()
    assert not front.inside(uv_px, depth_m).any()


def test_inside_is_half_open(front):
    uv_px = np.array([[0, 0], [199.999, 99.999], [200, 50], [50, 100], [-0.001, 50]])
    assert front.inside(uv_px, np.ones(5)).tolist() == [True, True, False, False, False]
    assert not front.inside(uv_px[:2], np.array([-1.0, 0.0])).any()


def test_cropped_and_resized_follow_the_picture(front):
    points = np.array([[0.3, 2.0, -0.1], [-0.5, 3.0, 0.4]])
    uv_px, _ = front.project(points)
    np.testing.assert_allclose(front.cropped(30, 10, 64, 32).project(points)[0], uv_px - (30, 10))
    np.testing.assert_allclose(front.resized(100, 200).project(points)[0], uv_px * (0.5, 2))
    both = front.of_box((30, 10, 94, 42), 128, 96)
    np.testing.assert_allclose(both.project(points)[0], (uv_px - (30, 10)) * (2, 3))
    assert (both.width_px, both.height_px) == (128, 96)


def test_moved_world_keeps_projections():
    angle = 0.4
    transform = np.eye(4)
    transform[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    transform[:3, 3] = (0.1, -0.2, 0.05)
    points = workspace(20)
    moved = points @ transform[:3, :3].T + transform[:3, 3]
    for camera in rig():
        for before, after in zip(camera.project(points), camera.moved(transform).project(moved), strict=True):
            np.testing.assert_allclose(after, before, atol=1e-9)


def test_json_round_trip_is_exact():
    camera = rig()[0]
    back = Camera.from_dict(json.loads(json.dumps(camera.to_dict())))
    np.testing.assert_array_equal(back.world_to_camera, camera.world_to_camera)
    np.testing.assert_array_equal(back.intrinsics, camera.intrinsics)
    assert (back.name, back.width_px, back.height_px, back.kind) == ("left", 256, 256, "pinhole")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("width_px", 0, "width_px=0"),
        ("height_px", 2.5, "height_px=2.5"),
        ("intrinsics", [[1, 0], [0, 1]], r"\(2, 2\)"),
        ("intrinsics", np.zeros((3, 3)), "invertible"),
        ("intrinsics", "wide", "must be numbers"),
        ("world_to_camera", 2 * np.eye(4), "rotation"),
        ("world_to_camera", np.diag([1, 1, -1, 1]), "right-handed"),
        ("world_to_camera", np.full((4, 4), np.nan), "finite"),
        ("kind", "fisheye", "fisheye"),
    ],
)
def test_impossible_cameras_are_refused(field, value, words):
    with pytest.raises(MvwanError, match=words) as error:
        Camera.from_dict({**rig()[0].to_dict(), field: value})
    assert "camera left" in str(error.value)


def test_missing_and_unknown_fields_are_named():
    values = rig()[0].to_dict()
    del values["intrinsics"]
    with pytest.raises(MvwanError, match=r"missing fields \['intrinsics'\], unknown fields \['fov'\]"):
        Camera.from_dict({**values, "fov": 45})


@pytest.mark.parametrize("cameras", [rig(), rig()[:2], (*rig()[:1], orthographic("side", (1.0, 0, 0.1), (0, 0, 0.1)))], ids=len)
def test_triangulation_of_exact_pixels_is_exact(cameras):
    points = workspace(200)
    uv_px = np.stack([camera.project(points)[0] for camera in cameras])
    found, residual_px = triangulate(cameras, uv_px, np.ones(uv_px.shape[:2]))
    np.testing.assert_allclose(found, points, atol=1e-9)
    assert residual_px.max() < 1e-6


def test_triangulation_minimises_the_weighted_pixel_error():
    cameras, points = rig(), workspace(20)
    rng = np.random.default_rng(1)
    uv_px = np.stack([camera.project(points)[0] for camera in cameras]) + rng.normal(0, 2, (3, 20, 2))
    weight = rng.uniform(0.2, 1, (3, 20))

    def cost(candidates):
        square = np.stack([np.square(camera.project(candidates)[0] - uv_px[view]).sum(-1) for view, camera in enumerate(cameras)])
        return (weight * square).sum(0) / weight.sum(0)

    found, residual_px = triangulate(cameras, uv_px, weight)
    np.testing.assert_allclose(residual_px, np.sqrt(cost(found)))
    for axis in range(3):
        for step_m in (-1e-5, 1e-5):
            assert (cost(found + step_m * np.eye(3)[axis]) > cost(found)).all()


def test_weights_silence_a_wrong_view():
    cameras, points = rig(), workspace(10)
    uv_px = np.stack([camera.project(points)[0] for camera in cameras])
    uv_px[1] += 40
    weight = np.ones((3, 10))
    assert np.linalg.norm(triangulate(cameras, uv_px, weight)[0] - points, axis=-1).min() > 0.005
    weight[1] = 0
    np.testing.assert_allclose(triangulate(cameras, uv_px, weight)[0], points, atol=1e-9)
    uv_px[1], weight[1] = np.nan, 1
    np.testing.assert_allclose(triangulate(cameras, uv_px, weight)[0], points, atol=1e-9)


def test_too_few_views_parallel_rays_and_points_behind_are_nan():
    cameras, points = rig(), workspace(2)
    uv_px = np.stack([camera.project(points)[0] for camera in cameras])
    weight = np.array([[1, 1], [0, 1], [0, 0]])
    found, residual_px = triangulate(cameras, uv_px, weight)
    assert np.isnan(found).all(axis=-1).tolist() == [True, False]
    assert np.isnan(residual_px).tolist() == [True, False]

    assert np.isnan(triangulate([cameras[0]] * 2, uv_px[[0, 0]], np.ones((2, 2)))[0]).all()

    apart = [pinhole("a", (-0.5, 0, 0), (-1.0, 1, 0)), pinhole("b", (0.5, 0, 0), (1.0, 1, 0))]
    middle = np.full((2, 1, 2), 128.0)
    found, residual_px = triangulate(apart, middle, np.ones((2, 1)))
    assert np.isnan(found).all()
    assert np.isnan(residual_px).all()
