"""Heat read from latents without the VAE: one linear layer, fitted once by least squares to the heatmaps that a run learns from.

Where a network is unsure it answers with a mean of latents. What the VAE makes of a mean is no mean of pictures, and often no spot at
all; a linear layer reads from it the mean of the spots, whose peak is worth having. It also reads wider than it sees: two latents whose
spots lie 4 px apart have little in common, what is read from them a lot, so that a loss on it tells the network which way to go.

    latents [C h w] of four frames  ──3x3 convolution──>  4 frames of [2h 2w] cells, 8 px each: a spot of height 1 at the point

Nothing here trains with the network, and no VAE is asked. Knows no data set, no network and no file.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from mvwan.errors import MvwanError
from mvwan.heatmaps import peak, render
from mvwan.shapes import FRAMES_PER_LATENT, PIXELS_PER_LATENT

_CELLS = 2
"""Cells along each side of a latent."""
_CELL_PX = PIXELS_PER_LATENT // _CELLS
_REACH = 1
"""Latents on each side that the convolution sees."""
_NARROWEST_CELLS = 0.75
"""Spots are read at least so wide (standard deviation), or cells would miss them."""
_RIDGE = 1e-3
"""Added to the mean square of the latents: few clips then give a dull layer instead of a wild one."""
_CHECKED_EVERY = 8
"""One clip in so many is not fitted to but read, to say how good the layer is."""
_ENOUGH = 0.8
"""Of the variance; less is called poor."""


@dataclass(frozen=True, kw_only=True)
class Clips:
    """Heatmap videos of any number of views and windows, encoded."""

    latents: torch.Tensor
    """[N C f h w] float32, normalised."""
    uv_px: np.ndarray
    """[N F 2], where the point is in each picture."""
    visible: np.ndarray
    """[N F] bool."""


@dataclass(frozen=True, kw_only=True)
class ReadingQuality:
    """How well clips are read that the layer was not fitted to."""

    clips: int
    explained: float
    """Share of the variance of their heat, 1 at best."""
    error_px: float
    """Median distance of the peaks that are read to where the point is."""

    def __str__(self) -> str:
        off = f"peaks {self.error_px:.2f} px off"
        measured = f"heat reader: explains {self.explained:.1%} of the heat of {self.clips} clips kept out of the fit, {off}"
        return measured if self.explained >= _ENOUGH else f"{measured}. That is poor; train.heat_reader_weight=0 leaves heat to the VAE"


class HeatReader(nn.Module):
    """The layer. `weight` [4 * 4, C, 3, 3] and `bias` [4 * 4]; the outputs are frame, row and column of a cell, in this order."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        side = 2 * _REACH + 1
        outputs = FRAMES_PER_LATENT * _CELLS**2
        if weight.ndim != 4 or weight.shape[0] != outputs or weight.shape[2:] != (side, side) or bias.shape != (outputs,):
            raise MvwanError(
                f"heat reader: its tensors are {tuple(weight.shape)} and {tuple(bias.shape)}; needs ({outputs}, C, {side}, {side}) and "
                f"({outputs},). Use another checkpoint."
            )
        self.register_buffer("weight", weight.float(), persistent=False)
        self.register_buffer("bias", bias.float(), persistent=False)

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """What makes it anew."""
        return {"weight": self.weight, "bias": self.bias}

    def squared_error(self, difference: torch.Tensor) -> torch.Tensor:
        """[B] float32: squared error of the heat that is read from latents which are `difference` [B V C f h w] off, summed over cells.

        Times C / 16, so that divided by the number of latent elements it is the mean over cells.
        """
        change = self._change(_frame_by_frame(difference.flatten(0, 1)))
        return change.square().sum(dim=(1, 2, 3)).unflatten(0, (len(difference), -1)).sum(dim=1) * (difference.shape[2] / len(self.bias))

    def _change(self, latents: torch.Tensor) -> torch.Tensor:
        """[N 16 h w]: by how much latents [N C h w] change the heat."""
        with torch.autocast(latents.device.type, enabled=False):
            return functional.conv2d(functional.pad(latents.float(), (_REACH,) * 4, mode="replicate"), self.weight.float())

    def read(self, latents: torch.Tensor) -> torch.Tensor:
        """[N 4*f 2h 2w] float32 cells of latents [N C f h w], in which the first frame, which is one picture alone, must not be."""
        return _as_cells(self._change(_frame_by_frame(latents)) + self.bias[:, None, None], len(latents))

    @torch.no_grad()
    def pictures(self, latents: torch.Tensor) -> np.ndarray:
        """[N 4*f H W] float32 in 0..1: the cells of `read` brought to the size of the pictures."""
        cells = self.read(latents.detach().to(self.weight.device))
        return functional.interpolate(cells, scale_factor=_CELL_PX, mode="bicubic").clamp(0, 1).cpu().numpy()


def fit_heat_reader(batches: Iterable[Clips], sigma_px: float) -> tuple[HeatReader, ReadingQuality]:
    """The layer, and how well it reads every eighth clip, which is kept out. `sigma_px` is that of the heatmaps.

    It takes latent frames whose four pictures all show the point. Raises `MvwanError` when none of those kept, or of the others, does.
    """
    sigma_px = max(sigma_px, _NARROWEST_CELLS * _CELL_PX)
    gram: torch.Tensor = torch.zeros(())
    product: torch.Tensor = torch.zeros(())
    total, kept_out = 0, []
    for place, clips in enumerate(batches):
        for number in range(len(clips.latents)):
            latents, uv_px = _usable(clips, number)
            if not len(latents):
                continue
            if (place + number) % _CHECKED_EVERY == 0:  # where a batch is a window, of each of its views in turn
                kept_out.append((latents, uv_px))
                continue
            seen_by, wanted = _patches(latents), _outputs(uv_px, latents.shape[-2:], sigma_px)
            gram, product, total = gram + seen_by.T @ seen_by, product + seen_by.T @ wanted, total + len(seen_by)
    if not total or not kept_out:
        raise MvwanError(
            "heat reader: there are not enough clips whose point is in the picture. Record more demonstrations, or set "
            "train.heat_reader_weight=0."
        )
    ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solved = torch.linalg.solve(gram + ridge, product)
    side = 2 * _REACH + 1
    weight = solved[:-1].T.reshape(solved.shape[1], -1, side, side)
    reader = HeatReader(weight.contiguous(), solved[-1])
    return reader, _quality(reader, kept_out, sigma_px)


def _usable(clips: Clips, number: int) -> tuple[torch.Tensor, np.ndarray]:
    """([n C h w] of one clip's later latent frames that show the point throughout, their uv_px [n 4 2])."""
    later = clips.latents[number, :, 1:].movedim(0, 1)
    shown = clips.visible[number, 1:].reshape(-1, FRAMES_PER_LATENT).all(axis=1)
    return later[torch.from_numpy(shown)], clips.uv_px[number, 1:].reshape(-1, FRAMES_PER_LATENT, 2)[shown]


def _patches(latents: torch.Tensor) -> torch.Tensor:
    """[n*h*w, C*9 + 1] float64: what the convolution sees at each latent of latents [n C h w], and a 1."""
    seen = functional.unfold(functional.pad(latents.float(), (_REACH,) * 4, mode="replicate"), 2 * _REACH + 1)
    rows = seen.movedim(1, 2).flatten(0, 1).double()
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


def _outputs(uv_px: np.ndarray, size: torch.Size, sigma_px: float) -> torch.Tensor:
    """[n*h*w, 16] float64: what should be read there, with the points at uv_px [n 4 2]."""
    height, width = size
    cells = _spots(uv_px, height * _CELLS, width * _CELLS, sigma_px)
    split = cells.reshape(len(cells), FRAMES_PER_LATENT, height, _CELLS, width, _CELLS)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(-1, FRAMES_PER_LATENT * _CELLS**2)


def _spots(uv_px: np.ndarray, rows: int, columns: int, sigma_px: float) -> torch.Tensor:
    """[... rows columns] float64: heatmaps of points uv_px [... 2] whose pixels are cells."""
    heat = render(uv_px / _CELL_PX, np.ones(uv_px.shape[:-1], bool), rows, columns, sigma_px / _CELL_PX)
    return torch.from_numpy(heat).double()


def _quality(reader: HeatReader, kept_out: list[tuple[torch.Tensor, np.ndarray]], sigma_px: float) -> ReadingQuality:
    latents = torch.cat([latents for latents, _ in kept_out])
    uv_px = np.concatenate([uv_px for _, uv_px in kept_out])
    found = reader.read(latents[:, :, None])
    wanted = _spots(uv_px, found.shape[-2], found.shape[-1], sigma_px)
    left = float((found - wanted).square().mean() / (wanted - wanted.mean()).square().mean())
    peaks = peak(reader.pictures(latents[:, :, None]))[0]
    error_px = float(np.median(np.linalg.norm(peaks - uv_px, axis=-1)))
    return ReadingQuality(clips=len(kept_out), explained=1 - left, error_px=error_px)


def _frame_by_frame(latents: torch.Tensor) -> torch.Tensor:
    """[N*f C h w] of [N C f h w]."""
    return latents.movedim(2, 1).flatten(0, 1)


def _as_cells(outputs: torch.Tensor, clips: int) -> torch.Tensor:
    """[N 4*f 2h 2w] of the convolution's outputs [N*f 16 h w]."""
    return functional.pixel_shuffle(outputs, _CELLS).reshape(clips, -1, *(side * _CELLS for side in outputs.shape[-2:]))
