"""What needs no training and has to be beaten: nothing moves, everything goes on as it did, it goes as in the demonstration most alike.

Each answers a window with points, peaks and maybe pictures, as a prediction does. Knows no model and no measure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mvwan import metrics
from mvwan.batch import Sample
from mvwan.cameras import Camera
from mvwan.data.dataset import WindowDataset
from mvwan.data.windows import Window

_THUMBNAIL_PX = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """What one source says about a window. Not a number where it says nothing."""

    uv_px: np.ndarray
    """[V F 2]."""
    point_m: np.ndarray
    """[F 3]."""
    rgb: np.ndarray | None = None
    """[V F H W 3] uint8; None when it says nothing about pictures."""


def hold_first(sample: Sample, given: int) -> Answer:
    """Everything stays as in the last of the `given` first frames."""
    rgb, uv_px = (metrics.hold_first(values, 1, given) for values in (sample.rgb, sample.uv_px))
    return Answer(rgb=rgb, uv_px=uv_px, point_m=metrics.hold_first(sample.point_m, 0, given))


def constant_velocity(sample: Sample, window: Window, given: int) -> Answer | None:
    """The point goes on as fast as between the last two given frames; None where it has no place in space, only in pictures.

    Where one frame is given, its predecessor in the recording is looked at, which the run does not see: an advantage. Where there is
    none, at the start of an episode or where it has no label, the point stays.
    """
    if not np.isfinite(sample.point_m).any():
        return None
    if given >= 2:
        point_m = metrics.constant_velocity(sample.point_m, 0, given)
    else:
        before = window.frames[0] - window.interval
        now_m = sample.point_m[0]
        velocity = now_m - window.episode.point_m[before] if before >= 0 else np.zeros(3)
        if not np.isfinite(velocity).all():
            velocity = np.zeros(3)
        point_m = now_m + np.arange(len(sample.point_m))[:, None] * velocity
    return Answer(point_m=point_m, uv_px=_projected(point_m, sample.cameras))


class NearestDemonstration:
    """Of the training windows with the same instruction, the one that is most alike in the last given frame; its path from there on.

    Alike: least sum of two distances, each divided by its mean over the candidates: root mean squared difference of the views' pictures
    shrunk to 16x16, and distance of the points. The path is moved to begin where the point is: the run is told that as well, and a path
    as recorded would be an easier bar. Pictures are as recorded.
    """

    def __init__(self, training: WindowDataset, given: int) -> None:
        self._training = training
        self._last_given = max(given, 1) - 1
        self._begins: dict[str, tuple[list[int], np.ndarray, np.ndarray]] = {}

    def answer(self, sample: Sample) -> Answer | None:
        """The demonstration's pictures and points after the given frames; None when no demonstration has the instruction.

        Where its points have no place in space, only in pictures, the path is moved in each view's picture.
        """
        last = self._last_given
        places, thumbnails, points_m = self._of(sample.instruction)
        if not places:
            return None
        by_picture = np.sqrt(np.square(thumbnails - _thumbnail(sample.rgb[:, last])).mean(axis=1))
        by_point = np.linalg.norm(points_m - sample.point_m[last], axis=1)
        alike = np.argsort(_by_mean(by_picture) + _by_mean(by_point), kind="stable").tolist()
        nearest = next(filter(None, (self._training.readable_sample(places[found]) for found in alike)), None)
        if nearest is None:
            return None
        rgb = np.concatenate([sample.rgb[:, : last + 1], nearest.rgb[:, last + 1 :]], axis=1)
        point_m = _moved(nearest.point_m, sample.point_m, last)
        if np.isfinite(point_m).any():
            return Answer(rgb=rgb, point_m=point_m, uv_px=_projected(point_m, sample.cameras))
        uv_px = np.stack([_moved(path, own, last) for path, own in zip(nearest.uv_px, sample.uv_px, strict=True)])
        return Answer(rgb=rgb, point_m=point_m, uv_px=uv_px)

    def _of(self, instruction: str) -> tuple[list[int], np.ndarray, np.ndarray]:
        """(training windows with that instruction, their thumbnails [N v], their points [N 3]), made when first asked for."""
        if instruction not in self._begins:
            windows, last = self._training.windows, self._last_given
            places = [place for place, window in enumerate(windows) if window.episode.instruction == instruction]
            read = dict(zip(places, self._training.pictures_at(places, last), strict=True))
            thumbnails = [_thumbnail(pictures) for pictures in read.values() if pictures is not None]
            places = [place for place, pictures in read.items() if pictures is not None]
            points = [windows[place].episode.point_m[windows[place].frames[last]] for place in places]
            self._begins[instruction] = places, np.array(thumbnails), np.array(points)
        return self._begins[instruction]


def _moved(path: np.ndarray, own: np.ndarray, last: int) -> np.ndarray:
    """`own` [F c] up to frame `last`, then `path` [F c] moved to go on from there; as it is where one of the two is not known then."""
    shift = own[last] - path[last]
    return np.concatenate([own[: last + 1], path[last + 1 :] + (shift if np.isfinite(shift).all() else 0)])


def _by_mean(distance: np.ndarray) -> np.ndarray:
    """Distances [N] as multiples of their mean; where one is not known it says nothing for or against, the mean."""
    known = np.isfinite(distance)
    mean = float(distance[known].mean()) if known.any() else 0.0
    return np.where(known, distance, mean) / mean if mean else np.zeros(len(distance))


def _thumbnail(pictures: np.ndarray) -> np.ndarray:
    """[v] float64 of pictures [V H W 3] uint8."""
    views, height, width, _ = pictures.shape
    rows, columns = (np.arange(_THUMBNAIL_PX + 1) * size // _THUMBNAIL_PX for size in (height, width))
    sums = np.add.reduceat(np.add.reduceat(pictures.astype(np.float64), rows[:-1], axis=1), columns[:-1], axis=2)
    return (sums / np.diff(rows)[None, :, None, None] / np.diff(columns)[None, None, :, None]).reshape(views, -1).ravel()


def _projected(point_m: np.ndarray, cameras: Sequence[Camera]) -> np.ndarray:
    """[V F 2] of points [F 3]."""
    return np.stack([camera.project(point_m)[0] for camera in cameras])
