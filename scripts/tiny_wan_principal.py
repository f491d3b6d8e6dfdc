"""Latents in closed form: principal components of what one latent covers, as a teacher for encoder and decoder apart.

The first frame of a clip and each four later ones have components of their own. Latents have unit size per channel. Knows no network.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange

from mvwan.files import whole_file
from mvwan.shapes import FRAMES_PER_LATENT, LATENT_CHANNELS, PIXELS_PER_LATENT


@dataclass(frozen=True, kw_only=True)
class Components:
    """Of cells [n v] of v values."""

    mean: torch.Tensor
    """[v]."""
    directions: torch.Tensor
    """[v C], divided by the size of the component."""

    def of(self, cells: torch.Tensor) -> torch.Tensor:
        """[... C] of cells [... v]."""
        return (cells - self.mean) @ self.directions


@dataclass(frozen=True, kw_only=True)
class Principal:
    """Encodes clips without a network."""

    first: Components
    later: Components

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """[B C f h w] of pictures [B 3 F H W] in -1..1."""
        latents = self.first.of(_cells(pictures[:, :, :1], 1))
        if pictures.shape[2] > 1:
            latents = torch.cat([latents, self.later.of(_cells(pictures[:, :, 1:], FRAMES_PER_LATENT))], 1)
        return rearrange(latents, "B f h w C -> B C f h w")


def principal(path: Path, draw: Callable[[], Iterable[torch.Tensor]]) -> Principal:
    """Of the clips [B 3 F H W] that `draw` gives; kept in `path`, and read from there the next time."""
    if not path.exists():
        clips = list(draw())
        first = _components(_cells(part[:, :, :1], 1) for part in clips)
        later = _components(_cells(part[:, :, 1:], FRAMES_PER_LATENT) for part in clips)
        with whole_file(path) as temporary:
            torch.save([first.mean, first.directions, later.mean, later.directions], temporary)
    stored = torch.load(path, weights_only=True)
    return Principal(first=Components(mean=stored[0], directions=stored[1]), later=Components(mean=stored[2], directions=stored[3]))


def _cells(pictures: torch.Tensor, time: int) -> torch.Tensor:
    """[B f h w v]: the values that one latent covers."""
    side = PIXELS_PER_LATENT
    return rearrange(pictures, "B c (f t) (h r) (w q) -> B f h w (t c r q)", t=time, r=side, q=side)


def _components(batches: Iterable[torch.Tensor]) -> Components:
    count, total, products = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        cells = batch.flatten(0, -2)
        count, total, products = count + len(cells), total + cells.sum(0), products + cells.T @ cells
    mean = total / count
    values, vectors = torch.linalg.eigh(products / count - mean[:, None] * mean)
    order = torch.arange(len(values))[-LATENT_CHANNELS:].flip(0)
    return Components(mean=mean, directions=vectors[:, order] / values[order].clamp_min(1e-8).sqrt())
