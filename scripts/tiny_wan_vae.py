"""Trains the tiny VAE on recorded RGB clips and JET heatmap clips, resumable.

The decoder's output is not clamped here: the clamp has no gradient where heatmap backgrounds sit. All is float32: on AMX machines
the bfloat16 weight gradients of these convolutions are wrong or corrupt memory (torch 2.13 with oneDNN), and without AMX slower.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny_wan_clips as clips
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from tiny_wan_parts import VAE_SIZES, new_vae, posterior

from mvwan.files import read_json, whole_file, write_json

CROP_SHARE = 0.7
"""Share of the steps on many half-size crops instead of few whole pictures; the last quarter of the schedule has none."""
HEAT_FIRST = 0.68
"""Share of the schedule in which spots weigh enough to be learned at all; the rest is for the RGB pictures, which starve meanwhile.
None of it when the training starts from a VAE that knows spots."""
BLOB_WEIGHT = (30.0, 6.0)
RGB_WEIGHT = (1.0, 4.0)
"""Before and after."""
SQUARE_WEIGHT = 2.0
KL_WEIGHT = 1e-5
BETAS = (0.9, 0.99)
EMA = 0.998
WARMUP = 150
DECAY_FROM = 0.4
_DARK_BLUE = (-1.0, -1.0, 0.0)


def _decode_unclamped(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """[B 3 F H W], what `vae.decode` gives before its clamp."""
    vae.clear_cache()
    latents = vae.post_quant_conv(latents)
    frames = []
    for index in range(latents.shape[2]):
        vae._conv_idx = [0]
        one = latents[:, :, index : index + 1]
        frames.append(vae.decoder(one, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=index == 0))
    vae.clear_cache()
    return unpatchify(torch.cat(frames, 2), patch_size=VAE_SIZES["patch_size"])


def loss_of(
    vae: AutoencoderKLWan, pictures: torch.Tensor, is_heat: torch.Tensor, generator: torch.Generator, phase: int
) -> dict[str, torch.Tensor]:
    """Losses of one batch: `rgb`, `heat` (L1 + weighted L2, blobs of heatmaps weighted), `kl`, and their `total`; phase 0 or 1."""
    gaussian = posterior(vae, pictures)
    latents = gaussian.mean + gaussian.std * torch.randn(gaussian.mean.shape, generator=generator)
    error = _decode_unclamped(vae, latents) - pictures
    cost = error.abs() + SQUARE_WEIGHT * error.square()
    blob = (pictures - torch.tensor(_DARK_BLUE)[:, None, None, None]).abs().amax(1, keepdim=True) > 0.15
    weight = 1 + (BLOB_WEIGHT[phase] - 1) * (blob & is_heat[:, None, None, None, None])
    rgb = cost[~is_heat].mean()
    heat = (cost * weight)[is_heat].mean()
    kl = 0.5 * (gaussian.mean.square() + gaussian.var - 1 - gaussian.logvar).mean()
    return {"total": RGB_WEIGHT[phase] * rgb + heat + KL_WEIGHT * kl, "rgb": rgb.detach(), "heat": heat.detach(), "kl": kl.detach()}


def draw(videos: list[clips.Video], step: int, progress: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch of one step, a pure function of its arguments: clips [B 3 F H W] in -1..1 and is_heat [B]."""
    rng = np.random.default_rng([seed, step])
    num_frames = int(rng.choice([5, 9, 13], p=[0.85, 0.1, 0.05]))
    if progress < 0.75 and num_frames == 5 and rng.random() < CROP_SHARE:
        return clips.vae_batch(videos, 4, num_frames, rng, clips.SIZE_PX // 2)
    return clips.vae_batch(videos, 2, num_frames, rng, clips.SIZE_PX)


def _learning_rate(step: int, progress: float, peak: float) -> float:
    decay = max(0.0, (progress - DECAY_FROM) / (1 - DECAY_FROM))
    return peak * min(1.0, (step + 1) / WARMUP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, decay))))


def train(
    load: Callable[[], list[clips.Video]],
    folder: Path,
    steps: int,
    minutes: float,
    peak_learning_rate: float,
    seed: int,
    say: Callable[[str], None],
    start_from: Path | None = None,
) -> dict[str, Any]:
    """What was done (steps, minutes); writes `vae.pt` (resumed from when there), `vae.jsonl` and `history.json` in `folder`.

    `start_from` is a diffusers folder whose VAE gives the first weights; None: they are drawn.

    Ends after `steps` steps or `minutes` minutes of training, whichever is first; the schedule follows the nearer of both ends.
    """
    path = folder / "vae.pt"
    vae = new_vae(seed).train()
    if start_from is not None:
        vae.load_state_dict(AutoencoderKLWan.from_pretrained(start_from, subfolder="vae", torch_dtype=torch.float32).state_dict())
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last_3d)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=peak_learning_rate, betas=BETAS, weight_decay=0.01)
    average = {name: value.detach().clone() for name, value in vae.state_dict().items()}
    step, seconds = 0, 0.0
    if path.exists():
        stored = torch.load(path, weights_only=True)
        vae.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
        average, step, seconds = stored["average"], stored["step"], stored["seconds"]
        say(f"vae: continue at step {step}, {seconds / 60:.1f} min")
    _note_start(folder / "history.json", step, peak_learning_rate, start_from is not None)
    videos = [video for video in load() if not video.held_out]
    sums: dict[str, float] = {}
    last = time.monotonic()
    while (progress := max(step / steps, seconds / 60 / minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, progress, peak_learning_rate)
        phase = int(start_from is not None or progress >= HEAT_FIRST)
        losses = loss_of(vae, *draw(videos, step, progress, seed), torch.Generator().manual_seed(seed * 1_000_003 + step), phase)
        optimizer.zero_grad(set_to_none=True)
        losses["total"].backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        if torch.isfinite(norm):
            optimizer.step()
        else:
            say(f"vae: step {step}: gradient not finite, update left out")
        step += 1
        decay = min(EMA, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in vae.state_dict().items():
                average[name].lerp_(value, 1 - decay)
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach())
        now = time.monotonic()
        seconds, last = seconds + now - last, now
        if step % 25 == 0:
            line = {"step": step, "seconds": round(seconds), **{name: round(value / 25, 5) for name, value in sums.items()}}
            say(f"vae: {json.dumps(line)}")
            with (folder / "vae.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            sums = {}
        if step % 100 == 0:
            _save(path, vae, optimizer, average, step, seconds)
    _save(path, vae, optimizer, average, step, seconds)
    return {"steps": step, "minutes": round(seconds / 60, 1)}


def _note_start(path: Path, step: int, peak_learning_rate: float, continued: bool) -> None:
    """Nothing; what can change between two parts of one training is on record, so that the weights do not claim one setting for all."""
    history = read_json(path) if path.exists() else []
    start = {"from_step": step, "heatmap_sigma_px": clips.SIGMA_PX, "spots": list(clips.SPOTS), "learning_rate": peak_learning_rate}
    start["first_weights"] = "an earlier VAE" if continued else "drawn"
    write_json(path, [*history, start])


def _save(
    path: Path, vae: AutoencoderKLWan, optimizer: torch.optim.Optimizer, average: dict[str, torch.Tensor], step: int, seconds: float
) -> None:
    state = {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step, "seconds": seconds}
    with whole_file(path) as temporary:
        torch.save(state, temporary)


def trained(folder: Path, seed: int) -> tuple[AutoencoderKLWan, int]:
    """(the averaged VAE in eval mode, its step); the untrained one and 0 when there is no checkpoint."""
    vae, step = new_vae(seed), 0
    if (folder / "vae.pt").exists():
        stored = torch.load(folder / "vae.pt", weights_only=True)
        vae.load_state_dict(stored["average"])
        step = stored["step"]
    return vae.eval().requires_grad_(False), step


@torch.no_grad()
def latent_statistics(vae: AutoencoderKLWan, videos: list[clips.Video], seed: int, batches: int = 16) -> tuple[list[float], list[float]]:
    """(mean [48], std [48]) of posterior means over training clips, RGB and heatmaps in equal parts."""
    latents = []
    for number in range(batches):
        pictures, _ = clips.vae_batch(videos, 4, 9, np.random.default_rng([seed, 77, number]), clips.SIZE_PX)
        latents.append(posterior(vae, pictures).mean)
    flat = torch.cat(latents).transpose(0, 1).flatten(1)
    return flat.mean(1).tolist(), flat.std(1).tolist()
