"""The plane-by-plane forward that the tiny VAE trains through gives what `AutoencoderKLWan` itself gives, forward and backward."""

import importlib
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan

SIDE_PX = 32
LAYOUTS = {
    "two levels, no blocks": {"patch_size": 4, "dim_mult": [1, 1, 1], "temperal_downsample": [True, True], "num_res_blocks": 0},
    "as in Wan2.2": {"patch_size": 2, "dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True], "num_res_blocks": 1},
}


@pytest.fixture
def planes(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    monkeypatch.syspath_prepend(str(request.config.rootpath / "scripts"))
    return importlib.import_module("tiny_wan_planes")


def make_vae(layout: dict[str, Any]) -> AutoencoderKLWan:
    torch.manual_seed(0)
    values = 3 * layout["patch_size"] ** 2
    sizes = {"base_dim": 8, "decoder_base_dim": 8, "z_dim": 48, "is_residual": True, "in_channels": values, "out_channels": values}
    return AutoencoderKLWan(**sizes, **layout, latents_mean=[0.0] * 48, latents_std=[1.0] * 48, scale_factor_spatial=16)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("num_frames", [1, 9])
def test_encodes_and_decodes_like_the_vae(planes: Any, layout: dict[str, Any], num_frames: int) -> None:
    vae = make_vae(layout)
    pictures = torch.rand(2, 3, num_frames, SIDE_PX, SIDE_PX) * 2 - 1
    with torch.no_grad():
        expected: Any = vae.encode(pictures)
        mean, log_variance = planes.PlaneVae(vae).encode(pictures)
        decoded = planes.PlaneVae(vae).decode(mean)
        expected_pictures: Any = vae.decode(mean)
    torch.testing.assert_close(mean, expected.latent_dist.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(log_variance, expected.latent_dist.logvar, atol=1e-5, rtol=0)
    torch.testing.assert_close(decoded.clamp(-1, 1), expected_pictures.sample, atol=1e-5, rtol=0)


def gradients_of(vae: AutoencoderKLWan, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    vae.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in vae.named_parameters() if parameter.grad is not None}


def test_gradients_are_those_of_the_vae(planes: Any) -> None:
    vae = make_vae(LAYOUTS["two levels, no blocks"])
    pictures = torch.rand(1, 3, 5, SIDE_PX, SIDE_PX) * 2 - 1
    encoded: Any = vae.encode(pictures)
    decoded: Any = vae.decode(encoded.latent_dist.mean)
    expected = gradients_of(vae, decoded.sample.square().mean())
    by_planes = planes.PlaneVae(vae)
    actual = gradients_of(vae, by_planes.decode(by_planes.encode(pictures)[0]).clamp(-1, 1).square().mean())
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_kept_frames_are_those_of_the_whole_decoding_and_a_flat_vae_is_the_vae_itself(planes: Any) -> None:
    vae = make_vae(LAYOUTS["two levels, no blocks"])
    planes.flatten(vae)
    latents = torch.randn(2, 48, 3, 2, 2)
    kept = torch.tensor([[0, 5], [3, 8]])
    with torch.no_grad():
        flat = planes.PlaneVae(vae, flat=True)
        whole = flat.decode(latents)
        some = flat.decode(latents, kept)
        expected: Any = vae.decode(latents)
    torch.testing.assert_close(whole.clamp(-1, 1), expected.sample, atol=1e-5, rtol=0)
    for clip, frames in enumerate(kept):
        torch.testing.assert_close(some[clip], whole[clip, :, frames], atol=1e-5, rtol=0)
