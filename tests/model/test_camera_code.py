"""View attention that knows cameras: silent at step 0, blind to the order of views, and for any number of them."""

import numpy as np
import pytest
import torch

from mvwan.batch import camera_rays
from mvwan.cameras import Camera, look_at
from mvwan.errors import MvwanError
from mvwan.model.multiview_wan import MultiViewWan
from mvwan.model.surgery import adapt, trainable_table
from tests.model.test_multiview_wan import make_inputs, stock_on_each_view
from tests.stock import make_stock

CODES = ["camera", "both"]


def make_rays(views: int = 3) -> torch.Tensor:
    """[1 V 6 4 6] of cameras on a circle around the table."""
    cameras = []
    for view in range(views):
        eye = (np.cos(view), np.sin(view), 0.5 + 0.1 * view)
        intrinsics = np.array([[90.0 + view, 0, 48], [0, 90.0, 32], [0, 0, 1]])
        pose = look_at(eye, (0, 0, 0))
        cameras.append(Camera(name=str(view), width_px=96, height_px=64, intrinsics=intrinsics, world_to_camera=pose))
    return camera_rays(cameras, 4, 6)[None]


def make_trained(code: str, fusion: str = "view") -> MultiViewWan:
    """An adapted model whose every tensor moved, so that each acts."""
    model, _ = adapt(make_stock(), fusion=fusion, view_code=code)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("fusion", ["channel", "view"])
def test_at_step_0_every_view_equals_stock_wan(fusion: str, code: str) -> None:
    latents, timestep, text = make_inputs()
    expected = stock_on_each_view(make_stock(), latents, timestep, text)
    model, surgery = adapt(make_stock(), fusion=fusion, view_code=code)  # type: ignore[arg-type]
    with torch.no_grad():
        output = model(latents, timestep, text, rays=make_rays())
    assert (output[:, :, :48] - expected).abs().max() < 5e-6
    assert {name for name in surgery.added if "camera_code" in name} == {f"blocks.{block}.camera_code.weight" for block in range(2)}


@pytest.mark.parametrize("fusion", ["channel", "view"])
@pytest.mark.parametrize("order", [[2, 0, 1], [1, 0, 2], [2, 1, 0]])
def test_the_order_of_views_says_nothing_where_only_cameras_tell_them_apart(fusion: str, order: list[int]) -> None:
    latents, timestep, text = make_inputs()
    rays = make_rays()

    def moved_by_reordering(code: str) -> float:
        model = make_trained(code, fusion)
        known = code != "slot"
        with torch.no_grad():
            plain = model(latents, timestep, text, rays=rays if known else None)
            reordered = model(latents[:, order], timestep, text, rays=rays[:, order] if known else None)
        return float((reordered - plain[:, order]).abs().max() / plain.abs().max())

    assert moved_by_reordering("camera") < 1e-5
    assert moved_by_reordering("slot") > 1e-3
    assert moved_by_reordering("both") > 1e-3


@pytest.mark.parametrize("fusion", ["channel", "view"])
@pytest.mark.parametrize("code", CODES)
def test_where_a_camera_stands_changes_what_all_views_say(fusion: str, code: str) -> None:
    latents, timestep, text = make_inputs()
    model, rays = make_trained(code, fusion), make_rays()
    elsewhere = rays.clone()
    elsewhere[:, 2] = make_rays(5)[:, 4]
    with torch.no_grad():
        change = (model(latents, timestep, text, rays=elsewhere) - model(latents, timestep, text, rays=rays)).abs()
    assert (change.amax(dim=(0, 2, 3, 4, 5)) > 1e-3).all()


@pytest.mark.parametrize("views", [1, 2, 5])
def test_any_number_of_views(views: int) -> None:
    latents, timestep, text = make_inputs(views=views)
    model = make_trained("camera")
    with torch.no_grad():
        assert model(latents, timestep, text, rays=make_rays(views)).shape == latents.shape


def test_a_view_that_is_twice_there_is_answered_twice_the_same() -> None:
    latents, timestep, text = make_inputs(views=3)
    doubled, rays = torch.cat([latents, latents[:, :1]], dim=1), make_rays(3)
    with torch.no_grad():
        answer = make_trained("camera")(doubled, timestep, text, rays=torch.cat([rays, rays[:, :1]], dim=1))
    torch.testing.assert_close(answer[:, 3], answer[:, 0], rtol=1e-5, atol=1e-5)


def test_rays_are_float32_whatever_the_products_are() -> None:
    model, _ = adapt(make_stock(torch.bfloat16), fusion="view", view_code="camera")
    assert {block.camera_code.weight.dtype for block in model.blocks} == {torch.float32}  # type: ignore[union-attr]


def test_checkpointing_recomputes_the_same() -> None:
    latents, timestep, text = make_inputs()
    gradients = []
    for recompute in (False, True):
        model = make_trained("camera")
        model.requires_grad_(True).train()
        if recompute:
            model.enable_gradient_checkpointing()
        model(latents, timestep, text, rays=make_rays()).square().mean().backward()
        gradients.append(model.blocks[0].camera_code.weight.grad)  # type: ignore[union-attr]
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


def test_rays_that_do_not_fit_are_refused() -> None:
    latents, timestep, text = make_inputs()
    slot, camera = make_trained("slot"), make_trained("camera")
    with pytest.raises(MvwanError, match=r"view_code='slot' needs none"):
        slot(latents, timestep, text, rays=make_rays())
    with pytest.raises(MvwanError, match=r"view_code='camera' needs those of its cameras"):
        camera(latents, timestep, text)
    with pytest.raises(MvwanError, match=r"rays are \[1, 2, 6, 4, 6\]; needed are \[2, 3, 6, 4, 6\]"):
        camera(latents, timestep, text, rays=make_rays(2))


def test_its_parameters_are_counted_in_a_group_of_their_own() -> None:
    slot, camera = (trainable_table("tiny", view_code=code) for code in ("slot", "camera"))  # type: ignore[arg-type]
    row = camera.row("camera_code")
    assert row is not None and row.trainable and slot.row("camera_code") is None
    assert row.parameters == 8 * 6 * 256 == camera.trainable_parameters - slot.trainable_parameters
