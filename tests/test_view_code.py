"""Cameras as input, the whole way: cache, training, hand-over, held-out windows through other cameras."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvwan import evaluate, sample
from mvwan.checkpoint import load_trained
from mvwan.config import Config, DataConfig, config_from_dict, merge
from mvwan.data.dataset import WindowDataset, read_episodes
from mvwan.errors import MvwanError
from mvwan.latent_cache import LatentCache
from mvwan.model.latents import codec_digest
from mvwan.presets import config_from_preset
from mvwan.train import train
from tests import formats

torch.set_num_threads(1)  # sizes are tiny: waking threads costs more than they do

QUIET: dict[str, Any] = {"train": {"evaluate_every": 2, "tracker": "none"}}
CAMERA, BOTH, SLOT = ({"model": {"view_code": code}} for code in ("camera", "both", "slot"))


def config_of(values: dict[str, Any], *overrides: dict[str, Any]) -> Config:
    return config_from_dict(merge(values, QUIET, *overrides))


@pytest.fixture(scope="module")
def camera_run(tiny_demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps that tells views apart by their cameras alone."""
    output = tmp_path_factory.mktemp("runs") / "camera"
    data = {"root": str(tiny_demonstrations), "heatmap_sigma_px": 2.0, "augment": {"variants": 1}}
    # Not in bfloat16, where a sum over views rounds by their order.
    exact = {"base": {"dtype": "float32"}, "train": {"tracker": "none", "precision": "no"}}
    train(config_from_preset("debug", {"data": data}, exact, CAMERA), output)
    return output


def test_the_camera_code_trains_and_is_remembered(camera_run: Path) -> None:
    trained = load_trained(camera_run)
    assert trained.manifest["view_code"] == "camera"
    assert trained.manifest["groups"]["camera_code"]["mode"] == "full"
    codes = [tensor for name, tensor in trained.tensors.items() if "camera_code" in name]
    assert len(codes) == 8 and all(bool(code.count_nonzero()) for code in codes), "they start at zero"


@pytest.mark.parametrize("kind", ["recording", "trail"])
def test_cameras_of_a_sample_are_known_without_its_pictures(kind: str, tiny_demonstrations: Path, tmp_path: Path) -> None:
    root = tiny_demonstrations if kind == "recording" else formats.write_trail(tmp_path / "trail", "drawer-close", (3,), 64)
    data = DataConfig(num_frames=5, height_px=64, width_px=64, validation_share=0.0, augment={"variants": 2})  # type: ignore[arg-type]
    windows = WindowDataset(read_episodes(root), data, 3, "train", seed=3)
    for variant in range(3):
        shown = [camera.to_dict() for camera in windows.sample(0, variant).cameras]
        assert [camera.to_dict() for camera in windows.cameras(0, variant)] == shown
    assert windows.cameras(0, 1)[0].to_dict() != windows.cameras(0, 2)[0].to_dict()


def test_a_batch_brings_the_rays_of_its_augmented_cameras(camera_run: Path) -> None:
    config = sample.load_run(camera_run).config
    windows = WindowDataset(read_episodes(config.data.root), config.data, 3, "train", config.seed)
    digest = codec_digest(config.base.source, config.data.text_tokens)
    cache = LatentCache.open(camera_run / "latents", windows, digest, config.data.heatmap_sigma_px)
    batch = cache.batch([0, 1], with_rays=True).check()
    assert batch.rays is not None and batch.rays.shape == (2, 3, 6, 4, 4)
    for place, variant in enumerate((0, 1)):
        expected = np.stack([camera.rays(4, 4) for camera in windows.sample(0, variant).cameras])
        np.testing.assert_array_equal(batch.rays[place].numpy(), expected)
    assert cache.batch([0]).rays is None


@pytest.mark.parametrize("names", [("left", "front"), ("front", "right", "left"), ("right",)])
def test_a_camera_run_looks_through_other_cameras(names: tuple[str, ...], camera_run: Path, tmp_path: Path) -> None:
    result = evaluate.evaluate_prediction(camera_run, cameras=names, windows=1, denoise_steps=1, output=tmp_path / "measured.json")
    assert result["views"] == list(names)
    assert len(result["measures"]["predicted"]["peak_error_px"]["per_view"]) == len(names)


def test_a_prediction_does_not_depend_on_the_order_of_cameras(camera_run: Path) -> None:
    run = sample.load_run(camera_run)
    for name, parameter in run.model.named_parameters():  # two steps have moved next to nothing
        if "projector" in name or "camera_code" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    window = evaluate.held_out_windows(run).sample(0)

    def heat_of(places: list[int]) -> np.ndarray:
        cameras = [window.cameras[place] for place in places]
        point_px = window.uv_px[places, 0]
        return sample.predict(run, window.rgb[places, 0], window.instruction, cameras, steps=2, point_px=point_px).heat

    plain, turned = heat_of([0, 1, 2]), heat_of([2, 0, 1])
    np.testing.assert_allclose(turned, plain[[2, 0, 1]], atol=0.02)  # decoded to 8 bits
    assert np.abs(turned - plain).max() > 0.1, "the views do differ"


def test_a_slot_run_takes_as_many_views_as_it_was_trained_on(debug_run: Path, tmp_path: Path) -> None:
    with pytest.raises(MvwanError, match=r"--cameras left,front: 2 views; the run was trained on 3 with model\.view_code=slot"):
        evaluate.evaluate_prediction(debug_run, cameras=("left", "front"), output=tmp_path / "measured.json")
    run = sample.load_run(debug_run)
    window = evaluate.held_out_windows(run).sample(0)
    with pytest.raises(MvwanError, match=r"2 views; the run was trained on 3, told apart by their order"):
        sample.predict(run, window.rgb[:2, 0], window.instruction, window.cameras[:2], steps=1)


def test_pictures_of_unknown_cameras_cannot_be_told_apart_by_camera(tiny_demonstrations: Path, tmp_path: Path) -> None:
    root = formats.write_mvtrack(tmp_path / "tracking", read_episodes(tiny_demonstrations)[:2])
    config = config_from_preset("debug", {"data": {"root": str(root)}, "model": {"action_head": "none"}}, QUIET, CAMERA)
    with pytest.raises(
        MvwanError, match=r"model\.view_code=camera: episode ball0 is labelled in pictures of cameras that nobody calibrated"
    ):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("code", [CAMERA, BOTH])
def test_a_checkpoint_of_slots_starts_a_run_with_cameras_only_when_that_is_insisted_on(
    code: dict[str, Any], golden_run: dict[str, Any], tmp_path: Path
) -> None:
    slots = train(config_of(golden_run, SLOT), tmp_path / "slot").checkpoint
    config = config_of(golden_run, code, {"train": {"from_checkpoint": str(slots)}})
    name = code["model"]["view_code"]
    with pytest.raises(MvwanError, match=rf"trained with model\.view_code slot, here it is {name}\. .*--accept-trainable-change"):
        train(config, tmp_path / "run")
    result = train(config, tmp_path / "run", accept_trainable_change=True)
    (change,) = load_trained(result.checkpoint).manifest["trainable_changes"]
    assert change["added"] == {"camera_code": 2} and change["frozen"] == {}
    with pytest.raises(MvwanError, match=r"trained with model\.view_code \w+, here it is slot\. Set it back\."):
        train(config_of(golden_run, SLOT, {"train": {"from_checkpoint": str(result.checkpoint)}}), tmp_path / "back")


def test_a_run_with_cameras_goes_on_as_if_it_had_not_stopped(golden_run: dict[str, Any], tmp_path: Path) -> None:
    whole = train(config_of(golden_run, CAMERA), tmp_path / "whole")
    train(config_of(golden_run, CAMERA, {"train": {"steps": 2}}), tmp_path / "parts")
    parts = train(config_of(golden_run, CAMERA), tmp_path / "parts", resume=True)
    expected, found = load_trained(whole.checkpoint).tensors, load_trained(parts.checkpoint).tensors
    assert all(torch.equal(expected[name], found[name]) for name in expected)
