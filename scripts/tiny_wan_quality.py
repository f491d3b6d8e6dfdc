"""Measures the exported tiny Wan on held-out layouts, through the package's own doors, as anybody would use it. Knows no training."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import tiny_wan_clips as clips
import torch
from diffusers import WanTransformer3DModel
from tiny_wan_parts import SHIFT, TEXT_TOKENS
from tiny_wan_transformer import loss_of, velocity

from mvwan import flow, heatmaps
from mvwan.model.latents import LatentCodec
from mvwan.model.wan import load_transformer

FAR_PX = 10.0
SIGMAS_PX = (2.5, 4.0)
"""Heatmap sizes whose survival is measured: peaks of the smaller ones are lost sooner."""
DENOISE_STEPS = 5


def psnr_db(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 pictures, over all values together."""
    error = np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


_KINDS = (("rig", True), ("random", False))


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Held-out videos, evenly spread."""

    pictures: np.ndarray
    """[N F H W 3] uint8."""
    uv_px: np.ndarray
    """[N F 2]."""
    seen: np.ndarray
    """[N F] bool: the point is visible."""
    instructions: list[str]


def kinds(videos: list[clips.Video], num_videos: int) -> dict[str, Chosen]:
    """`num_videos` of each kind, or all when there are fewer: of the standard rig, where robots are filmed from, and of random cameras."""
    return {name: _choose([video for video in videos if video.of_rig == of_rig], num_videos) for name, of_rig in _KINDS}


def _choose(videos: list[clips.Video], num_videos: int) -> Chosen:
    chosen = [videos[index] for index in np.linspace(0, len(videos) - 1, min(num_videos, len(videos))).astype(int)]
    return Chosen(
        pictures=np.stack([video.rgb for video in chosen]),
        uv_px=np.stack([video.uv_px for video in chosen]),
        seen=np.stack([video.visible for video in chosen]),
        instructions=[video.instruction for video in chosen],
    )


def measure(folder: str, videos: list[clips.Video], num_videos: int, seed: int) -> dict[str, Any]:
    """Numbers with units in their names, per kind of camera, over evenly spread held-out videos. The VAE runs in float32."""
    codec = LatentCodec.load(folder, TEXT_TOKENS)
    measured = {}
    for name, chosen in kinds(videos, num_videos).items():
        clean, of_vae = measure_vae(codec, chosen)
        transformer, text = load_transformer(folder, torch.float32), codec.encode_text(chosen.instructions)
        measured[name] = {**of_vae, **measure_transformer(transformer, codec, clean, text, chosen.pictures, seed)}
    return measured


def measure_vae(codec: LatentCodec, chosen: Chosen) -> tuple[torch.Tensor, dict[str, Any]]:
    """(normalised RGB latents, numbers about encoding and decoding), for which the codec needs no text encoder."""
    clean = torch.cat([codec.encode_video(chosen.pictures[start : start + 4]) for start in range(0, len(chosen.pictures), 4)])
    decoded = np.concatenate([codec.decode_video(part) for part in clean.split(4)])
    return clean, {
        "held_out_videos": len(clean),
        "rgb_psnr_db": round(psnr_db(decoded, chosen.pictures), 2),
        "heatmap_peak_shift": [_peak_shift(codec, chosen.uv_px, chosen.seen, sigma_px) for sigma_px in SIGMAS_PX],
        "rgb_latents_mean": round(float(clean.mean()), 3),
        "rgb_latents_std": round(float(clean.std()), 3),
        "rgb_latents_largest": round(float(clean.abs().max()), 2),
    }


def _peak_shift(codec: LatentCodec, uv_px: np.ndarray, seen: np.ndarray, sigma_px: float) -> dict[str, float]:
    """How far the VAE moves the peaks of heatmaps at uv_px [N F 2], in px, over the frames `seen` [N F] that show one.

    A frame without a peak after decoding counts as lost; mean, median and p95 are over the frames that have one,
    and are left out when none has.
    """
    shift_px, confidence = [], []
    for start in range(0, len(uv_px), 4):
        uv, shown = uv_px[start : start + 4], seen[start : start + 4]
        video = heatmaps.colour(heatmaps.render(uv, shown, clips.SIZE_PX, clips.SIZE_PX, sigma_px))
        found, sure = heatmaps.peak(heatmaps.uncolour(codec.decode_video(codec.encode_video(video))))
        shift_px.append(np.where(sure > 0, np.linalg.norm(found - uv, axis=-1), np.inf)[shown])
        confidence.append(sure[shown])
    shift = np.concatenate(shift_px)
    kept = shift[np.isfinite(shift)]
    frames = {"heatmap_sigma_px": sigma_px, "frames": len(shift)}
    if not len(kept):
        return {**frames, "share_without_peak": 1.0}
    return {
        **frames,
        "mean_px": round(float(kept.mean()), 3),
        "median_px": round(float(np.median(kept)), 3),
        "p95_px": round(float(np.quantile(kept, 0.95)), 3),
        "share_without_peak": round(float(np.isinf(shift).mean()), 4),
        f"share_over_{FAR_PX:.0f}_px": round(float((kept > FAR_PX).mean()), 4),
        "mean_confidence": round(float(np.concatenate(confidence).mean()), 3),
    }


@torch.no_grad()
def measure_transformer(
    transformer: WanTransformer3DModel, codec: LatentCodec, clean: torch.Tensor, text: torch.Tensor, pictures: np.ndarray, seed: int
) -> dict[str, Any]:
    """Velocity losses and predictions on videos of latents clean [N C f h w], prompts [N L D] and pictures [N F H W 3]."""
    names = [str(index) for index in range(len(clean))]
    noise = flow.draw_noise(seed, 0, names, clean.shape[1:])
    losses = {
        name: round(float(loss_of(transformer, clean, noise, torch.full((len(clean),), (low + high) / 2), text)), 4)
        for low, high, name in flow.sigma_bands()
    }
    given = clean[:, :, :1]
    latents = torch.cat([given, noise[:, :, 1:]], 2)
    sigmas = flow.euler_sigmas(DENOISE_STEPS, SHIFT)
    for sigma, following in pairwise(sigmas):
        per_frame = flow.sigma_per_frame(sigma.expand(len(clean)), clean.shape[2], 1)
        latents = flow.euler_step(latents, velocity(transformer, latents, per_frame, text), sigma, following)
        latents = torch.cat([given, latents[:, :, 1:]], 2)
    predicted = np.concatenate([codec.decode_video(part) for part in latents.split(4)])
    held = np.repeat(pictures[:, :1], pictures.shape[1] - 1, axis=1)
    return {
        "held_out_velocity_loss_by_sigma": losses,
        f"predicted_rgb_psnr_db_{DENOISE_STEPS}_steps": round(psnr_db(predicted[:, 1:], pictures[:, 1:]), 2),
        "hold_first_rgb_psnr_db": round(psnr_db(held, pictures[:, 1:]), 2),
    }
