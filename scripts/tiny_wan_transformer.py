"""Trains the tiny text encoder and stock transformer together: text + first frame -> single-view RGB video. Resumable.

Flow matching with the package's own `flow`; latent frame 0 is clean, has timestep 0 and is out of the loss, as in Wan2.2-TI2V.
RGB only, as stock Wan: heatmaps are what users teach it.
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
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from tiny_wan_parts import SHIFT, TEXT_TOKENS, TRANSFORMER_SIZES, new_text_encoder, new_transformer
from tiny_wan_planes import PlaneVae
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from transformers import UMT5EncoderModel

from mvwan import flow
from mvwan.config import FlowConfig
from mvwan.files import whole_file
from mvwan.precision import has_fast_bfloat16

BATCH = 16
ENCODED_AT_ONCE = 4
WARMUP = 100
EMA = 0.995
EMPTY_PROMPT_SHARE = 0.1
_BYTE_OFFSET = 3
_END = 1


@torch.no_grad()
def encode_videos(
    vae: AutoencoderKLWan, videos: list[clips.Video], mean: list[float], std: list[float], say: Callable[[str], None]
) -> dict[str, Any]:
    """`latents` [2N C f h w] normalised, and `instructions`, of the N videos and then of the heatmap of each as a video.

    A heatmap in colours is a video like any other: a base that has seen some knows that spots stay sharp and go where arms go. Products
    in bfloat16 where that is fast: noise is added to them anyway.
    """
    latents: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    shift, scale = (torch.tensor(values)[:, None, None, None] for values in (mean, std))
    planes = PlaneVae(vae, torch.bfloat16 if has_fast_bfloat16() else torch.float32, flat=True)
    for start in range(0, len(videos), ENCODED_AT_ONCE):
        chosen = videos[start : start + ENCODED_AT_ONCE]
        pictures = np.stack([video.rgb for video in chosen])
        heat = np.stack([clips.heat_pictures(video.uv_px, video.visible) for video in chosen])
        both = (planes.encode(clips.to_clips(np.concatenate([pictures, heat])))[0] - shift) / scale
        for stream, part in zip(latents, both.split(len(chosen)), strict=True):
            stream.append(part)
        if start % (50 * ENCODED_AT_ONCE) == 0:
            say(f"transformer: encoded {start} of {len(videos)} videos")
    return {"latents": torch.cat([*latents[0], *latents[1]]), "instructions": 2 * [video.instruction for video in videos]}


def embed(text_encoder: UMT5EncoderModel, prompts: list[str]) -> torch.Tensor:
    """[B L D], zero after each prompt's own bytes and end mark."""
    ids = [torch.tensor([byte + _BYTE_OFFSET for byte in prompt.encode()] + [_END]) for prompt in prompts]
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    embedded = text_encoder(pad_sequence(ids, batch_first=True), mask).last_hidden_state.float() * mask[..., None]
    assert embedded.shape[1] <= TEXT_TOKENS, f"an instruction has {embedded.shape[1]} tokens"
    return torch.nn.functional.pad(embedded, (0, 0, 0, TEXT_TOKENS - embedded.shape[1]))


def velocity(transformer: WanTransformer3DModel, noisy: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """[B C f h w] for noisy latents of that shape and sigma [B f]: one timestep per token."""
    _, height, width = TRANSFORMER_SIZES["patch_size"]
    tokens = (noisy.shape[3] // height) * (noisy.shape[4] // width)
    timestep = flow.timestep(sigma).repeat_interleave(tokens, dim=1)
    return transformer(noisy, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0].float()


def loss_of(
    transformer: WanTransformer3DModel,
    clean: torch.Tensor,
    noise: torch.Tensor,
    sigma: torch.Tensor,
    text: torch.Tensor,
    per_sample: bool = False,
) -> torch.Tensor:
    """Mean squared velocity error over the frames that are not given, of all or [B] of each sample; `sigma` [B]."""
    per_frame = flow.sigma_per_frame(sigma, clean.shape[2], 1)
    noisy = flow.add_noise(clean[:, None], noise[:, None], per_frame)[:, 0]
    error = velocity(transformer, noisy, per_frame, text) - flow.velocity_target(clean, noise)
    squared = error[:, :, 1:].square()
    return squared.flatten(1).mean(dim=1) if per_sample else squared.mean()


def train(
    data: dict[str, Any], folder: Path, steps: int, minutes: float, peak_learning_rate: float, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """What was done (steps, minutes); writes `transformer.pt` (resumed from when there) and `transformer.jsonl` in `folder`."""
    path = folder / "transformer.pt"
    transformer, text_encoder = new_transformer(seed), new_text_encoder(seed)
    models = torch.nn.ModuleDict({"transformer": transformer, "text_encoder": text_encoder}).eval()
    optimizer = torch.optim.AdamW(models.parameters(), lr=peak_learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    average = {name: value.detach().clone() for name, value in models.state_dict().items()}
    step, seconds, total = 0, 0.0, 0.0
    if path.exists():
        stored = torch.load(path, weights_only=True)
        models.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
        average, step, seconds = stored["average"], stored["step"], stored["seconds"]
        say(f"transformer: continue at step {step}, {seconds / 60:.1f} min")
    last = time.monotonic()
    while (progress := max(step / steps, seconds / 60 / minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = peak_learning_rate * min(1.0, (step + 1) / WARMUP) * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))
        rng = np.random.default_rng([seed, 9, step])
        chosen = rng.integers(0, len(data["latents"]), BATCH)
        names = [f"{place}:{index}" for place, index in enumerate(chosen)]
        prompts = ["" if rng.random() < EMPTY_PROMPT_SHARE else data["instructions"][index] for index in chosen]
        clean = data["latents"][torch.from_numpy(chosen)]
        sigma = flow.draw_sigma(seed, step, names, FlowConfig(shift=SHIFT))
        noise = flow.draw_noise(seed, step, names, clean.shape[1:])
        # Of so few tokens, the plain formula is quicker backwards than the fused kernel for processors.
        with torch.autocast("cpu", torch.bfloat16, has_fast_bfloat16()), sdpa_kernel(SDPBackend.MATH):
            loss = loss_of(transformer, clean, noise, sigma, embed(text_encoder, prompts))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        assert torch.isfinite(norm), f"transformer: step {step}: gradient not finite"
        optimizer.step()
        step += 1
        decay = min(EMA, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in models.state_dict().items():
                average[name].lerp_(value, 1 - decay)
        total += float(loss.detach())
        now = time.monotonic()
        seconds, last = seconds + now - last, now
        if step % 25 == 0:
            line = {"step": step, "seconds": round(seconds), "loss": round(total / 25, 4)}
            say(f"transformer: {json.dumps(line)}")
            with (folder / "transformer.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            total = 0.0
        if step % 200 == 0:
            _save(path, models, optimizer, average, step, seconds)
    _save(path, models, optimizer, average, step, seconds)
    return {"steps": step, "minutes": round(seconds / 60, 1)}


def _save(
    path: Path, models: torch.nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, torch.Tensor], step: int, seconds: float
) -> None:
    state = {"model": models.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step, "seconds": seconds}
    with whole_file(path) as temporary:
        torch.save(state, temporary)


def trained(folder: Path, seed: int) -> tuple[UMT5EncoderModel, WanTransformer3DModel, int]:
    """(text encoder, transformer, step) of the averaged weights; untrained ones and 0 when there is no checkpoint."""
    transformer, text_encoder = new_transformer(seed), new_text_encoder(seed)
    models = torch.nn.ModuleDict({"transformer": transformer, "text_encoder": text_encoder}).eval()
    step = 0
    if (folder / "transformer.pt").exists():
        stored = torch.load(folder / "transformer.pt", weights_only=True)
        models.load_state_dict(stored["average"])
        step = stored["step"]
    models.requires_grad_(False)
    return text_encoder, transformer, step
