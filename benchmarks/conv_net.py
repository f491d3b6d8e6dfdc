"""The net of `conv_baseline.py`: first pictures of all views to a heatmap per view and later frame, whose means meet in space.

Knows windows of demonstrations and how to fit them; no command, no file that it writes, and no robot.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import typer
from torch import nn
from torch.nn import functional

from mvwan.batch import Episode
from mvwan.cameras import Camera, triangulate
from mvwan.data.dataset import WindowDataset
from mvwan.data.transforms import resize
from mvwan.errors import MvwanError
from mvwan.heatmaps import render

SIZE_PX = 64
SIGMA_PX = 1.5
_PIXEL_WEIGHT = 0.1


class ConvNet(nn.Module):
    """An encoder and decoder over all views at once, the instruction added at the bottom."""

    def __init__(self, views: int, frames: int, instructions: int, widths: Sequence[int] = (16, 40, 80, 128)) -> None:
        super().__init__()
        self.views, self.frames = views, frames
        self.encode = nn.ModuleList(_block(before, after) for before, after in zip((4 * views, *widths), widths, strict=False))
        self.instruction = nn.Embedding(instructions, widths[-1])
        self.bottom = _block(widths[-1], widths[-1])
        self.decode = nn.ModuleList(_block(low + high, high) for low, high in zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.heat = nn.Conv2d(widths[0], views * frames, 1)
        self.gripper = nn.Linear(widths[-1], frames)

    def forward(self, pictures: torch.Tensor, heat: torch.Tensor, instruction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(logarithms of heatmaps [B V F H W], logits of open grippers [B F]) after pictures [B V 3 H W] in 0..1 and heat now [B V H W]."""
        x = torch.cat([pictures - 0.5, heat[:, :, None]], dim=2).flatten(1, 2)
        levels: list[torch.Tensor] = []
        for block in self.encode:
            x = block(functional.max_pool2d(x, 2) if levels else x)
            levels.append(x)
        x = x + self.instruction(instruction)[:, :, None, None]
        x = self.bottom(x + x.mean(dim=(2, 3), keepdim=True))
        gripper = self.gripper(x.mean(dim=(2, 3)))
        for block, level in zip(self.decode, levels[-2::-1], strict=True):
            x = block(torch.cat([functional.interpolate(x, scale_factor=2, mode="bilinear"), level], dim=1))
        logits = self.heat(x).unflatten(1, (self.views, self.frames))
        return logits.flatten(-2).log_softmax(dim=-1).unflatten(-1, logits.shape[-2:]), gripper


def _block(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers += [nn.Conv2d(channels, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
    return nn.Sequential(*layers)


def mean_px(log_heat: torch.Tensor) -> torch.Tensor:
    """[... 2] the means of heatmaps [... H W], px."""
    heat = log_heat.exp()
    rows, columns = (torch.arange(side) + 0.5 for side in heat.shape[-2:])
    return torch.stack([heat.sum(dim=-2) @ columns, heat.sum(dim=-1) @ rows], dim=-1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """N windows at `SIZE_PX`: the first pictures, and the paths of all frames."""

    pictures: torch.Tensor
    """[N V 3 H W] uint8."""
    uv_px: torch.Tensor
    """[N V F 2] float32; frame 0 is now."""
    visible: torch.Tensor
    """[N V F] bool."""
    gripper_open: torch.Tensor
    """[N F] float32, NaN where not recorded."""
    instruction: torch.Tensor
    """[N] int64, the place in the list of instructions."""
    point_m: np.ndarray
    """[N F 3] float64."""
    cameras: tuple[tuple[Camera, ...], ...]
    """N times V."""


def read_windows(dataset: WindowDataset, chosen: Sequence[int], instructions: Sequence[str]) -> Windows:
    """The windows `chosen`, each episode's pictures read once. Raises `MvwanError` for an instruction that is not among the known ones."""
    name, rgb, cameras = "", np.zeros(0), ()
    found: list[Windows] = []
    for index in chosen:
        episode, frames = dataset.windows[index].episode, list(dataset.windows[index].frames)
        if episode.name != name:
            name, (rgb, cameras) = episode.name, _small(episode, dataset.data.cameras)
        gripper_open, place = dataset.actions(index)[0], place_of(episode.instruction, instructions)
        found.append(one_window(rgb[:, frames[0]], cameras, episode.point_m[frames], gripper_open, place))
    joined: dict[str, Any] = {
        field: torch.cat([getattr(window, field) for window in found])
        for field in ("pictures", "uv_px", "visible", "gripper_open", "instruction")
    }
    point_m = np.concatenate([window.point_m for window in found])
    return Windows(**joined, point_m=point_m, cameras=tuple(window.cameras[0] for window in found))


def one_window(rgb: np.ndarray, cameras: tuple[Camera, ...], point_m: np.ndarray, gripper_open: np.ndarray, place: int) -> Windows:
    """A single window: first pictures rgb [V H W 3] at `SIZE_PX`, their cameras, and the known part of the path, point_m [F 3]."""
    projected = [camera.project(point_m) for camera in cameras]
    return Windows(
        pictures=torch.from_numpy(np.ascontiguousarray(np.moveaxis(rgb, -1, 1)))[None],
        uv_px=torch.from_numpy(np.stack([uv_px for uv_px, _ in projected]).astype(np.float32))[None],
        visible=torch.from_numpy(np.stack([camera.inside(*seen) for camera, seen in zip(cameras, projected, strict=True)]))[None],
        gripper_open=torch.from_numpy(gripper_open)[None],
        instruction=torch.tensor([place]),
        point_m=point_m[None],
        cameras=(cameras,),
    )


def _small(episode: Episode, names: Sequence[str] | None) -> tuple[np.ndarray, tuple[Camera, ...]]:
    """(all pictures of an episode [V F H W 3] at `SIZE_PX`, their cameras)."""
    recorded = [camera.name for camera in episode.cameras]
    chosen = [recorded.index(name) for name in names or recorded]
    return resize(episode.read_rgb(range(episode.num_frames))[chosen], [episode.cameras[view] for view in chosen], SIZE_PX, SIZE_PX)


def place_of(instruction: str, instructions: Sequence[str]) -> int:
    """The place of an instruction in the list that the net was trained on, or `MvwanError`."""
    if instruction not in instructions:
        raise MvwanError(f"instruction {instruction!r}: the net was trained on {', '.join(map(repr, instructions))} alone")
    return instructions.index(instruction)


def _heat(uv_px: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """[... H W] float32, a spot at each visible point."""
    return torch.from_numpy(render(uv_px.numpy(), visible.numpy(), SIZE_PX, SIZE_PX, SIGMA_PX))


def fit(windows: Windows, instructions: int, steps: int, batch: int, rate: float, shift_px: int, jitter: float, seed: int) -> ConvNet:
    """The net after `steps` updates.

    Every view's picture is moved by up to `shift_px` and its camera with it, which is to say its labels, and its colours are scaled by
    up to `jitter`.
    """
    torch.manual_seed(seed)
    count, views, frames = windows.visible.shape
    net = ConvNet(views, frames - 1, instructions)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.1)
    for step in range(steps):
        rows = torch.randint(count, (batch,))
        moved = torch.randint(-shift_px, shift_px + 1, (batch, views, 2))
        pictures = _moved(windows.pictures[rows], moved, shift_px) / 255
        pictures = (pictures * (1 + jitter * (2 * torch.rand(batch, views, 3, 1, 1) - 1))).clamp(0, 1)
        uv_px = windows.uv_px[rows] + moved[:, :, None]
        visible = windows.visible[rows] & ((uv_px >= 0) & (uv_px < SIZE_PX)).all(dim=-1)
        log_heat, gripper = net(pictures, _heat(uv_px[:, :, 0], visible[:, :, 0]), windows.instruction[rows])
        loss = _loss(log_heat, gripper, uv_px[:, :, 1:], visible[:, :, 1:], windows.gripper_open[rows, 1:])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            typer.echo(f"step {step + 1} of {steps}: loss {loss.item():.3f}", err=True)
    return net.eval()


def _moved(pictures: torch.Tensor, moved: torch.Tensor, most_px: int) -> torch.Tensor:
    """float32 pictures [B V 3 H W] moved right and down by `moved` [B V 2] px; their edges are repeated."""
    flat = pictures.flatten(0, 1).float()
    height, width = flat.shape[-2:]
    padded = functional.pad(flat, (most_px,) * 4, mode="replicate")
    corners = (most_px - moved).flatten(0, 1).tolist()
    cut = [picture[:, top : top + height, left : left + width] for picture, (left, top) in zip(padded, corners, strict=True)]
    return torch.stack(cut).unflatten(0, pictures.shape[:2])


def _loss(log_heat: torch.Tensor, gripper: torch.Tensor, uv_px: torch.Tensor, visible: torch.Tensor, opening: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of heatmaps with spots, distance of their means, and cross-entropy of the gripper; unseen points are left out."""
    spots = _heat(uv_px, visible)
    entropy = -(spots / spots.sum(dim=(-2, -1), keepdim=True).clamp_min(1e-6) * log_heat).sum(dim=(-2, -1))
    distance = functional.smooth_l1_loss(mean_px(log_heat), uv_px.nan_to_num(), reduction="none").sum(dim=-1)
    known = opening.isfinite()
    grip = functional.binary_cross_entropy_with_logits(gripper[known], opening[known].clamp(0, 1)) if known.any() else gripper.sum() * 0
    return ((entropy + _PIXEL_WEIGHT * distance) * visible).sum() / visible.sum().clamp_min(1) + grip


@torch.no_grad()
def predict(net: ConvNet, windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    """(point_m [N F-1 3], gripper_open [N F-1]) of the frames after the first; NaN where the views' rays do not meet."""
    points, grips = [], []
    for start in range(0, len(windows.pictures), 32):
        part = slice(start, start + 32)
        heat = _heat(windows.uv_px[part, :, 0], windows.visible[part, :, 0])
        log_heat, gripper = net(windows.pictures[part].float() / 255, heat, windows.instruction[part])
        seen = mean_px(log_heat).numpy().astype(np.float64)
        points += [triangulate(views, uv_px, np.ones(uv_px.shape[:2]))[0] for views, uv_px in zip(windows.cameras[part], seen, strict=True)]
        grips.append(gripper.sigmoid().numpy())
    return np.stack(points), np.concatenate(grips)
