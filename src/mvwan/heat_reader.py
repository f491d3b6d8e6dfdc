"""Heat read from latents without the VAE: one linear layer, fitted once by least squares to the heatmaps that a run learns from.

Where a network is unsure it answers with a mean of latents. What the VAE makes of a mean is no mean of pictures, and often no spot at
all; a linear layer reads from it the mean of the spots, whose peak is worth having. It also reads wider than it sees: two latents whose
spots lie 4 px apart have little in common, what is read from them a lot, so that a loss on it tells the network which way to go.

    latents [3C h w]: of the four frames before, of these four, of the next  ──3x3 convolution──>  these four, [2h 2w] cells of 8 px
                                                                                                each, a spot of height 1 at the point

The first of four frames is told by what came before it as much as by its own latent, the last by what comes next: on true latents
neighbours halve the error. The last latent, which has no next one, is read by a layer of its own.
Nothing here trains with the network, and no VAE is asked. Knows no data set, no network and no file.
"""

from collections.abc import Iterable, Mapping, Sequence
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
    """The layers. `weight` [4 * 4, 3C, 3, 3] and `bias` [4 * 4]; the outputs are frame, row and column of a cell, in this order.

    The inputs are the latent before, the latent and the next one. `weight_last` [4 * 4, 2C, 3, 3] and `bias_last` read the last latent,
    from the one before and itself. Without these two `weight` is [4 * 4, C, 3, 3] and reads each latent alone, as runs of before do.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    weight_last: torch.Tensor
    bias_last: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor,
        weight_last: torch.Tensor | None = None,
        bias_last: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self._reads_neighbours = weight_last is not None and bias_last is not None
        given = {"weight": weight, "bias": bias, "weight_last": weight_last, "bias_last": bias_last}
        tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
        side, outputs = 2 * _REACH + 1, FRAMES_PER_LATENT * _CELLS**2
        latents = 3 if self._reads_neighbours else 1
        channels = weight.shape[1] // latents if weight.ndim == 4 else 0
        needed = {"weight": (outputs, channels * latents, side, side), "bias": (outputs,)}
        if self._reads_neighbours:
            needed |= {"weight_last": (outputs, 2 * channels, side, side), "bias_last": (outputs,)}
        if not channels or {name: tuple(tensor.shape) for name, tensor in tensors.items()} != needed:
            found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
            raise MvwanError(
                f"heat reader: its tensors are {found}; needs weight ({outputs}, 3C, {side}, {side}), bias ({outputs},), weight_last "
                f"({outputs}, 2C, {side}, {side}) and bias_last ({outputs},). Use another checkpoint."
            )
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.float(), persistent=False)

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """What makes it anew."""
        return dict(self.named_buffers())

    def squared_error(self, difference: torch.Tensor) -> torch.Tensor:
        """[B] float32: squared error of the heat that is read from latents which are `difference` [B V C f h w] off, summed over cells.

        The given latents, which are not off, must not be in it. Times C / 16, so that divided by the number of latent elements it is the
        mean over cells.
        """
        before = torch.zeros_like(difference[:, :, :, :1])
        change = self._change(torch.cat([before, difference], dim=3).flatten(0, 1))
        return change.square().sum(dim=(1, 2, 3, 4)).unflatten(0, (len(difference), -1)).sum(dim=1) * (difference.shape[2] / len(self.bias))

    def _change(self, latents: torch.Tensor) -> torch.Tensor:
        """[N f-1 16 h w]: by how much latents [N C f h w] change the heat of all but the first."""
        if not self._reads_neighbours:
            return _convolved(latents[:, :, 1:], self.weight)
        last = _convolved(_with_neighbours(latents, has_next=False), self.weight_last)
        if latents.shape[2] == 2:
            return last
        return torch.cat([_convolved(_with_neighbours(latents, has_next=True), self.weight), last], dim=1)

    def read(self, latents: torch.Tensor) -> torch.Tensor:
        """[N 4*(f-1) 2h 2w] float32 cells of latents [N C f h w]; the first, one picture alone, is not read but tells of the next."""
        biases = self.bias.expand(latents.shape[2] - 1, -1)
        if self._reads_neighbours:
            biases = torch.cat([biases[:-1], self.bias_last[None]])
        return _as_cells(self._change(latents) + biases[:, :, None, None])

    @torch.no_grad()
    def pictures(self, latents: torch.Tensor) -> np.ndarray:
        """[N 4*(f-1) H W] float32 in 0..1: the cells of `read` brought to the size of the pictures."""
        cells = self.read(latents.detach().to(self.weight.device))
        return functional.interpolate(cells, scale_factor=_CELL_PX, mode="bicubic").clamp(0, 1).cpu().numpy()


def fit_heat_reader(batches: Iterable[Clips], sigma_px: float) -> tuple[HeatReader, ReadingQuality]:
    """The layers, and how well they read every eighth clip, which is kept out. `sigma_px` is that of the heatmaps.

    They are fitted to latents whose four pictures all show the point. Raises `MvwanError` when none of the clips kept, or of the others,
    has one.
    """
    sigma_px = max(sigma_px, _NARROWEST_CELLS * _CELL_PX)
    inner, last, kept_out = _LeastSquares(), _LeastSquares(), list[tuple[torch.Tensor, np.ndarray, np.ndarray]]()
    for place, clips in enumerate(batches):
        shown: np.ndarray = np.all(clips.visible[:, 1:].reshape(len(clips.visible), -1, FRAMES_PER_LATENT), axis=2)
        for number in np.flatnonzero(shown.any(axis=1)):
            latents, uv_px, usable = clips.latents[number : number + 1], clips.uv_px[number], shown[number]
            if (place + number) % _CHECKED_EVERY == 0:  # where a batch is a window, of each of its views in turn
                kept_out.append((latents, uv_px, usable))
                continue
            wanted = _outputs(np.nan_to_num(uv_px[1:]).reshape(-1, FRAMES_PER_LATENT, 2), latents.shape[-2:], sigma_px)
            for layer, has_next, frames in ((inner, True, slice(0, -1)), (last, False, slice(-1, None))):
                chosen = torch.from_numpy(usable[frames])
                if chosen.any():
                    layer.add(_patches(_with_neighbours(latents, has_next=has_next)[0].movedim(1, 0)[chosen]), wanted[frames][chosen])
    if not (inner.rows or last.rows) or not kept_out:
        raise MvwanError(
            "heat reader: there are not enough clips whose point is in the picture. Record more demonstrations, or set "
            "train.heat_reader_weight=0."
        )
    reader = _as_reader(inner, last)
    return reader, _quality(reader, kept_out, sigma_px)


class _LeastSquares:
    """A linear layer, fitted to rows that come piece by piece."""

    def __init__(self) -> None:
        self.rows = 0
        self._gram: torch.Tensor = torch.zeros(())
        self._product: torch.Tensor = torch.zeros(())

    def add(self, seen: torch.Tensor, wanted: torch.Tensor) -> None:
        """More rows: what is seen [n inputs + 1] float64, a 1 at the end, and what shall be said [... 16] of it."""
        self._gram, self._product = self._gram + seen.T @ seen, self._product + seen.T @ wanted.reshape(len(seen), -1)
        self.rows += len(seen)

    def solved(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight [16 inputs/9 3 3], bias [16])."""
        ridge = _RIDGE * self._gram.diagonal().mean() * torch.eye(len(self._gram), dtype=self._gram.dtype)
        solved = torch.linalg.solve(self._gram + ridge, self._product)
        side = 2 * _REACH + 1
        return solved[:-1].T.reshape(solved.shape[1], -1, side, side).contiguous(), solved[-1]


def _as_reader(inner: _LeastSquares, last: _LeastSquares) -> HeatReader:
    """Of the two layers. Where one had nothing to learn from it is the other one, blind for the next latent."""
    if not inner.rows:
        weight, bias = last.solved()
        return HeatReader(torch.cat([weight, torch.zeros_like(weight[:, : weight.shape[1] // 2])], dim=1), bias, weight, bias)
    weight, bias = inner.solved()
    return HeatReader(weight, bias, *(last.solved() if last.rows else (weight[:, : weight.shape[1] // 3 * 2], bias)))


def _with_neighbours(latents: torch.Tensor, *, has_next: bool) -> torch.Tensor:
    """Latents [N C f h w] beside those before and, with `has_next`, after them: [N 3C f-2 h w] without the first and the last; else
    [N 2C 1 h w] of the last alone."""
    if has_next:
        return torch.cat([latents[:, :, :-2], latents[:, :, 1:-1], latents[:, :, 2:]], dim=1)
    return torch.cat([latents[:, :, -2:-1], latents[:, :, -1:]], dim=1)


def _convolved(latents: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[N f 16 h w] of latents [N C f h w], each by itself."""
    with torch.autocast(latents.device.type, enabled=False):
        frames = functional.pad(latents.movedim(2, 1).flatten(0, 1).float(), (_REACH,) * 4, mode="replicate")
        return functional.conv2d(frames, weight.float()).unflatten(0, (len(latents), -1))


def _patches(latents: torch.Tensor) -> torch.Tensor:
    """[n*h*w, C*9 + 1] float64: what the convolution sees at each latent of latents [n C h w], and a 1."""
    seen = functional.unfold(functional.pad(latents.float(), (_REACH,) * 4, mode="replicate"), 2 * _REACH + 1)
    rows = seen.movedim(1, 2).flatten(0, 1).double()
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


def _outputs(uv_px: np.ndarray, size: torch.Size, sigma_px: float) -> torch.Tensor:
    """[n h*w 16] float64: what should be read there, with the points at uv_px [n 4 2]."""
    height, width = size
    cells = _spots(uv_px, height * _CELLS, width * _CELLS, sigma_px)
    split = cells.reshape(len(cells), FRAMES_PER_LATENT, height, _CELLS, width, _CELLS)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(len(cells), height * width, FRAMES_PER_LATENT * _CELLS**2)


def _spots(uv_px: np.ndarray, rows: int, columns: int, sigma_px: float) -> torch.Tensor:
    """[... rows columns] float64: heatmaps of points uv_px [... 2] whose pixels are cells."""
    heat = render(uv_px / _CELL_PX, np.ones(uv_px.shape[:-1], bool), rows, columns, sigma_px / _CELL_PX)
    return torch.from_numpy(heat).double()


def _quality(reader: HeatReader, kept_out: Sequence[tuple[torch.Tensor, np.ndarray, np.ndarray]], sigma_px: float) -> ReadingQuality:
    """`kept_out` has latents [1 C f h w], uv_px [F 2] and usable [f-1] of each clip."""
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    errors_px: list[np.ndarray] = []
    for latents, uv_px, usable in kept_out:
        frames, true_px = np.repeat(usable, FRAMES_PER_LATENT), uv_px[1:][np.repeat(usable, FRAMES_PER_LATENT)]
        found = reader.read(latents)[0][torch.from_numpy(frames)]
        pairs.append((found, _spots(true_px, found.shape[-2], found.shape[-1], sigma_px)))
        errors_px.append(np.linalg.norm(peak(reader.pictures(latents)[0][frames])[0] - true_px, axis=-1))
    found, wanted = (torch.cat(one) for one in zip(*pairs, strict=True))
    left = float((found - wanted).square().mean() / (wanted - wanted.mean()).square().mean())
    return ReadingQuality(clips=len(kept_out), explained=1 - left, error_px=float(np.median(np.concatenate(errors_px))))


def _as_cells(outputs: torch.Tensor) -> torch.Tensor:
    """[N 4*f 2h 2w] of the convolution's outputs [N f 16 h w]."""
    cells = functional.pixel_shuffle(outputs.flatten(0, 1), _CELLS)
    return cells.reshape(len(outputs), -1, *cells.shape[-2:])
