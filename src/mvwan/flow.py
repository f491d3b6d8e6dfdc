"""Flow matching: sigma, noising, the velocity target, the masked loss as (sum, count), Euler steps. The one place for the time convention.

    sigma   0 ──────────────────────────────────────── 1
            data                                   noise
            clean      (1 - sigma) * clean + sigma * noise      noise
            velocity = d noisy / d sigma = noise - clean                    prediction walks from sigma 1 to 0

The network is told timestep = 1000 * sigma. The first `condition_frames` latent frames are given: sigma 0, so clean by arithmetic,
and in neither sum nor count of the loss. Sigma and noise are pure functions of (seed, step, sample id): neither the batch around
a sample, nor the process, nor what was drawn before changes them. Knows no network, no data set and no optimizer.
Source: Lipman et al., arXiv 2210.02747, eq. 20-23 (with time reversed); shift: Esser et al., arXiv 2403.03206, eq. 23.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from mvwan.config import FlowConfig

TIMESTEPS = 1000


def warp(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """Sigma moved towards noise for shift > 1, same shape: shift * sigma / (1 + (shift - 1) * sigma). Keeps 0 and 1, keeps order."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def timestep(sigma: torch.Tensor) -> torch.Tensor:
    """What Wan is told for `sigma`: 1000 * sigma, same shape, float32. bf16 would keep 294 of 1000 distinct values."""
    return sigma.to(torch.float32) * TIMESTEPS


def draw_sigma(seed: int, step: int, sample_ids: Sequence[str], flow: FlowConfig) -> torch.Tensor:
    """[B] float32 in 0..1: uniform between `flow.sigma_min` and `flow.sigma_max`, then warped by `flow.shift`."""
    draws = [torch.rand((), generator=_generator("sigma", seed, step, name), dtype=torch.float64) for name in sample_ids]
    uniform = flow.sigma_min + (flow.sigma_max - flow.sigma_min) * torch.stack(draws)
    return warp(uniform, flow.shift).to(torch.float32)


def draw_noise(seed: int, step: int, sample_ids: Sequence[str], shape: Sequence[int]) -> torch.Tensor:
    """[B *shape] float32 of unit variance; `shape` is that of one sample, for example V 2C f h w."""
    return torch.stack([torch.randn(tuple(shape), generator=_generator("noise", seed, step, name)) for name in sample_ids])


def _generator(purpose: str, seed: int, step: int, sample_id: str) -> torch.Generator:
    key = f"{purpose}\n{seed}\n{step}\n{sample_id}".encode()
    return torch.Generator("cpu").manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1)


def sigma_per_frame(sigma: torch.Tensor, num_latent_frames: int, condition_frames: int) -> torch.Tensor:
    """[B f] of [B]: 0 on the first `condition_frames` latent frames, the sample's sigma on the others."""
    predicted = torch.arange(num_latent_frames, device=sigma.device) >= condition_frames
    return sigma[:, None] * predicted.to(sigma.dtype)


def add_noise(clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """A new [B V C f h w] tensor, (1 - sigma) * clean + sigma * noise with `sigma` [B f]; equals `clean` to the bit where sigma is 0."""
    sigma = sigma[:, None, None, :, None, None].to(clean.dtype)
    return (1 - sigma) * clean + sigma * noise


def velocity_target(clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """noise - clean: what the network learns to say, same shape."""
    return noise - clean


@dataclass(frozen=True)
class StreamSums:
    """Squared error of both streams and cross entropy of the action head, per sample, not yet divided. Add up, then divide once."""

    rgb_sum: torch.Tensor
    """[B] float32."""
    rgb_count: torch.Tensor
    """[B] int64, latent elements in `rgb_sum`."""
    heat_sum: torch.Tensor
    """[B] float32."""
    heat_count: torch.Tensor
    """[B] int64, latent elements in `heat_sum`."""
    gripper_sum: torch.Tensor
    """[B] float32, 0 without an action head."""
    gripper_count: torch.Tensor
    """[B] int64, frames in `gripper_sum`."""
    rotation_sum: torch.Tensor
    """[B] float32, 0 without an action head for it."""
    rotation_count: torch.Tensor
    """[B] int64, frames in `rotation_sum`."""

    @property
    def sums(self) -> torch.Tensor:
        """[4 B]: rgb, heat, gripper, rotation."""
        return torch.stack([self.rgb_sum, self.heat_sum, self.gripper_sum, self.rotation_sum])

    @property
    def counts(self) -> torch.Tensor:
        """[4 B], in the order of `sums`."""
        return torch.stack([self.rgb_count, self.heat_count, self.gripper_count, self.rotation_count])


def stream_counts(latents_shape: Sequence[int], heat_valid: torch.Tensor, condition_frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rgb, heat) counts of elements in the loss, each [B] int64, known before any forward pass. `latents_shape` is B V 2C f h w."""
    _, views, channels, frames, height, width = latents_shape
    per_frame = channels // 2 * height * width
    rgb = torch.full((len(heat_valid),), views * (frames - condition_frames) * per_frame, device=heat_valid.device)
    heat = heat_valid[:, :, condition_frames:].sum(dim=(1, 2)) * per_frame
    return rgb, heat


def stream_losses(
    velocity: torch.Tensor,
    target: torch.Tensor,
    heat_valid: torch.Tensor,
    condition_frames: int,
    also_of_heat: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> StreamSums:
    """Squared errors summed over what counts. `velocity`, `target` [B V 2C f h w], RGB channels first; `heat_valid` [B V f] bool.

    Given frames are in no sum, heat frames that are not valid in no heat sum. Computed in float32. Of actions it counts nothing.
    `also_of_heat` makes of the heat error [B V C f h w], 0 where it does not count, what is added to `heat_sum` [B].
    """
    rgb, heat = (velocity[:, :, :, condition_frames:].float() - target[:, :, :, condition_frames:].float()).chunk(2, dim=2)
    kept = heat_valid[:, :, None, condition_frames:, None, None]
    rgb_count, heat_count = stream_counts(velocity.shape, heat_valid, condition_frames)
    every = (1, 2, 3, 4, 5)
    heat = torch.where(kept, heat, torch.zeros_like(heat))
    heat_sum = heat.square().sum(dim=every)
    if also_of_heat is not None:
        heat_sum = heat_sum + also_of_heat(heat)
    none = rgb.new_zeros(len(rgb)), torch.zeros_like(rgb_count)
    return StreamSums(rgb.square().sum(dim=every), rgb_count, heat_sum, heat_count, *none, *none)


def total_loss(
    sums: StreamSums,
    rgb_count: torch.Tensor | int,
    heat_count: torch.Tensor | int,
    rgb_weight: float,
    gripper_count: torch.Tensor | int = 0,
    rotation_count: torch.Tensor | int = 0,
    action_weight: float = 0.0,
) -> torch.Tensor:
    """w * rgb + (1 - w) * heat + action_weight * (gripper + rotation), a scalar: this batch's share of the means over the whole step.

    The counts are those of the step. Shares of all micro-batches and processes add up to its loss, however it was cut. What has nothing
    in it adds 0.
    """
    rgb = sums.rgb_sum.sum() / max(int(rgb_count), 1)
    heat = sums.heat_sum.sum() / max(int(heat_count), 1)
    gripper = sums.gripper_sum.sum() / max(int(gripper_count), 1)
    rotation = sums.rotation_sum.sum() / max(int(rotation_count), 1)
    return rgb_weight * rgb + (1 - rgb_weight) * heat + action_weight * (gripper + rotation)


def euler_sigmas(denoise_steps: int, shift: float, sigma_min: float = 0.0) -> torch.Tensor:
    """[denoise_steps + 1] float32 from 1 down to 0: evenly spaced from 1 to `sigma_min` before the warp, the last step goes on to 0.

    A network trained at `sigma_min` and above is not asked about less noise than it has learned from.
    """
    spaced = torch.linspace(1, sigma_min, denoise_steps + 1, dtype=torch.float64)
    spaced[-1] = 0
    return warp(spaced, shift).to(torch.float32)


def euler_step(
    latents: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor | float, next_sigma: torch.Tensor | float
) -> torch.Tensor:
    """The latents at `next_sigma` when the velocity at `sigma` held all the way, same shape. Exact for a straight path."""
    return latents + (next_sigma - sigma) * velocity


def sigma_bands(flow: FlowConfig | None = None) -> tuple[tuple[float, float, str], ...]:
    """(low, high, name) of the bands in which held-out losses are reported, each measured at its middle.

    With `flow` the bands end where training does: a loss at noise that a run never sees says nothing of what it learned, and would
    choose the wrong checkpoint as the best.
    """
    lowest, highest = 0.0, 1.0
    if flow is not None:
        lowest, highest = (float(warp(torch.tensor(edge, dtype=torch.float64), flow.shift)) for edge in (flow.sigma_min, flow.sigma_max))
    cut = [(max(low, lowest), min(high, highest)) for low, high in pairwise((0.0, 0.25, 0.5, 0.75, 1.0))]
    return tuple((low, high, f"{low:.2f}-{high:.2f}") for low, high in cut if low < high)
