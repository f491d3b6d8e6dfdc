"""Where windows lie in their episodes, and their pictures, of which each is decoded once. Knows no size of pictures and no label."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mvwan.batch import Episode
from mvwan.config import DataConfig
from mvwan.errors import MvwanError

READ_TOGETHER = 32
"""Pictures that are in memory at recorded size at the same time, beside those of a window."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Where a sample lies in the recording."""

    episode: Episode
    frames: tuple[int, ...]
    """Recorded frames of its pictures; the last one of the episode again and again where the window runs past its end."""
    interval: int
    """Recorded frames from one picture to the next."""


class Windows(Sequence[Window]):
    """The windows of episodes, made when asked for: in memory each is two numbers, however many pictures it has.

    They start every `data.window_stride` frames, and the last one ends with the episode, or `data.past_end` frames later.
    """

    def __init__(self, episodes: Sequence[Episode], data: DataConfig) -> None:
        span = span_of(data)
        self.episodes = tuple(episodes)
        starts = [_starts(episode.num_frames + min(data.past_end, span - 1), span, data.window_stride) for episode in episodes]
        self.episode_of = np.repeat(np.arange(len(starts), dtype=np.int32), [len(part) for part in starts])
        """[N] int32 place in `episodes` of each window."""
        self._starts = np.concatenate([np.zeros(0, np.int32), *starts])
        self._data = data

    def __len__(self) -> int:
        return len(self.episode_of)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        episode, start = self.episodes[self.episode_of[index]], int(self._starts[index])
        interval, last = self._data.frame_interval, episode.num_frames - 1
        frames = tuple(min(start + picture * interval, last) for picture in range(self._data.num_frames))
        return Window(episode=episode, frames=frames, interval=interval)

    def kept(self, keep: np.ndarray) -> "Windows":
        """Those where keep [N] is true."""
        other = Windows((), self._data)
        other.episodes, other.episode_of, other._starts = self.episodes, self.episode_of[keep], self._starts[keep]
        return other

    def used_episodes(self) -> list[Episode]:
        """The episodes that have windows here."""
        return [self.episodes[number] for number in np.unique(self.episode_of)]


def span_of(data: DataConfig) -> int:
    """Recorded frames from the first picture of a window to its last, both counted."""
    return (data.num_frames - 1) * data.frame_interval + 1


def _starts(num_frames: int, span: int, stride: int) -> np.ndarray:
    """[N] int32 first frames of the windows: every `stride`, and one whose last frame is the last of `num_frames`."""
    starts = list(range(0, num_frames - span + 1, stride))
    if starts and starts[-1] != num_frames - span:
        starts.append(num_frames - span)
    return np.array(starts, np.int32)


class ReadAhead:
    """An episode's pictures, asked for in the order of windows' first frames: each decoded once, in runs, and held while needed."""

    def __init__(self, read_rgb: Callable[[Sequence[int]], np.ndarray], frames: Iterable[int]) -> None:
        """`frames` are all that will be asked for."""
        self._read_rgb, self._ahead = read_rgb, sorted(set(frames))
        self._held: dict[int, np.ndarray] = {}

    def __call__(self, frames: Sequence[int]) -> np.ndarray:
        """[V len(frames) H W 3] uint8."""
        self._held = {frame: pictures for frame, pictures in self._held.items() if frame >= min(frames)}
        missing = sorted(set(frames) - self._held.keys())
        if missing:
            later = [frame for frame in self._ahead if frame > missing[-1]][: max(READ_TOGETHER - len(missing), 0)]
            try:
                self._read([*missing, *later])
            except MvwanError:
                self._read(missing)  # a damaged picture is the concern of those who ask for it
        return np.stack([self._held[frame] for frame in frames], axis=1)

    def _read(self, frames: Sequence[int]) -> None:
        self._held |= dict(zip(frames, self._read_rgb(frames).swapaxes(0, 1), strict=True))


def spread(available: int, wanted: int) -> list[int]:
    """At most `wanted` of the numbers 0 .. available-1, evenly spread, both ends among them."""
    if wanted >= available:
        return list(range(available))
    return sorted({round(place) for place in np.linspace(0, available - 1, wanted).tolist()}) if wanted > 1 else [available // 2] * wanted
