"""The shipped base is a plain diffusers folder: diffusers' own pipelines load it and make videos, and it is as good as it says."""

import json

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image

from mvwan import heatmaps
from mvwan.checkpoint import find_checkpoint, load_trained
from mvwan.checkpoint_compare import verify_checkpoint
from mvwan.errors import MvwanError
from mvwan.model.latents import LatentCodec
from mvwan.model.wan import TINY_FOLDER
from mvwan.presets import config_from_preset
from mvwan.training_module import HeatmapWanTrainingModule

WORDS = "Close the window."


def test_diffusers_text_to_video_pipeline_makes_a_video_of_it() -> None:
    pipeline = WanPipeline.from_pretrained(TINY_FOLDER, dtype=torch.float32)
    drawn = torch.Generator().manual_seed(0)
    made = pipeline(WORDS, height=64, width=64, num_frames=5, num_inference_steps=2, guidance_scale=1.0, generator=drawn, output_type="np")
    assert made.frames.shape == (1, 5, 64, 64, 3)
    assert np.isfinite(made.frames).all() and made.frames.std() > 0.02


def test_diffusers_image_to_video_pipeline_keeps_the_first_picture() -> None:
    pipeline = WanImageToVideoPipeline.from_pretrained(TINY_FOLDER, dtype=torch.float32)
    rows, columns = np.mgrid[0:128, 0:128]
    picture = np.stack([90 + 60 * (columns > 64), 120 + 0 * rows, 80 + rows // 2], axis=-1).astype(np.uint8)
    drawn = torch.Generator().manual_seed(0)
    # Given words, this pipeline cleans them with a library that nothing else needs.
    words = LatentCodec.load(TINY_FOLDER, 64).encode_text([WORDS])
    made = pipeline(
        Image.fromarray(picture), prompt_embeds=words, height=128, width=128, num_frames=5, num_inference_steps=2, guidance_scale=1.0,
        generator=drawn, output_type="np",
    )  # fmt: skip
    assert made.frames.shape == (1, 5, 128, 128, 3)
    # Of a picture like no simulator draws, the codec itself loses most of this.
    assert np.abs(made.frames[0, 0] - picture / 255).mean() < 0.07


def test_a_spot_comes_through_the_codec_where_it_was() -> None:
    codec = LatentCodec.load(TINY_FOLDER, 64)
    uv_px = np.stack([np.linspace(30, 90, 13), np.linspace(80, 50, 13)], axis=-1)[None]
    video = heatmaps.colour(heatmaps.render(uv_px, np.ones((1, 13), bool), 128, 128, 4.0))
    found, confidence = heatmaps.peak(heatmaps.uncolour(codec.decode_video(codec.encode_video(video))))
    shift_px = np.linalg.norm(found - uv_px, axis=-1)
    assert shift_px.mean() < 0.5 and (confidence > 0.5).all()


def test_what_it_says_of_itself_is_what_was_asked_of_it() -> None:
    told = json.loads((TINY_FOLDER / "quality.json").read_text())["measured"]
    for kind in ("rig", "random"):
        shift = next(part for part in told[kind]["heatmap_peak_shift"] if part["heatmap_sigma_px"] == 4.0)
        assert shift["mean_px"] < 0.5
    assert sum(path.stat().st_size for path in TINY_FOLDER.parent.rglob("*") if path.is_file()) < 40e6


@pytest.mark.parametrize("switch", [False, True])
def test_the_tracking_checkpoint_is_whole_and_starts_runs_with_the_switch_off_and_on(switch: bool) -> None:
    found, sentence = verify_checkpoint("tiny-tracking")
    assert found.parent == TINY_FOLDER.parent and "all digests match" in sentence
    config = config_from_preset("tiny-finetune", {"unfreeze_modulation_and_norms": switch})
    assert config.train.from_checkpoint == "tiny-tracking"
    module = HeatmapWanTrainingModule(config=config, checkpoint="tiny-tracking", print_banners=False)
    stored = load_trained("tiny-tracking").tensors
    held = module.saved_tensors()
    assert held.keys() == stored.keys() and all(torch.equal(held[name], stored[name]) for name in stored)
    assert module.fit is not None and module.fit.outcome == ("exact" if switch else "newer")


def test_a_tracking_checkpoint_of_nearly_that_name_is_not_there() -> None:
    with pytest.raises(MvwanError, match="Did you mean 'tiny-tracking'"):
        find_checkpoint("tiny-traking")
