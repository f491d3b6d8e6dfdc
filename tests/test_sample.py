"""Prediction: given frames stay, noise is a function of (seed, id), a straight path is walked exactly, and a run's folder is enough."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mvwan
from mvwan import flow
from mvwan.config import config_from_dict
from mvwan.data.dataset import WindowDataset, read_episodes
from mvwan.errors import MvwanError
from mvwan.heatmaps import peak, render
from mvwan.model.latents import LatentCodec
from mvwan.model.multiview_wan import MultiViewWan
from mvwan.presets import config_from_preset
from mvwan.sample import denoise, predict


class StraightPath(nn.Module):
    """The perfect network: knows clean and noise, so its velocity is exact at every sigma. Notes what it was asked."""

    head_action = None

    def __init__(self, velocity: torch.Tensor) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.velocity = velocity
        self.asked: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def forward(
        self, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, condition_frames: int, rays: torch.Tensor | None
    ) -> torch.Tensor:
        self.asked.append((latents.clone(), timestep.clone(), condition_frames))
        return self.velocity


@pytest.fixture(scope="module")
def codec() -> LatentCodec:
    return LatentCodec.load("tiny", 32)


@pytest.fixture(scope="module")
def model() -> MultiViewWan:
    return mvwan.load_model("tiny", lora_rank=2, dtype=torch.float32)[0]


@pytest.fixture(scope="module")
def window(tiny_demonstrations: Path):
    data = config_from_preset("debug", {"data": {"root": str(tiny_demonstrations)}}).data
    return WindowDataset(read_episodes(data.root), data, 3, "train", 0).sample(0)


SETTINGS = config_from_dict({"data": {"num_frames": 5, "height_px": 64, "width_px": 64, "heatmap_sigma_px": 2.5, "text_tokens": 32}})


@pytest.mark.parametrize(("denoise_steps", "sigma_min"), [(1, 0.0), (5, 0.0), (1, 0.6), (4, 0.6)])
def test_a_straight_path_is_walked_exactly(denoise_steps: int, sigma_min: float) -> None:
    shape = (2, 3, 96, 3, 2, 4)
    clean = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    noise = flow.draw_noise(7, 0, ["0", "1"], shape[1:])
    network = StraightPath(flow.velocity_target(clean, noise))
    text = torch.zeros(2, 4, 8)
    given, options = clean[:, :, :, :1], {"shift": 5.0, "sigma_min": sigma_min}
    found, _ = denoise(network, given, text, 3, denoise_steps=denoise_steps, seed=7, precision="no", **options)
    assert torch.equal(found[:, :, :, :1], clean[:, :, :, :1])
    assert torch.allclose(found, clean, atol=2e-6)
    sigmas = flow.euler_sigmas(denoise_steps, **options)
    assert len(network.asked) == denoise_steps
    for (latents, timestep, condition_frames), sigma in zip(network.asked, sigmas, strict=False):
        assert torch.equal(latents[:, :, :, :1], clean[:, :, :, :1])
        assert torch.equal(timestep, torch.full((2,), float(1000 * sigma)))
        assert timestep.dtype == torch.float32
        assert condition_frames == 1
    assert torch.equal(network.asked[0][0][:, :, :, 1:], noise[:, :, :, 1:])


def test_the_noise_belongs_to_seed_and_id_not_to_the_batch() -> None:
    def found(ids: list[str], seed: int) -> torch.Tensor:
        given = torch.zeros(len(ids), 2, 96, 1, 2, 2)
        still = StraightPath(torch.zeros(()).expand(len(ids), 2, 96, 2, 2, 2))
        return denoise(still, given, torch.zeros(1, 1, 1), 2, denoise_steps=1, seed=seed, shift=1.0, precision="no", sample_ids=ids)[0]

    both = found(["a", "b"], 0)
    assert torch.equal(found(["b"], 0)[0], both[1])
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(found(["b"], 1)[0], both[1])


def test_the_first_picture_alone_encodes_like_the_clip_it_starts(codec: LatentCodec, window) -> None:
    """Training gives latent frame 0 of the whole clip; prediction has the first picture only."""
    alone, clip = codec.encode_video(window.rgb[:, :1]), codec.encode_video(window.rgb)
    assert torch.allclose(alone[:, :, 0], clip[:, :, 0], atol=1e-4)


def test_prediction_of_a_bare_model(model: MultiViewWan, codec: LatentCodec, window) -> None:
    given = {"steps": 2, "point_m": window.point_m[0], "codec": codec, "config": SETTINGS}
    first = mvwan.predict(model, window.rgb[:, 0], window.instruction, window.cameras, seed=3, **given)
    assert isinstance(first, mvwan.Prediction)
    assert first.rgb.shape == (3, 5, 64, 64, 3)
    assert np.array_equal(first.rgb[:, 0], window.rgb[:, 0])
    assert np.allclose(first.heat[:, 0], render(window.uv_px[:, 0], window.visible[:, 0], 64, 64, 2.5), atol=1e-6)
    assert np.allclose(first.uv_px[:, 0], window.uv_px[:, 0], atol=0.05)
    assert np.allclose(first.point_m[0], window.point_m[0], atol=2e-3)
    uv_px, confidence = peak(first.heat)
    assert np.array_equal(first.uv_px, uv_px)
    assert np.array_equal(first.confidence, confidence)
    again = mvwan.predict(model, window.rgb[:, :1], window.instruction, window.cameras, seed=3, **given)
    other = mvwan.predict(model, window.rgb[:, 0], window.instruction, window.cameras, seed=4, **given)
    assert np.array_equal(first.rgb, again.rgb)
    assert not np.array_equal(first.rgb[:, 1:], other.rgb[:, 1:])


@pytest.mark.parametrize("head", ["none", "gripper", "gripper_rotation"])
def test_actions_of_a_prediction(head: str, codec: LatentCodec, window) -> None:
    own = mvwan.load_model("tiny", lora_rank=2, dtype=torch.float32, action_head=head)[0]  # type: ignore[arg-type]
    if own.head_action is not None:
        torch.nn.init.normal_(own.head_action.proj_out.weight, std=3.0, generator=torch.Generator().manual_seed(0))
    given = {"steps": 2, "codec": codec, "config": SETTINGS}
    said = predict(own, window.rgb[:, 0], "move the ball", window.cameras, **given)
    told = predict(own, window.rgb[:, 0], "move the ball", window.cameras, gripper_open=0.125, **given)
    unsure = predict(own, window.rgb[:, 0], "move the ball", window.cameras, gripper_open=np.array([np.nan]), **given)
    for found in (said, told, unsure):
        assert (found.gripper_open.shape, found.gripper_open.dtype) == ((5,), np.float32)
        assert (found.rotation_deg.shape, found.rotation_deg.dtype) == ((5, 3), np.float32)
        assert np.isnan(found.rotation_deg).all() == (head != "gripper_rotation")
    if head == "none":
        assert np.isnan(said.gripper_open).all() and np.isnan(told.gripper_open).all()
    else:
        for wrong in (1.5, np.zeros(2)):
            with pytest.raises(MvwanError, match=r"one opening in 0\.\.1 per given picture, of which there are 1"):
                predict(own, window.rgb[:, 0], "move the ball", window.cameras, gripper_open=wrong, **given)
        assert ((said.gripper_open > 0) & (said.gripper_open < 1)).all() and len(set(said.gripper_open.tolist())) == 5
        assert told.gripper_open.tolist() == [0.125, *said.gripper_open.tolist()[1:]]
        assert np.array_equal(unsure.gripper_open, said.gripper_open)
    if head == "gripper_rotation":
        assert not said.rotation_deg[0].any() and said.rotation_deg[1:].any()
        assert not (said.rotation_deg % 5).any() and np.abs(said.rotation_deg).max() <= 180


def test_actions_are_read_from_the_last_network_call(codec: LatentCodec) -> None:
    own = mvwan.load_model("tiny", lora_rank=2, dtype=torch.float32, action_head="gripper")[0]
    torch.nn.init.normal_(own.head_action.proj_out.weight, generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr]
    calls: list[tuple[float, bool, torch.Tensor]] = []
    own.register_forward_pre_hook(
        lambda _, given, more: calls.append((float(given[1][0]), more.get("return_action", False), given[0].clone())), with_kwargs=True
    )
    text, given = codec.encode_text(["move the ball"]), torch.zeros(1, 2, 96, 1, 2, 2)
    _, logits = denoise(own, given, text, 2, denoise_steps=3, seed=0, shift=5.0, precision="no")
    assert [asked for _, asked, _ in calls] == [False, False, True]
    assert calls[-1][0] == min(timestep for timestep, _, _ in calls)
    timestep, _, latents = calls[-1]
    with torch.no_grad():
        assert torch.equal(logits, own(latents, torch.tensor([timestep]), text, return_action=True)[1])  # type: ignore[arg-type]


def test_without_a_point_the_first_heatmap_is_blank(model: MultiViewWan, codec: LatentCodec, window) -> None:
    found = predict(model, window.rgb[:, 0], "move the ball", window.cameras, steps=1, codec=codec, config=SETTINGS)
    assert not found.heat[:, 0].any()
    assert not found.confidence[:, 0].any()
    assert np.isnan(found.point_m[0]).all()


def test_where_the_point_is_may_be_said_in_pictures(model: MultiViewWan, codec: LatentCodec, window) -> None:
    given = {"steps": 1, "codec": codec, "config": SETTINGS}
    said = np.where(window.visible[..., None], window.uv_px, np.nan)[:, 0].astype(np.float64)
    in_space = predict(model, window.rgb[:, 0], "move the ball", window.cameras, point_m=window.point_m[0], **given)
    in_pictures = predict(model, window.rgb[:, 0], "move the ball", window.cameras, point_px=said, **given)
    np.testing.assert_allclose(in_pictures.heat[:, 0], in_space.heat[:, 0], atol=1e-5)
    said[1] = np.nan
    lost = predict(model, window.rgb[:, 0], "move the ball", window.cameras, point_px=said, **given)
    assert not lost.heat[1, 0].any() and lost.heat[0, 0].max() > 0.5


def test_pictures_that_do_not_fit_are_refused(model: MultiViewWan, codec: LatentCodec, window) -> None:
    given = {"codec": codec, "config": SETTINGS, "steps": 1}
    cases = [
        (window.rgb[:2, 0], {}, "2 images and 3 cameras"),
        (window.rgb[:, 0].astype(np.float32), {}, "uint8"),
        (window.rgb[:, 0, :60], {}, "multiple of 32"),
        (window.rgb[:, 0, :32], {}, "resize cameras with their pictures"),
        (window.rgb[:, :2], {}, "hold 2 pictures per view; this run is given 1"),
        (window.rgb[:, 0], {"num_frames": 6}, "4\\*k\\+1"),
        (window.rgb[:, 0], {"num_frames": 1}, "more pictures than are given"),
        (window.rgb[:, 0], {"point_m": np.zeros(2)}, "one point in metres per given picture"),
        (window.rgb[:, 0], {"point_px": np.zeros((2, 2))}, r"one place in px per view and given picture, \(3, 1, 2\)"),
        (window.rgb[:, 0], {"point_px": np.zeros((3, 2)), "point_m": np.zeros(3)}, "give one of them"),
        (window.rgb[:, 0], {"steps": 0}, "at least one Euler step"),
        (window.rgb[:, 0], {"codec": None}, "a bare model needs codec"),
    ]
    for images, changes, message in cases:
        with pytest.raises(MvwanError, match=message):
            predict(model, images, "move the ball", window.cameras, **{**given, **changes})


def test_a_folder_without_a_run_is_refused(tmp_path: Path, window) -> None:
    with pytest.raises(MvwanError, match="no complete checkpoint"):
        predict(tmp_path, window.rgb[:, 0], "move the ball", window.cameras)


def test_heat_alone_is_the_same_prediction_without_the_pictures(model: MultiViewWan, codec: LatentCodec, window) -> None:
    settings = {"steps": 1, "codec": codec, "config": SETTINGS, "point_m": window.point_m[0]}
    whole, heat = (predict(model, window.rgb[:, 0], "move the ball", window.cameras, heat_only=only, **settings) for only in (False, True))
    assert (whole.rgb.shape[1], heat.rgb.shape[1]) == (5, 1)
    assert np.array_equal(heat.rgb, window.rgb[:, :1])
    # Another number of videos in a batch rounds its sums otherwise.
    assert np.allclose(whole.heat, heat.heat, atol=0.02)
