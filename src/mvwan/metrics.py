"""How far a prediction is from the truth, in px, mm and dB, how often an arm succeeds, and baselines. Knows no model and no files.

Frames that were given clean never count: `condition_frames` is their number in latent frames, as everywhere. What is averaged is
returned as `Tally`, all values, so that windows and views are put together before means and percentiles are taken.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mvwan.cameras import Camera, triangulate
from mvwan.shapes import num_frames_of


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Values before they are summarised. Tallies add up."""

    values: tuple[float, ...] = ()
    frames: tuple[int, ...] = ()
    """In which frame of its window each value was taken."""
    lost: int = 0
    """Values that should be there but that the prediction lacks (NaN): not in `values`, so report them beside the mean."""

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(values=self.values + other.values, frames=self.frames + other.frames, lost=self.lost + other.lost)

    def at(self, frame: int) -> "Tally":
        """The values of one frame; how many were lost there is not known."""
        return Tally(values=tuple(value for value, taken in zip(self.values, self.frames, strict=True) if taken == frame))

    @property
    def count(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        """NaN of nothing."""
        return math.fsum(self.values) / self.count if self.count else math.nan

    def quantile(self, share: float) -> float:
        """The value that `share` of all do not exceed, between neighbours in a straight line; NaN of nothing."""
        return float(np.quantile(self.values, share)) if self.count else math.nan


def num_given_frames(condition_frames: int) -> int:
    """Pictures in the first `condition_frames` latent frames."""
    return num_frames_of(condition_frames) if condition_frames else 0


def peak_error_px(pred_uv_px: np.ndarray, true_uv_px: np.ndarray, visible: np.ndarray, condition_frames: int = 1) -> tuple[Tally, ...]:
    """One tally per view of the distance in px between predicted and true points [V F 2], where `visible` [V F]."""
    distance = np.linalg.norm(_float(pred_uv_px) - _float(true_uv_px), axis=-1)
    return _per_view(distance, visible, condition_frames)


def pck(
    pred_uv_px: np.ndarray, true_uv_px: np.ndarray, visible: np.ndarray, threshold_px: float, condition_frames: int = 1
) -> tuple[Tally, ...]:
    """One tally per view whose mean, in 0..1, is the share of visible points found within threshold_px. A lost point is not found."""
    distance = np.linalg.norm(_float(pred_uv_px) - _float(true_uv_px), axis=-1)
    return _per_view((distance <= threshold_px).astype(np.float64), visible, condition_frames)


def lost_share(pred_uv_px: np.ndarray, visible: np.ndarray, condition_frames: int = 1) -> tuple[Tally, ...]:
    """One tally per view whose mean, in 0..1, is the share of visible points of which the prediction [V F 2] says nothing (NaN)."""
    lost = np.asarray(np.isnan(_float(pred_uv_px)).any(axis=-1), np.float64)
    return _per_view(lost, visible, condition_frames)


def error_3d_mm(pred_point_m: np.ndarray, true_point_m: np.ndarray, condition_frames: int = 1) -> Tally:
    """The tally of the distance in mm between predicted and true points [F 3] in metres; unlabelled (NaN) truth is left out."""
    truth = _float(true_point_m)
    distance = 1000 * np.linalg.norm(_float(pred_point_m) - truth, axis=-1)
    return _tally(distance, np.asarray(np.isfinite(truth).all(axis=-1)), condition_frames)


def view_disagreement_px(
    uv_px: np.ndarray, confidence: np.ndarray, cameras: Sequence[Camera], condition_frames: int = 1
) -> tuple[Tally, ...]:
    """One tally per view of the distance in px between its peaks [V F 2] and the point that all views agree on best.

    Needs no truth: it is 0 when the views' peaks meet in space. Peaks of confidence [V F] 0 are left out; frames whose peaks do
    not meet at all are lost.
    """
    point, _ = triangulate(cameras, uv_px, confidence)
    projected = np.stack([camera.project(point)[0] for camera in cameras])
    return _per_view(np.linalg.norm(projected - _float(uv_px), axis=-1), np.asarray(confidence) > 0, condition_frames)


def squared_error(pred_rgb: np.ndarray, true_rgb: np.ndarray, condition_frames: int = 1) -> tuple[Tally, ...]:
    """One tally per view of each frame's mean squared difference of uint8 values [V F H W 3]: add these, then `psnr_db` of the mean."""
    given = num_given_frames(condition_frames)
    pairs = zip(pred_rgb[:, given:], true_rgb[:, given:], strict=True)
    return tuple(_of_frames(np.square(_float(pred) - _float(true)).mean(axis=(1, 2, 3)), given) for pred, true in pairs)


def psnr_db(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB of 8-bit pictures with that mean squared error; infinite for equal pictures."""
    return 10 * math.log10(255**2 / mean_squared_error) if mean_squared_error else math.inf


def ssim(pred_rgb: np.ndarray, true_rgb: np.ndarray, condition_frames: int = 1) -> tuple[Tally, ...]:
    """One tally per view of the frames' structural similarity, at most 1, of uint8 [V F H W 3].

    Source: Wang et al., Image quality assessment: from error visibility to structural similarity, IEEE TIP 13 (2004), equation 13.
    """
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    given = num_given_frames(condition_frames)
    tallies: list[Tally] = []
    for view in range(len(true_rgb)):
        pred, true = (torch.from_numpy(rgb[view, given:].astype(np.float32)).permute(0, 3, 1, 2) for rgb in (pred_rgb, true_rgb))
        values = structural_similarity_index_measure(pred, true, data_range=255.0, reduction="none") if len(true) else torch.zeros(0)
        assert isinstance(values, torch.Tensor)
        tallies.append(_of_frames(values.numpy(), given))
    return tuple(tallies)


def success_rate(outcomes: Sequence[bool]) -> dict[str, Any]:
    """`successes`, `trials`, `rate` and the 95 % Wilson interval `low`, `high` of one or more outcomes.

    Source: Wilson, Probable inference, JASA 22 (1927).
    """
    from scipy.stats import binomtest

    successes = sum(outcomes)
    interval = binomtest(successes, len(outcomes)).proportion_ci(0.95, method="wilson")
    return {
        "successes": successes,
        "trials": len(outcomes),
        "rate": round(successes / len(outcomes), 4),
        "low": round(float(interval.low), 4),
        "high": round(float(interval.high), 4),
    }


def rate_in_words(rate: Mapping[str, Any]) -> str:
    """A `success_rate` as people read it: `21/25, 65–94 %`."""
    return f"{rate['successes']}/{rate['trials']}, {100 * rate['low']:.0f}–{100 * rate['high']:.0f} %"


def hold_first(values: np.ndarray, frame_axis: int, num_given: int = 1) -> np.ndarray:
    """`values` with the last of its `num_given` first frames repeated to the end: the baseline that predicts that nothing moves."""
    shown = np.minimum(np.arange(values.shape[frame_axis]), max(num_given, 1) - 1)
    return np.take(values, shown, axis=frame_axis)


def constant_velocity(values: np.ndarray, frame_axis: int, num_given: int) -> np.ndarray:
    """Points carried on at the speed between the last two of the `num_given` first frames (two or more), which stay as they are."""
    assert 2 <= num_given <= values.shape[frame_axis], f"constant_velocity: num_given={num_given}, needs two or more frames"
    points = np.moveaxis(np.array(values), frame_axis, 0)
    ahead = np.arange(1, len(points) - num_given + 1).reshape(-1, *[1] * (points.ndim - 1))
    points[num_given:] = points[num_given - 1] + ahead * (points[num_given - 1] - points[num_given - 2])
    return np.moveaxis(points, 0, frame_axis)


def _float(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float64)


def _tally(values: np.ndarray, wanted: np.ndarray, condition_frames: int) -> Tally:
    """The tally of values [F] where `wanted` [F], beyond the given frames; NaN counts as lost."""
    given = num_given_frames(condition_frames)
    chosen, finite = np.array(wanted, bool), np.isfinite(values)
    chosen[:given] = False
    frames = np.flatnonzero(chosen & finite)
    return Tally(values=tuple(values[frames].tolist()), frames=tuple(frames.tolist()), lost=int((chosen & ~finite).sum()))


def _of_frames(values: np.ndarray, first: int) -> Tally:
    """The tally of one value for every frame from `first` on."""
    return Tally(values=tuple(values.tolist()), frames=tuple(range(first, first + len(values))))


def _per_view(values: np.ndarray, wanted: np.ndarray, condition_frames: int) -> tuple[Tally, ...]:
    assert values.shape == np.shape(wanted), f"metrics: values {values.shape} for a mask of {np.shape(wanted)}"
    return tuple(_tally(view, mask, condition_frames) for view, mask in zip(values, wanted, strict=True))
