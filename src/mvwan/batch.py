"""The four records that cross borders: Episode, Sample, Batch, Prediction. Shapes and units on each field, `.check()` at the border.

Letters are those of `shapes`. Knows no file format, no model and no simulator.
Pixel coordinates are continuous: (0, 0) is the outer corner of the first pixel, its centre is (0.5, 0.5), u runs right, v down.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from mvwan.cameras import Camera
from mvwan.errors import MvwanError
from mvwan.shapes import check_num_frames, num_frames_of, num_latent_frames

_UNIT_WITHIN = 0.01
"""A quaternion whose length is further from 1 is none."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise MvwanError(message)


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One demonstration: numbers in memory, pictures read when asked for."""

    name: str
    """Unique within its dataset, for example `drawer-open-v3/000004`."""
    instruction: str
    """What the robot was told, in words."""
    cameras: tuple[Camera, ...]
    """One per view, in the fixed order of the dataset; static over the episode."""
    fps: float
    """Recorded frames per second."""
    point_m: np.ndarray
    """[F 3] float64, the tracked point (tool point, or tracked object) in the world frame, metres; NaN where not labelled."""
    gripper_open: np.ndarray
    """[F] float32, 0 closed .. 1 open; NaN where not recorded."""
    uv_px: np.ndarray | None = None
    """[V F 2] float64, the tracked point where it is labelled in the pictures instead of in space; NaN where a view does not see it.
    Cameras are then no calibration: they stand for the size of their pictures."""
    split: Literal["train", "validation"] | None = None
    """Where the dataset itself puts the episode; None: it does not say."""
    read_rgb: Callable[[Sequence[int]], np.ndarray] = field(repr=False)
    """frames -> [V len(frames) H W 3] uint8."""
    extra: dict[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    """Further per-frame arrays of the source by name: `action` [F A], `hand_m` [F 3], `state` [F K], and `hand_quaternion_wxyz` [F 4],
    the hand's orientation in the world frame as unit quaternions (w, x, y, z), NaN where not recorded."""
    fingerprint: str = ""
    """Changes whenever the stored bytes of the episode change; part of the latent cache's key."""

    @property
    def num_frames(self) -> int:
        return len(self.point_m)

    @property
    def demonstrated(self) -> tuple[str, bytes, bytes]:
        """What is equal for the same demonstration under any name and in any folder: where the point went, and why."""
        return self.instruction, self.point_m.tobytes(), b"" if self.uv_px is None else self.uv_px.tobytes()

    def check(self) -> "Episode":
        """Itself, or `MvwanError` that names the episode and the field at fault."""
        frames = self.num_frames
        _require(frames > 0, f"episode {self.name}: no frames")
        _require(len(self.cameras) > 0, f"episode {self.name}: no cameras")
        _require(self.point_m.shape == (frames, 3), f"episode {self.name}: point_m is {self.point_m.shape}, needs (F, 3)")
        if self.uv_px is not None:
            needed = (len(self.cameras), frames, 2)
            _require(self.uv_px.shape == needed, f"episode {self.name}: uv_px is {self.uv_px.shape}, needs {needed}")
        _require(
            self.gripper_open.shape == (frames,),
            f"episode {self.name}: gripper_open is {self.gripper_open.shape}, needs ({frames},)",
        )
        for name, values in self.extra.items():
            _require(len(values) == frames, f"episode {self.name}: {name} has {len(values)} rows, needs {frames}")
        if "hand_quaternion_wxyz" in self.extra:
            given = self.extra["hand_quaternion_wxyz"]
            _require(given.shape == (frames, 4), f"episode {self.name}: hand_quaternion_wxyz is {given.shape}, needs ({frames}, 4)")
            off = np.abs(np.linalg.norm(given, axis=1) - 1) > _UNIT_WITHIN
            first = int(off.argmax())
            _require(not off.any(), f"episode {self.name}: hand_quaternion_wxyz of frame {first} is {given[first]}, not of length 1")
        return self


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One training window in pixels."""

    sample_id: str
    """Episode name, first frame and variant, for example `drawer-open-v3/000004@12#0`: the seed term of sigma and noise."""
    instruction: str
    cameras: tuple[Camera, ...]
    """One per view, already moved with crops, resizes and augmentation."""
    rgb: np.ndarray
    """[V F H W 3] uint8."""
    uv_px: np.ndarray
    """[V F 2] float32, the projected point; meaningless where not visible."""
    visible: np.ndarray
    """[V F] bool: the point is labelled, in front of the camera and inside the picture."""
    point_m: np.ndarray
    """[F 3] float64, metres, in the frame of `cameras`."""
    gripper_open: np.ndarray
    """[F] float32, 0 closed .. 1 open; NaN where not recorded."""
    rotation_deg: np.ndarray
    """[F 3] float32, the turn of the hand since frame 0 as in `actions`; NaN where not recorded."""

    def check(self) -> "Sample":
        """Itself, or `MvwanError` that names the sample and the field at fault."""
        _require(self.rgb.ndim == 5 and self.rgb.shape[-1] == 3, f"sample {self.sample_id}: rgb is {self.rgb.shape}, needs (V, F, H, W, 3)")
        _require(self.rgb.dtype == np.uint8, f"sample {self.sample_id}: rgb is {self.rgb.dtype}, needs uint8")
        views, frames = self.rgb.shape[:2]
        check_num_frames(frames)
        _require(len(self.cameras) == views, f"sample {self.sample_id}: {len(self.cameras)} cameras for {views} views")
        for name, shape in (
            ("uv_px", (views, frames, 2)),
            ("visible", (views, frames)),
            ("point_m", (frames, 3)),
            ("gripper_open", (frames,)),
            ("rotation_deg", (frames, 3)),
        ):
            given = getattr(self, name).shape
            _require(given == shape, f"sample {self.sample_id}: {name} is {given}, needs {shape}")
        return self


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Encoded windows, ready for the network."""

    sample_ids: tuple[str, ...]
    """B names; sigma and noise are drawn from (seed, step, sample_id)."""
    rgb: torch.Tensor
    """[B V C f h w] float32 normalised latents."""
    heat: torch.Tensor
    """[B V C f h w] float32 normalised latents of the coloured heatmaps."""
    text: torch.Tensor
    """[B L D] float32, zero after each prompt's own tokens."""
    heat_valid: torch.Tensor
    """[B V f] bool: every frame of the latent frame shows the point; elsewhere the heat stream is left out of the loss."""
    gripper_open: torch.Tensor
    """[B F] float32, 0 closed .. 1 open; NaN where not recorded."""
    rotation_deg: torch.Tensor
    """[B F 3] float32, the turn of the hand since frame 0 as in `actions`; NaN where not recorded."""
    rays: torch.Tensor | None = None
    """[B V 6 h w] float32, `Camera.rays` of the latents' cells; None where no model wants to know."""

    @property
    def latents(self) -> torch.Tensor:
        """[B V 2C f h w], RGB channels first: the network's clean input."""
        return torch.cat([self.rgb, self.heat], dim=2)

    def to(self, device: Any) -> "Batch":
        """The same batch on another device."""
        names = ("rgb", "heat", "text", "heat_valid", "gripper_open", "rotation_deg")
        moved = {name: getattr(self, name).to(device) for name in names}
        return Batch(sample_ids=self.sample_ids, **moved, rays=None if self.rays is None else self.rays.to(device))

    def check(self) -> "Batch":
        """Itself, or `MvwanError` that names the field at fault."""
        _require(self.rgb.ndim == 6, f"batch: rgb is {tuple(self.rgb.shape)}, needs (B, V, C, f, h, w)")
        batch, views, _, frames = self.rgb.shape[:4]
        _require(self.heat.shape == self.rgb.shape, f"batch: heat is {tuple(self.heat.shape)}, rgb is {tuple(self.rgb.shape)}")
        _require(len(self.sample_ids) == batch, f"batch: {len(self.sample_ids)} sample ids for {batch} samples")
        _require(self.text.ndim == 3 and len(self.text) == batch, f"batch: text is {tuple(self.text.shape)}, needs ({batch}, L, D)")
        _require(
            tuple(self.heat_valid.shape) == (batch, views, frames),
            f"batch: heat_valid is {tuple(self.heat_valid.shape)}, needs {(batch, views, frames)}",
        )
        for name, shape in (("gripper_open", (batch, num_frames_of(frames))), ("rotation_deg", (batch, num_frames_of(frames), 3))):
            given = tuple(getattr(self, name).shape)
            _require(given == shape, f"batch: {name} is {given}, needs {shape}")
        if self.rays is not None:
            given, shape = tuple(self.rays.shape), (batch, views, 6, *self.rgb.shape[4:])
            _require(given == shape, f"batch: rays is {given}, needs {shape}")
        return self


def camera_rays(cameras: Sequence[Camera], rows: int, columns: int) -> torch.Tensor:
    """[V 6 rows columns] float32: `Camera.rays` of each view."""
    return torch.tensor(np.stack([camera.rays(rows, columns) for camera in cameras]))


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the model says will happen, in pictures, pixels and metres. Frame 0 is the given one."""

    rgb: np.ndarray
    """[V F H W 3] uint8; only the given frames, when no others were asked for."""
    heat: np.ndarray
    """[V F H W] float32 in 0..1."""
    uv_px: np.ndarray
    """[V F 2] float32, sub-pixel peak of each heatmap."""
    confidence: np.ndarray
    """[V F] float32 in 0..1."""
    point_m: np.ndarray
    """[F 3] float64, where the views' heat meets in space (`trajectory.lift`); NaN where it does not."""
    residual_px: np.ndarray
    """[F] float64, root mean square distance of the peaks to the projected point."""
    gripper_open: np.ndarray
    """[F] float32, 0 closed .. 1 open; NaN throughout when the model has no action head."""
    rotation_deg: np.ndarray
    """[F 3] float32, the turn of the hand since frame 0 as in `actions`; NaN throughout when the model has no head for it."""
    cameras: tuple[Camera, ...]
    prompt: str

    def check(self) -> "Prediction":
        """Itself, or `MvwanError` that names the field at fault."""
        views, frames = self.heat.shape[:2]
        num_latent_frames(frames)
        for name, shape in (
            ("uv_px", (views, frames, 2)),
            ("confidence", (views, frames)),
            ("point_m", (frames, 3)),
            ("residual_px", (frames,)),
            ("gripper_open", (frames,)),
            ("rotation_deg", (frames, 3)),
        ):
            given = getattr(self, name).shape
            _require(given == shape, f"prediction: {name} is {given}, needs {shape}")
        shown = self.rgb.shape[1] if self.rgb.ndim == 5 else 0
        needed = (views, shown, *self.heat.shape[2:], 3)
        _require(self.rgb.shape == needed and 0 < shown <= frames, f"prediction: rgb is {self.rgb.shape}, heat is {self.heat.shape}")
        for name, low, high in (("gripper_open", 0, 1), ("rotation_deg", -180, 180)):
            values = getattr(self, name)
            _require(not ((values < low) | (values > high)).any(), f"prediction: {name} must be in {low}..{high} or NaN")
        return self
