"""The codec of the tiny Wan: statistics, round trips, padding, and parts that nobody can wake."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvwan import heatmaps
from mvwan.errors import MvwanError
from mvwan.model.latents import LatentCodec, codec_digest
from mvwan.model.wan import TINY_FOLDER, AutoencoderKLWan, load_vae

TEXT_TOKENS = 48


@pytest.fixture(scope="module")
def codec() -> LatentCodec:
    return LatentCodec.load("tiny", TEXT_TOKENS)


def moving_heat(num_frames: int = 5, size_px: int = 128, sigma_px: float = 4.0) -> tuple[np.ndarray, np.ndarray]:
    """([3 F H W 3] uint8, uv_px [3 F 2]) of three points that move across the picture."""
    steps = np.linspace(0, 1, num_frames)[:, None]
    starts = np.array([[30.0, 40.0], [80.0, 64.0], [64.0, 96.0]])
    moves = np.array([[20.0, 10.0], [-15.0, 12.0], [4.0, -18.0]])
    uv = starts[:, None] + steps * moves[:, None]
    heat = heatmaps.render(uv, np.ones(uv.shape[:2], bool), size_px, size_px, sigma_px)
    return heatmaps.colour(heat), uv


def test_shapes_follow_the_wan_2_2_vae(codec: LatentCodec) -> None:
    latents = codec.encode_video(np.zeros((2, 9, 64, 96, 3), np.uint8))
    assert latents.shape == (2, 48, 3, 4, 6)
    assert latents.dtype == torch.float32
    assert codec.decode_video(latents).shape == (2, 9, 64, 96, 3)


def test_latents_are_normalised_with_the_statistics_of_the_vae(codec: LatentCodec) -> None:
    rgb = moving_heat()[0]
    pictures = torch.from_numpy(rgb).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        raw = codec.vae.encode(pictures).latent_dist.mode()
    mean = torch.tensor(codec.vae.config.latents_mean).reshape(1, 48, 1, 1, 1)
    std = torch.tensor(codec.vae.config.latents_std).reshape(1, 48, 1, 1, 1)
    assert torch.allclose(codec.encode_video(rgb), (raw - mean) / std, atol=1e-6)
    assert codec.encode_video(rgb).std() < 5, "latents are of about unit size, so noise of unit size fits"


def test_a_heatmap_survives_the_vae(codec: LatentCodec) -> None:
    """Colour map, blur and 4-to-1 time stride all move the peak: measured here, in px, on whole windows."""
    video, uv = moving_heat(num_frames=13)
    decoded = codec.decode_video(codec.encode_video(video))
    found, confidence = heatmaps.peak(heatmaps.uncolour(decoded))
    error = np.linalg.norm(found - uv, axis=-1)
    assert np.median(error) < 3.0, f"median {np.median(error):.2f} px, p95 {np.quantile(error, 0.95):.2f} px"
    assert confidence.mean() > 0.2


def test_text_is_zero_after_its_own_tokens_and_padding_changes_nothing(codec: LatentCodec) -> None:
    texts = ["open the drawer", "press"]
    embedded = codec.encode_text(texts)
    assert embedded.shape[:2] == (2, TEXT_TOKENS)
    own = len("press") + 1  # bytes, and the end mark
    assert embedded[1, own - 1].abs().max() > 0
    assert not embedded[1, own:].any()
    assert torch.allclose(codec.encode_text(["press"])[0], embedded[1], atol=1e-2)
    longer = LatentCodec(codec.vae, codec.tokenizer, codec.text_encoder, 64, codec.digest).encode_text(["press"])[0]
    assert torch.allclose(longer[:own], embedded[1, :own], atol=1e-2)


def test_no_dropout_whatever_train_is_called_on(codec: LatentCodec) -> None:
    """A text encoder left in train mode gives another embedding every time: it happens when the module that owns it calls `.train()`."""
    before = codec.encode_text(["open the drawer"])
    assert codec.text_encoder.config.dropout_rate > 0, "or this test could not fail"
    codec.text_encoder.train()
    assert not torch.equal(codec.text_encoder(**_ids(codec)).last_hidden_state, codec.text_encoder(**_ids(codec)).last_hidden_state)
    assert torch.equal(codec.encode_text(["open the drawer"]), before)
    assert not any(parameter.requires_grad for part in (codec.vae, codec.text_encoder) for parameter in part.parameters())


def _ids(codec: LatentCodec) -> dict[str, torch.Tensor]:
    return dict(codec.tokenizer(["open the drawer"], return_tensors="pt"))


def test_the_digest_depends_on_the_prompt_length(codec: LatentCodec) -> None:
    assert codec.digest == codec_digest("tiny", TEXT_TOKENS)
    assert codec.digest != codec_digest("tiny", TEXT_TOKENS + 1)


def test_what_does_not_fit_is_refused(codec: LatentCodec) -> None:
    with pytest.raises(MvwanError, match="nearest are 49 and 53"):
        codec.encode_video(np.zeros((1, 50, 64, 64, 3), np.uint8))
    with pytest.raises(MvwanError, match="multiple of 32"):
        codec.encode_video(np.zeros((1, 5, 60, 64, 3), np.uint8))
    with pytest.raises(MvwanError, match=r"61 tokens, data\.text_tokens=48"):
        codec.encode_text(["x" * 60])


def test_layers_that_look_at_no_earlier_frame_do_a_third_of_the_work_and_give_the_same_bits(tmp_path: Path) -> None:
    stock: Any = AutoencoderKLWan.from_pretrained(TINY_FOLDER / "vae", torch_dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(2)
    pictures, latents = torch.rand(2, 3, 9, 64, 96, generator=generator) * 2 - 1, torch.randn(2, 48, 3, 4, 6, generator=generator)
    ours: Any = load_vae("tiny")
    changed = [name for name, module in ours.named_modules() if type(module) is not type(stock.get_submodule(name))]
    assert changed, "the tiny base has such layers"
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(pictures).latent_dist.mode(), stock.encode(pictures).latent_dist.mode(), rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.decode(latents).sample, stock.decode(latents).sample, rtol=0, atol=1e-5)
        assert list(ours.state_dict()) == list(stock.state_dict())
        for name in changed:
            stock.get_submodule(name).weight[:, :, 0] += 0.01
    shutil.copytree(TINY_FOLDER, tmp_path / "base")
    stock.save_pretrained(tmp_path / "base" / "vae")
    other: Any = load_vae(tmp_path / "base")
    assert {type(other.get_submodule(name)) for name in changed} == {type(stock.get_submodule(name)) for name in changed}, "left alone"
    with torch.no_grad():
        assert (other.decode(latents).sample - ours.decode(latents).sample).abs().max() > 1e-3
