"""What needs no training and has to be beaten: nothing moves, everything goes on as it did, it goes as in the demonstration most alike.

Each answers a window with points, peaks and maybe pictures, as a prediction does. Knows no model and no measure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mvwan import metrics
from mvwan.batch import Sample
from mvwan.cameras import Camera
from mvwan.data.dataset import Window, WindowDataset

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


def constant_velocity(sample: Sample, window: Window, given: int) -> Answer:
    """The point goes on as fast as between the last two given frames.

    Where one frame is given, its predecessor in the recording is looked at, which the run does not see: an advantage. At the start of an
    episode there is none, and the point stays.
    """
    if given >= 2:
        point_m = metrics.constant_velocity(sample.point_m, 0, given)
    else:
        interval = window.frames.step
        before = window.frames[0] - interval
        now_m = sample.point_m[0]
        velocity = now_m - window.episode.point_m[before] if before >= 0 else np.zeros(3)
        point_m = now_m + np.arange(len(sample.point_m))[:, None] * velocity
    return Answer(point_m=point_m, uv_px=_projected(point_m, sample.cameras))


class NearestDemonstration:
    """Of the training windows with the same instruction, the one whose first pictures look most alike; its path is taken as it is.

    Alike: least squared difference of the views' first pictures shrunk to 16x16. A blind replay would execute the very same path.
    """

    def __init__(self, training: WindowDataset) -> None:
        self._training = training
        self._thumbnails: dict[str, tuple[list[int], np.ndarray]] = {}

    def answer(self, sample: Sample, given: int) -> Answer:
        """The demonstration's pictures and points after the `given` frames; the held first frame when none has the instruction."""
        places, known = self._of(sample.instruction)
        if not places:
            return hold_first(sample, given)
        difference = np.square(known - _thumbnail(sample.rgb[:, 0])).mean(axis=1)
        nearest = self._training.sample(places[int(difference.argmin())])
        rgb, point_m = nearest.rgb.copy(), nearest.point_m.copy()
        rgb[:, :given], point_m[:given] = sample.rgb[:, :given], sample.point_m[:given]
        return Answer(rgb=rgb, point_m=point_m, uv_px=_projected(point_m, sample.cameras))

    def _of(self, instruction: str) -> tuple[list[int], np.ndarray]:
        """(training windows with that instruction, their thumbnails [N v]), made when first asked for."""
        if instruction not in self._thumbnails:
            windows = self._training.windows
            places = [place for place, window in enumerate(windows) if window.episode.instruction == instruction]
            pictures = [_thumbnail(self._training.first_pictures(place)) for place in places]
            self._thumbnails[instruction] = places, np.stack(pictures) if pictures else np.zeros((0, 0))
        return self._thumbnails[instruction]


def _thumbnail(pictures: np.ndarray) -> np.ndarray:
    """[v] float64 of pictures [V H W 3] uint8."""
    views, height, width, _ = pictures.shape
    rows, columns = (np.arange(_THUMBNAIL_PX + 1) * size // _THUMBNAIL_PX for size in (height, width))
    sums = np.add.reduceat(np.add.reduceat(pictures.astype(np.float64), rows[:-1], axis=1), columns[:-1], axis=2)
    return (sums / np.diff(rows)[None, :, None, None] / np.diff(columns)[None, None, :, None]).reshape(views, -1).ravel()


def _projected(point_m: np.ndarray, cameras: Sequence[Camera]) -> np.ndarray:
    """[V F 2] of points [F 3]."""
    return np.stack([camera.project(point_m)[0] for camera in cameras])
