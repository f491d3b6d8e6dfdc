"""Heat read from latents without the VAE: fitted to the tiny VAE's own latents, in the loss, in checkpoints, in predictions."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import conv2d, pad, pixel_shuffle

from mvwan.checkpoint import find_checkpoint, read_heat_reader, read_manifest, share_checkpoint
from mvwan.checkpoint_compare import verify_checkpoint
from mvwan.checkpoint_export import export_checkpoint
from mvwan.errors import MvwanError
from mvwan.evaluate import evaluate_prediction, held_out_windows, predict_sample
from mvwan.heat_reader import Clips, HeatReader, fit_heat_reader
from mvwan.heatmaps import colour, peak, render
from mvwan.model.latents import LatentCodec
from mvwan.model.multiview_wan import MultiViewWan
from mvwan.presets import config_from_preset
from mvwan.sample import load_run, predict
from mvwan.train import train

SIGMA_PX = 6.0


def moving_points(rng: np.random.Generator, clips: int, frames: int, side: int) -> np.ndarray:
    """[N F 2] points that start anywhere and move a few pixels per frame, inside the picture."""
    start, speed = rng.uniform(0.15, 0.85, (clips, 1, 2)) * side, rng.uniform(-3, 3, (clips, 1, 2))
    return np.clip(start + speed * np.arange(frames)[:, None], 1, side - 1)


@pytest.fixture(scope="module")
def encoded() -> Clips:
    codec = LatentCodec.load("tiny", 32)
    uv_px = moving_points(np.random.default_rng(0), 96, 9, 96)
    visible = np.ones(uv_px.shape[:2], bool)
    heat = colour(render(uv_px, visible, 96, 96, SIGMA_PX))
    return Clips(latents=codec.encode_video(heat), uv_px=uv_px, visible=visible)


@pytest.fixture(scope="module")
def reader(encoded: Clips) -> HeatReader:
    return fit_heat_reader([encoded], SIGMA_PX)[0]


def test_reads_points_of_clips_that_it_was_not_fitted_to(encoded: Clips) -> None:
    reader, quality = fit_heat_reader([encoded], SIGMA_PX)
    assert quality.clips == 12
    assert quality.explained > 0.8
    assert quality.error_px < 2
    assert "12 clips" in str(quality) and "poor" not in str(quality)
    kept_out = slice(0, None, 8)
    heat = reader.pictures(encoded.latents[kept_out])
    assert heat.shape == (12, 8, 96, 96) and heat.dtype == np.float32 and heat.min() >= 0 and heat.max() <= 1
    found, confidence = peak(heat)
    assert np.median(np.linalg.norm(found - encoded.uv_px[kept_out, 1:], axis=-1)) == pytest.approx(quality.error_px, abs=1e-3)
    assert (confidence > 0.2).mean() > 0.9


def test_reads_the_mean_of_the_spots_from_a_mean_of_latents(encoded: Clips, reader: HeatReader) -> None:
    first, second = encoded.latents[:48], encoded.latents[48:]
    mean_of_heat = (reader.read(first) + reader.read(second)) / 2
    assert torch.allclose(reader.read((first + second) / 2), mean_of_heat, atol=1e-4)


def test_squared_error_is_that_of_the_cells(encoded: Clips, reader: HeatReader) -> None:
    true, other = encoded.latents[:12], encoded.latents[12:24].clone()
    other[:, :, 0] = true[:, :, 0]  # which is given
    cells = (reader.read(true) - reader.read(other)).square()  # [12 8 12 12]
    difference = (true - other)[:, :, 1:]
    found = reader.squared_error(difference.unflatten(0, (4, 3)))
    assert found.shape == (4,)
    assert (found.sum() / difference.numel()).item() == pytest.approx(cells.mean().item(), rel=1e-4)
    assert torch.equal(reader.squared_error(torch.zeros_like(difference).unflatten(0, (4, 3))), torch.zeros(4))


def test_error_shrinks_as_a_spot_comes_nearer(reader: HeatReader) -> None:
    """What latents themselves do not say: which of two wrong places is the less wrong."""
    codec = LatentCodec.load("tiny", 32)
    places = np.array([48.0, 50, 54, 60, 72])
    uv_px = np.stack([places, np.full(5, 48.0)], axis=-1)[:, None].repeat(5, axis=1)
    latents = codec.encode_video(colour(render(uv_px, np.ones((5, 5), bool), 96, 96, SIGMA_PX)))[:, :, 1:]
    errors = [reader.squared_error((latents[:1] - latents[place : place + 1])[None]).item() for place in range(5)]
    assert errors == sorted(errors) and errors[0] == 0
    assert errors[3] < 0.95 * errors[4]


def test_frames_that_do_not_show_the_point_throughout_are_not_fitted_to(encoded: Clips) -> None:
    visible = encoded.visible.copy()
    visible[1::2, 3::4] = False
    nowhere = np.where(visible[..., None], encoded.uv_px, np.nan)
    half = Clips(latents=encoded.latents, uv_px=nowhere, visible=visible)
    other = encoded.latents.clone()
    other[1::2] = torch.randn_like(other[1::2])
    found, spoiled = (fit_heat_reader([clips], SIGMA_PX)[0] for clips in (half, Clips(latents=other, uv_px=nowhere, visible=visible)))
    assert torch.isfinite(found.weight).all()
    assert torch.equal(found.weight, spoiled.weight)
    unspoiled = fit_heat_reader([encoded], SIGMA_PX)[0]
    assert not torch.equal(found.weight, unspoiled.weight)
    nothing = Clips(latents=encoded.latents, uv_px=nowhere, visible=np.zeros_like(visible))
    with pytest.raises(MvwanError, match=r"train\.heat_reader_weight=0"):
        fit_heat_reader([nothing], SIGMA_PX)


@pytest.mark.parametrize("views", [2, 4, 8])
def test_its_quality_is_that_of_all_views(encoded: Clips, views: int) -> None:
    """Of every view of its windows one in eight is kept out; also where the first never shows the point, there is something to say."""
    blind = encoded.visible.copy()
    blind[::views] = False
    windows = [
        Clips(
            latents=encoded.latents[first : first + views], uv_px=encoded.uv_px[first : first + views], visible=blind[first : first + views]
        )
        for first in range(0, 96, views)
    ]
    quality = fit_heat_reader(windows, SIGMA_PX)[1]
    assert quality.clips == {2: 6, 4: 9, 8: 10}[views] and "poor" not in str(quality)


def test_says_when_latents_hold_no_heat(encoded: Clips) -> None:
    noise = Clips(latents=torch.randn_like(encoded.latents), uv_px=encoded.uv_px, visible=encoded.visible)
    assert "poor" in str(fit_heat_reader([noise], SIGMA_PX)[1])


def test_the_first_of_four_frames_is_read_as_well_as_the_others(encoded: Clips, reader: HeatReader) -> None:
    """Its latent alone says less of it than the one before."""
    found, _ = peak(reader.pictures(encoded.latents))
    error_px = np.linalg.norm(found - encoded.uv_px[:, 1:], axis=-1).mean(axis=0)
    assert error_px[[0, 4]].max() < 1.5 * np.median(error_px)
    blind = HeatReader(reader.weight[:, 48:96], reader.bias)
    unsure, _ = peak(blind.pictures(encoded.latents))
    assert np.linalg.norm(unsure - encoded.uv_px[:, 1:], axis=-1).mean(axis=0)[4] > 2 * error_px[4]


def test_a_reader_of_before_reads_each_latent_alone(encoded: Clips) -> None:
    weight, bias = torch.randn(16, 48, 3, 3), torch.randn(16)
    older = HeatReader(weight, bias)
    assert set(older.tensors) == {"weight", "bias"}
    later = encoded.latents[:2, :, 1:]
    wanted = [conv2d(pad(later[:, :, frame], (1,) * 4, mode="replicate"), weight, bias) for frame in range(2)]
    found = older.read(encoded.latents[:2])
    assert found.shape == (2, 8, 12, 12)
    for frame, outputs in enumerate(wanted):
        assert torch.allclose(found[:, 4 * frame : 4 * frame + 4], pixel_shuffle(outputs, 2), atol=1e-4)


def test_windows_of_other_lengths_than_it_was_fitted_to_are_read(encoded: Clips, reader: HeatReader) -> None:
    """Clips of one later latent teach the layer of the last one alone; longer windows are then read without looking ahead."""
    short = Clips(latents=encoded.latents[:, :, :2], uv_px=encoded.uv_px[:, :5], visible=encoded.visible[:, :5])
    of_short = fit_heat_reader([short], SIGMA_PX)[0]
    for one, frames in ((of_short, 9), (reader, 5)):
        found, _ = peak(one.pictures(encoded.latents[:, :, : frames // 4 + 1]))
        assert np.median(np.linalg.norm(found - encoded.uv_px[:, 1:frames], axis=-1)) < 2


def test_refuses_tensors_of_another_shape() -> None:
    with pytest.raises(MvwanError, match="Use another checkpoint"):
        HeatReader(torch.zeros(16, 48, 5, 5), torch.zeros(16))


# ── in a run ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def settings(demonstrations: Path, **more: float) -> dict[str, dict[str, object]]:
    data = {"root": str(demonstrations), "heatmap_sigma_px": 4.0, "window_stride": 2}
    return {"data": data, "train": {"tracker": "none", "heat_reader_weight": 100.0, **more}}


@pytest.fixture(scope="module")
def run(tiny_demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "reads"
    train(config_from_preset("debug", settings(tiny_demonstrations)), output)
    return output


def test_a_run_says_how_well_it_reads(tiny_demonstrations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config_from_preset("debug", settings(tiny_demonstrations)), tmp_path / "run")
    assert "heat reader: explains" in capsys.readouterr().out


def test_a_checkpoint_keeps_the_reader(run: Path, tmp_path: Path) -> None:
    folder = find_checkpoint(run)
    saved = read_heat_reader(folder)
    assert saved is not None
    assert "heat_reader.safetensors" in read_manifest(folder)["files"]
    verify_checkpoint(folder)
    shared = read_heat_reader(share_checkpoint(folder, tmp_path / "shared"))
    assert shared is not None
    assert all(torch.equal(saved[name], shared[name]) for name in ("weight", "bias", "weight_last", "bias_last"))


def test_a_damaged_reader_is_refused(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "step-000002"
    shutil.copytree(find_checkpoint(run), copied)
    path = copied / "heat_reader.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(MvwanError, match="damaged"):
        load_run(copied)
    with pytest.raises(MvwanError, match="damaged"):
        verify_checkpoint(copied)


def test_the_same_run_again_has_the_same_reader_and_bits(run: Path, tiny_demonstrations: Path, tmp_path: Path) -> None:
    """Also when it is stopped on the way: the reader is the one that was saved, not one fitted anew."""
    config = config_from_preset("debug", settings(tiny_demonstrations, steps=1, save_every=1))
    train(config, tmp_path / "run")
    first = (find_checkpoint(tmp_path / "run") / "heat_reader.safetensors").read_bytes()
    train(config_from_preset("debug", settings(tiny_demonstrations)), tmp_path / "run", resume=True)
    again, whole = find_checkpoint(tmp_path / "run"), find_checkpoint(run)
    assert first == (again / "heat_reader.safetensors").read_bytes() == (whole / "heat_reader.safetensors").read_bytes()
    assert (again / "trained.safetensors").read_bytes() == (whole / "trained.safetensors").read_bytes()


def test_the_loss_has_what_is_read(run: Path, tiny_demonstrations: Path, tmp_path: Path) -> None:
    plain = train(config_from_preset("debug", settings(tiny_demonstrations, heat_reader_weight=0.0)), tmp_path / "plain")
    assert read_heat_reader(find_checkpoint(tmp_path / "plain")) is None
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"kind": "train"' in line]
    assert len(lines) == 2
    first = plain.history[1]
    reading = json.loads(lines[0])
    assert first["kind"] == "train" and reading["step"] == first["step"] == 1
    assert reading["rgb_loss"] == first["rgb_loss"]
    assert reading["heat_loss"] > first["heat_loss"] * 1.01


def test_predictions_read_their_heat_with_it(run: Path) -> None:
    reads, decodes = load_run(run), load_run(run, heat_from="vae")
    assert reads.reader is not None and decodes.reader is None
    sample = held_out_windows(reads).sample(0)
    read, decoded = predict_sample(reads, sample, denoise_steps=1), predict_sample(decodes, sample, denoise_steps=1)
    assert np.array_equal(read.rgb, decoded.rgb)
    assert np.array_equal(read.heat[:, 0], decoded.heat[:, 0])
    assert not np.array_equal(read.heat[:, 1:], decoded.heat[:, 1:])
    result = evaluate_prediction(reads, windows=2, denoise_steps=1, output=run.parent / "reads.json")
    assert result["heat_from"] == "reader"
    assert evaluate_prediction(decodes, windows=2, denoise_steps=1, output=run.parent / "decodes.json")["heat_from"] == "vae"
    assert result["codec_key"] != evaluate_prediction(decodes, windows=2, denoise_steps=1, output=run.parent / "again.json")["codec_key"]


def test_exports_take_it_along_or_say_so(run: Path, tmp_path: Path) -> None:
    saved = (find_checkpoint(run) / "heat_reader.safetensors").read_bytes()
    for form in ("multiview", "diffusers-lora"):
        written = export_checkpoint(run, tmp_path / form, form)
        assert (written.path / "heat_reader.safetensors").read_bytes() == saved
        assert "heat_reader.safetensors" in " ".join(written.notes)
    assert "heat reader is not in it" in " ".join(export_checkpoint(run, tmp_path / "native.safetensors", "wan-native").notes)


def test_an_exported_model_predicts_with_it_as_the_run_does(run: Path, tmp_path: Path) -> None:
    loaded = load_run(run)
    folder = export_checkpoint(run, tmp_path / "whole", "multiview").path
    model, reader = MultiViewWan.from_pretrained(folder).eval(), HeatReader(**load_file(folder / "heat_reader.safetensors"))
    sample = held_out_windows(loaded).sample(0)
    asked = {"images": sample.rgb[:, 0], "prompt": sample.instruction, "cameras": sample.cameras, "steps": 1, "point_m": sample.point_m[0]}
    bare = {"codec": loaded.codec, "config": loaded.config}
    of_run, of_export, decoded = predict(loaded, **asked), predict(model, **asked, **bare, reader=reader), predict(model, **asked, **bare)
    assert np.abs(of_export.heat - of_run.heat).max() < 0.02
    assert np.abs(decoded.heat - of_run.heat).max() > 0.2
