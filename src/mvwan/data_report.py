"""What a dataset holds before anybody trains on it: format, episodes, cameras, labels, what is missing or damaged, how many windows.

Reads numbers, and pictures only for the sheet and for `check_pictures`. Knows no model.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from rich.table import Table
from tqdm import tqdm

from mvwan.batch import Episode
from mvwan.cameras import Camera
from mvwan.config import Config
from mvwan.data.dataset import WindowDataset, episodes_of, format_of, roots_of
from mvwan.data.left_out import LeftOut
from mvwan.data.windows import READ_TOGETHER
from mvwan.errors import MvwanError
from mvwan.train_data import sheet

_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class View:
    """One camera over all episodes."""

    name: str
    width_px: int
    height_px: int
    kind: str
    """`pinhole`, `orthographic`, or `not calibrated`."""
    seen_share: float
    """Of all frames, those in which the tracked point is labelled and inside the picture."""


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """Everything but pictures."""

    root: str
    format: str
    episodes: int
    frames: int
    fps: tuple[float, ...]
    instructions: dict[str, int]
    """Instruction -> episodes."""
    views: tuple[View, ...]
    points_share: float
    """Of all frames, those whose point is known in space."""
    gripper_share: float
    rotation_share: float
    windows: dict[str, int]
    """`train` and `validation` -> windows under the settings."""
    too_short: tuple[str, ...]
    """Episodes that are shorter than a window."""
    damaged: tuple[LeftOut, ...]
    """Episodes that cannot be read; the numbers above are without them."""

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and numbers."""
        return asdict(self)

    @property
    def missing(self) -> tuple[str, ...]:
        """A sentence for each thing that some training would want and that is not there."""
        found = [f"{view.name}: the point is never seen" for view in self.views if view.seen_share == 0]
        if self.points_share == 0:
            found.append("no point in space: peaks can be learned, a path in metres cannot be measured")
        elif self.points_share < 1:
            found.append(f"the point is unknown in {1 - self.points_share:.1%} of the frames; their heatmaps are left out of the loss")
        if self.gripper_share == 0:
            found.append("no gripper opening: set model.action_head=none")
        if self.rotation_share == 0:
            found.append("no orientation of the hand: model.action_head=gripper_rotation has nothing to learn from")
        if self.too_short:
            found.append(f"{len(self.too_short)} episodes are shorter than a window and left out, {self.too_short[0]} among them")
        if self.damaged:
            found.append(f"{len(self.damaged)} episodes are damaged; training stops at them, or goes without with data.on_corrupt=skip")
        return tuple(found)

    def render(self) -> Table:
        """A rich table of the views, for `Console.print`."""
        table = Table(title=f"{self.root}: {self.format}, {self.episodes} episodes, {self.frames} frames per view", title_justify="left")
        for column in ("view", "size, px", "camera", "point seen"):
            table.add_column(column, justify="left" if column in ("view", "camera") else "right")
        for view in self.views:
            table.add_row(view.name, f"{view.width_px} x {view.height_px}", view.kind, f"{view.seen_share:.1%}")
        return table

    def lines(self) -> list[str]:
        """The rest, a line each."""
        rates = ", ".join(f"{fps:g}" for fps in self.fps)
        windows = ", ".join(f"{count} {split}" for split, count in self.windows.items())
        said = [f"{count:4d}  {instruction}" for instruction, count in list(self.instructions.items())[:10]]
        more = [f"      and {len(self.instructions) - 10} more instructions"] if len(self.instructions) > 10 else []
        lines = [f"frames per second: {rates}", f"windows: {windows}", "episodes by instruction:", *said, *more]
        lines.append(f"gripper known in {self.gripper_share:.0%} of the frames, turns of the hand in {self.rotation_share:.0%}")
        lines += [f"missing: {sentence}" for sentence in self.missing]
        return lines + [f"damaged: {episode.name}: {episode.reason}" for episode in self.damaged]


def inspect(config: Config) -> tuple[DatasetReport, list[WindowDataset]]:
    """(report, windows of both splits; an empty split is left out) of `config.data`.

    Damaged episodes are told and left out. Raises `MvwanError` when the dataset cannot be read or the settings do not fit it.
    """
    data = config.data
    kind = ", ".join(dict.fromkeys(map(format_of, roots_of(data.root))))
    episodes = episodes_of(replace(data, on_corrupt="skip"))
    cameras = episodes[0].cameras
    splits = {split: WindowDataset(episodes, data, len(cameras), split, config.seed) for split in ("train", "validation")}
    turns = [episode.extra.get("hand_quaternion_wxyz", np.full((episode.num_frames, 4), np.nan)) for episode in episodes]
    report = DatasetReport(
        root=" and ".join(roots_of(data.root)),
        format=kind,
        episodes=len(episodes),
        frames=sum(episode.num_frames for episode in episodes),
        fps=tuple(sorted({float(episode.fps) for episode in episodes})),
        instructions=dict(Counter(episode.instruction for episode in episodes).most_common()),
        views=tuple(_view(episodes, camera) for camera in cameras),
        points_share=_share(np.isfinite(episode.point_m).all(axis=1) for episode in episodes),
        gripper_share=_share(np.isfinite(episode.gripper_open) for episode in episodes),
        rotation_share=_share(np.isfinite(turn).all(axis=1) for turn in turns),
        windows={split: len(windows) for split, windows in splits.items()},
        too_short=tuple(name for windows in splits.values() for name in windows.skipped),
        damaged=episodes.left_out,
    )
    return report, [windows for windows in splits.values() if len(windows)]


@dataclass(frozen=True, kw_only=True)
class DamagedFrame:
    """A picture that cannot be decoded, in one view or more."""

    episode: str
    frame: int
    reason: str


def check_pictures(config: Config, progress: bool = True) -> list[DamagedFrame]:
    """The frames that cannot be decoded, after decoding every picture of every episode of `config.data` that can be read."""
    episodes = episodes_of(replace(config.data, on_corrupt="skip"))
    found: list[DamagedFrame] = []
    with tqdm(total=sum(episode.num_frames for episode in episodes), desc="decode", unit="frame", disable=not progress) as bar:
        for episode in episodes:
            for start in range(0, episode.num_frames, READ_TOGETHER):
                frames = range(start, min(start + READ_TOGETHER, episode.num_frames))
                found += _damaged_of(episode, frames)
                bar.update(len(frames))
    return found


def _damaged_of(episode: Episode, frames: Sequence[int]) -> Iterator[DamagedFrame]:
    """Those of `frames` that cannot be decoded: read together, and one by one when that fails."""
    try:
        episode.read_rgb(frames)
    except MvwanError as error:
        if len(frames) == 1:
            yield DamagedFrame(episode=episode.name, frame=frames[0], reason=str(error))
        else:
            for frame in frames:
                yield from _damaged_of(episode, [frame])


def _share(flags: Any) -> float:
    """Of true values, over arrays of them."""
    return float(np.concatenate(list(flags)).mean())


def _view(episodes: Sequence[Episode], camera: Camera) -> View:
    """The view of the camera of that name, which may be another one of each episode's."""
    seen = []
    for episode in episodes:
        place = [own.name for own in episode.cameras].index(camera.name)
        own = episode.cameras[place]
        if episode.uv_px is None:
            seen.append(own.inside(*own.project(episode.point_m)))
        else:
            seen.append(np.isfinite(episode.uv_px[place]).all(axis=1))
    kind = camera.kind if episodes[0].uv_px is None else "not calibrated"
    return View(name=camera.name, width_px=camera.width_px, height_px=camera.height_px, kind=kind, seen_share=_share(seen))


def contact_sheet(splits: Sequence[WindowDataset]) -> np.ndarray:
    """[H W 3] uint8: windows of up to four episodes, spread over the dataset, a row per view, heatmaps laid over the pictures."""
    windows = splits[0]
    first_of = {window.episode.name: index for index, window in reversed(list(enumerate(windows.windows)))}
    starts = sorted(first_of.values())
    chosen = [starts[round(place)] for place in np.linspace(0, len(starts) - 1, min(_SHOWN, len(starts)))]
    return sheet(windows, [index * windows.num_variants for index in chosen])
