"""Windows over episodes -> `Sample`: what is in a window, in which order windows come, and which episodes are held out.

All three are pure functions of the seed and of names, so that a run can be resumed by arithmetic. Knows no model, no latents and
no file format: `read_episodes` only finds out which reader a folder needs.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mvwan.actions import rotation_from_first
from mvwan.batch import Episode, Sample
from mvwan.cameras import Camera
from mvwan.config import DataConfig, TrailConfig
from mvwan.data.lerobot import read_lerobot
from mvwan.data.mvtrack import is_mvtrack, read_mvtrack
from mvwan.data.trail import CloudFiles, is_trail, read_trail
from mvwan.data.transforms import crop_and_resize, draw_augmentation, move, resize
from mvwan.errors import MvwanError, nearest
from mvwan.files import sha256_json
from mvwan.heatmaps import colour, render

_PIXEL_VERSION = 1
"""Raised whenever the code changes the pixels of a sample, so that cached latents of the old ones are not taken for the new."""
_READ_TOGETHER = 32
"""Pictures that are in memory at recorded size at the same time."""


def read_episodes(root: str | Path, cameras: Sequence[str] | None = None, trail: TrailConfig | None = None) -> tuple[Episode, ...]:
    """The episodes in the folder `root`, seen by `cameras` (None: all); `trail` says how clouds become pictures.

    `MvwanError` when the folder is missing or holds no known dataset.
    """
    folder, kind = Path(root), format_of(root)
    if kind == "LeRobot v3":
        return tuple(read_lerobot(folder, cameras))
    if kind == "trail":
        return tuple(read_trail(folder, trail or TrailConfig(), cameras))
    return tuple(read_mvtrack(folder, cameras))


def format_of(root: str | Path) -> Literal["LeRobot v3", "trail", "MVTrack"]:
    """The format of the dataset in the folder `root`, by its layout. `MvwanError` when it is missing or holds no known dataset."""
    folder = Path(root)
    understood = (
        "mvwan reads LeRobot v3 datasets (a folder with meta/info.json; `mvwan record` makes one), trail (folders trail_<N>) and MVTrack "
        "(folders <scene>/<scene>-<view>). Set data.root."
    )
    if not str(root) or not os.path.exists(folder):
        raise MvwanError(f"data.root={str(root)!r}: no such folder. {understood}")
    if not folder.is_dir():
        raise MvwanError(f"data.root={str(root)!r}: a file, not a folder. {understood}")
    if (folder / "meta" / "info.json").is_file():
        return "LeRobot v3"
    if is_trail(folder):
        return "trail"
    if is_mvtrack(folder):
        return "MVTrack"
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
    raise MvwanError(f"data.root={str(root)!r}: no dataset that mvwan understands (found {found}). {understood}")


def held_out(names: Iterable[str], seed: int, share: float) -> frozenset[str]:
    """The episode names kept for validation: `share` of them, rounded; at least one of two or more, and never all, unless share is 0 or 1.

    A name's rank depends on the seed and on itself alone: adding episodes moves as few of the others as possible.
    """
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).hexdigest())
    count = round(share * len(ranked))
    if 0 < share < 1:
        count = min(max(count, 1), len(ranked) - 1)
    return frozenset(ranked[:count])


def kept_out(episodes: Sequence[Episode], seed: int, share: float) -> frozenset[str]:
    """The names of the episodes that are for validation: as the dataset itself says, else as `held_out` draws them."""
    decided = {episode.name: episode.split for episode in episodes if episode.split is not None}
    if decided:
        return frozenset(name for name, split in decided.items() if split == "validation")
    return held_out([episode.name for episode in episodes], seed, share)


def order(seed: int, epoch: int, num_items: int) -> np.ndarray:
    """[num_items] int64: the order in which an epoch visits its items, a permutation drawn from (seed, epoch)."""
    return np.random.default_rng((seed, epoch)).permutation(num_items)


def global_indices(seed: int, step: int, items_per_step: int, num_items: int) -> np.ndarray:
    """[items_per_step] int64: the items of optimizer step `step`, counted from 0.

    Steps take the epochs' orders one after another without a gap, so a step may hold the end of one epoch and the start of the next.
    """
    assert min(num_items, items_per_step) > 0, f"global_indices: {items_per_step} of {num_items} items"
    epochs, places = np.divmod(np.arange(step * items_per_step, (step + 1) * items_per_step), num_items)
    orders = {epoch: order(seed, epoch, num_items) for epoch in np.unique(epochs).tolist()}
    return np.array([orders[epoch][place] for epoch, place in zip(epochs.tolist(), places.tolist(), strict=True)], np.int64)


def heat_video(sample: Sample, sigma_px: float) -> np.ndarray:
    """[V F H W 3] uint8: the sample's heatmaps in JET colours, plain background where the point is not visible."""
    height_px, width_px = sample.rgb.shape[2:4]
    return colour(render(sample.uv_px, sample.visible, height_px, width_px, sigma_px))


@dataclass(frozen=True, kw_only=True)
class Window:
    """Where a sample lies in the recording."""

    episode: Episode
    frames: tuple[int, ...]
    """Recorded frames of its pictures; the last one of the episode again and again where the window runs past its end."""
    interval: int
    """Recorded frames from one picture to the next."""


class WindowDataset:
    """The windows of one split, in the order of episode names and time.

    Windows start every `data.window_stride` frames, and the last one ends with the episode, or `data.past_end` frames later: all
    stands still then. Episodes too short for a window are left out and named in `.skipped`. Raises `MvwanError` when no window is
    left (a split without episodes is empty only for validation), when the cameras do not fit, or when two episodes share a name.
    """

    def __init__(
        self, episodes: Sequence[Episode], data: DataConfig, num_views: int, split: Literal["train", "validation"], seed: int
    ) -> None:
        self.data = data
        self.seed = seed
        self.num_variants = 1 + data.augment.variants if split == "train" else 1
        """Variants that `sample` offers of each window: the plain one and, in training, the augmented ones."""
        self._camera_names = _choose_cameras(episodes, data.cameras, num_views)
        chosen = _split(episodes, data.validation_share, split, seed)
        span = (data.num_frames - 1) * data.frame_interval + 1
        self.skipped = tuple(episode.name for episode in chosen if episode.num_frames + data.past_end < span)
        """Names of the split's episodes that are shorter than a window."""
        if chosen and len(self.skipped) == len(chosen):
            longest = max(episode.num_frames for episode in chosen)
            raise MvwanError(
                f"data.num_frames={data.num_frames} with data.frame_interval={data.frame_interval} spans {span} recorded frames; "
                f"the longest of {len(chosen)} {split} episodes has {longest}. "
                "Lower data.num_frames or data.frame_interval, raise data.past_end, or record longer episodes."
            )
        self.windows = tuple(
            Window(
                episode=episode,
                frames=tuple(min(frame, episode.num_frames - 1) for frame in range(start, start + span, data.frame_interval)),
                interval=data.frame_interval,
            )
            for episode in chosen
            for start in _starts(episode.num_frames + min(data.past_end, span - 1), span, data.window_stride)
        )

    def __len__(self) -> int:
        return len(self.windows)

    def sample_id(self, index: int, variant: int = 0) -> str:
        """The name of a sample: episode, first frame, variant."""
        window = self.windows[index]
        return f"{window.episode.name}@{window.frames[0]}#{variant}"

    def sample(self, index: int, variant: int = 0) -> Sample:
        """Window `index` in pixels: plain for variant 0, else augmented by numbers drawn from the seed and the sample's name."""
        assert 0 <= variant < self.num_variants, f"variant {variant} of {self.num_variants}"
        window, name = self.windows[index], self.sample_id(index, variant)
        frames = list(window.frames)
        cameras = _views(window.episode, self._camera_names)
        point_m, size = window.episode.point_m[frames], (self.data.height_px, self.data.width_px)
        if variant:
            rng = np.random.default_rng(list(hashlib.sha256(f"{self.seed}/{name}".encode()).digest()))
            drawn = draw_augmentation(rng, self.data.augment, cameras)
            if isinstance(window.episode.read_rgb, CloudFiles):  # the cameras stay, the scene moves
                moved = window.episode.read_rgb.about_its_middle(drawn.world_from_old_world)
                rgb = self._read_rgb(window.episode, frames, cameras, moved=moved, noise=rng, noise_size=self.data.augment.colour_noise)
                point_m = point_m @ moved[:3, :3].T + moved[:3, 3]
            else:
                rgb = self._read_rgb(window.episode, frames, cameras)
                cameras, point_m = move(cameras, point_m, drawn.world_from_old_world)
            rgb, cameras = crop_and_resize(rgb, cameras, drawn.boxes_px, *size)
        else:
            rgb, cameras = resize(self._read_rgb(window.episode, frames, cameras), cameras, *size)
        gripper_open, rotation_deg = self.actions(index)
        projected = [camera.project(point_m) for camera in cameras]
        if window.episode.uv_px is not None:
            projected = self._labelled(window.episode, frames, cameras)
        return Sample(
            sample_id=name,
            instruction=window.episode.instruction,
            cameras=cameras,
            rgb=rgb,
            uv_px=np.stack([uv_px for uv_px, _ in projected]).astype(np.float32),
            visible=np.stack([camera.inside(*seen) for camera, seen in zip(cameras, projected, strict=True)]),
            point_m=point_m,
            gripper_open=gripper_open,
            rotation_deg=rotation_deg,
        ).check()

    def _labelled(self, episode: Episode, frames: Sequence[int], cameras: Sequence[Camera]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per view (uv_px [F 2] in the pictures of `cameras`, a depth [F] of 1 where it is labelled) of an episode labelled in pictures."""
        assert episode.uv_px is not None
        found = []
        for old, new in zip(_views(episode, self._camera_names), cameras, strict=True):
            place = [camera.name for camera in episode.cameras].index(old.name)
            uv_px = np.concatenate([episode.uv_px[place, list(frames)], np.ones((len(frames), 1))], axis=1)
            uv_px = uv_px @ (new.intrinsics @ np.linalg.inv(old.intrinsics)).T  # how crops and resizes changed it
            found.append((uv_px[:, :2], np.where(np.isfinite(uv_px[:, 0]), 1.0, np.nan)))
        return found

    def actions(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(gripper_open [F], rotation_deg [F 3]) float32 of window `index` as in `Sample`: the same in all variants. Reads no picture."""
        episode, frames = self.windows[index].episode, list(self.windows[index].frames)
        quaternion = episode.extra.get("hand_quaternion_wxyz", np.full((episode.num_frames, 4), np.nan))
        return episode.gripper_open[frames].astype(np.float32), rotation_from_first(quaternion[frames])

    def check_actions(self, action_head: str) -> None:
        """Nothing, or `MvwanError` when no window has the labels that `model.action_head` learns from, or an opening is not in 0..1."""
        if action_head == "none":
            return
        for episode in {window.episode.name: window.episode for window in self.windows}.values():
            outside = episode.gripper_open[(episode.gripper_open < 0) | (episode.gripper_open > 1)]
            if len(outside):
                raise MvwanError(
                    f"model.action_head={action_head}: episode {episode.name} has gripper_open={outside[0]:g}, needs 0 (closed) to 1 "
                    "(open). Rescale it in the dataset, or set model.action_head=none."
                )
        labels = zip(*(self.actions(index) for index in range(len(self))), strict=True)
        openings, turns = (any(np.isfinite(label[1:]).any() for label in kind) for kind in labels)
        if not openings:
            raise MvwanError(
                f"model.action_head={action_head}: no window of the dataset says how far the gripper is open (gripper_open in "
                "observation.state). Record it, or set model.action_head=none."
            )
        if action_head == "gripper_rotation" and not turns:
            raise MvwanError(
                "model.action_head=gripper_rotation: no window of the dataset says how the hand is turned (hand_quaternion_wxyz of its "
                "episodes; hand_qw, hand_qx, hand_qy, hand_qz in observation.state). Record it, or set model.action_head=gripper."
            )

    def pictures_at(self, indices: Sequence[int], place: int) -> Iterator[np.ndarray]:
        """The plain picture number `place` of each of the windows, [V H W 3] uint8; neighbours of one episode are read together."""
        for start in range(0, len(indices), _READ_TOGETHER):
            windows = [self.windows[index] for index in indices[start : start + _READ_TOGETHER]]
            for _, group in groupby(windows, key=lambda window: window.episode.name):
                same = list(group)
                frames = [window.frames[place] for window in same]
                cameras = _views(same[0].episode, self._camera_names)
                rgb = self._read_rgb(same[0].episode, frames, cameras)
                yield from resize(rgb, cameras, self.data.height_px, self.data.width_px)[0].swapaxes(0, 1)

    def _read_rgb(self, episode: Episode, frames: Sequence[int], cameras: Sequence[Camera], **changes: Any) -> np.ndarray:
        """[V F H W 3] uint8 of the chosen views, checked against the size that the cameras state. `changes` are those of `CloudFiles`."""
        order_of_episode = [camera.name for camera in episode.cameras]
        rgb = episode.read_rgb(frames, **changes)[[order_of_episode.index(name) for name in self._camera_names]]
        for camera in cameras:
            needed = (len(cameras), len(frames), camera.height_px, camera.width_px, 3)
            if rgb.shape != needed or rgb.dtype != np.uint8:
                raise MvwanError(
                    f"episode {episode.name}: pictures are {rgb.shape} {rgb.dtype}, camera {camera.name} needs {needed} uint8. "
                    "All views of a dataset must have the size that its cameras state."
                )
        return rgb

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits that change with whatever the pixels and labels of any sample depend on."""
        return sha256_json([self.sample_fingerprint(index, variant) for index in range(len(self)) for variant in range(self.num_variants)])

    def sample_fingerprint(self, index: int, variant: int = 0) -> str:
        """64 hex digits that change with whatever the pixels and labels of this sample depend on, and with nothing else.

        Growing the dataset, another stride or split, and (for variant 0) another seed or augmentation leave it as it is.
        """
        window = self.windows[index]
        augment = {"seed": self.seed, **{key: value for key, value in asdict(self.data.augment).items() if key != "variants"}}
        return sha256_json(
            {
                "version": _PIXEL_VERSION,
                "sample_id": self.sample_id(index, variant),
                "episode": self._episode_fingerprints[window.episode.name],
                "frames": list(window.frames),
                "size_px": [self.data.height_px, self.data.width_px],
                "augment": augment if variant else None,
            }
        )

    @cached_property
    def _episode_fingerprints(self) -> dict[str, str]:
        episodes = {window.episode.name: window.episode for window in self.windows}
        return {name: _episode_fingerprint(episode, self._camera_names) for name, episode in episodes.items()}


def _episode_fingerprint(episode: Episode, camera_names: Sequence[str]) -> str:
    """64 hex digits over all of an episode that samples show. An episode without a fingerprint of its own has its pictures hashed."""
    pictures = episode.fingerprint
    if not pictures:
        digest = hashlib.sha256()
        for frame in range(episode.num_frames):
            digest.update(np.ascontiguousarray(episode.read_rgb([frame])).tobytes())
        pictures = digest.hexdigest()
    labels = hashlib.sha256()
    if episode.uv_px is not None:
        labels.update(np.ascontiguousarray(episode.uv_px).tobytes())
    turns = [episode.extra["hand_quaternion_wxyz"]] if "hand_quaternion_wxyz" in episode.extra else []
    for values in (episode.point_m, episode.gripper_open, *turns):
        labels.update(np.ascontiguousarray(values).tobytes())
    cameras = [camera.to_dict() for camera in _views(episode, camera_names)]
    return sha256_json([pictures, labels.hexdigest(), episode.instruction, cameras])


def _starts(num_frames: int, span: int, stride: int) -> list[int]:
    """First frames of the windows: every `stride`, and one whose last frame is the last of `num_frames`."""
    starts = list(range(0, num_frames - span + 1, stride))
    if starts and starts[-1] != num_frames - span:
        starts.append(num_frames - span)
    return starts


def _split(episodes: Sequence[Episode], share: float, split: str, seed: int) -> list[Episode]:
    """The episodes of one split by name. `MvwanError` when a name occurs twice or nothing is left to train on."""
    by_name = {episode.name: episode for episode in episodes}
    if len(by_name) < len(episodes):
        names = [episode.name for episode in episodes]
        twice = next(name for name in names if names.count(name) > 1)
        raise MvwanError(f"episode {twice!r} occurs twice: names must be unique in a dataset.")
    validation = kept_out(episodes, seed, share)
    chosen = [by_name[name] for name in sorted(by_name) if (name in validation) == (split == "validation")]
    if not chosen and split == "train":
        raise MvwanError(f"data.validation_share={share}: no episode of {len(episodes)} is left to train on. Lower data.validation_share.")
    return chosen


def _choose_cameras(episodes: Sequence[Episode], names: Sequence[str] | None, num_views: int) -> tuple[str, ...]:
    """The names of the views, in order. `MvwanError` with the names there are, when they do not fit `num_views` or an episode lacks one."""
    if not episodes:
        raise MvwanError("the dataset holds no episodes. Set data.root to a folder with demonstrations; `mvwan record` makes some.")
    available = [camera.name for camera in episodes[0].cameras]
    chosen = tuple(available if names is None else names)
    if len(set(chosen)) != len(chosen):
        raise MvwanError(f"data.cameras={list(chosen)}: a camera is named twice. Available: {', '.join(available)}. Set data.cameras.")
    for episode in episodes:
        have = [camera.name for camera in episode.cameras]
        for name in chosen:
            if name not in have:
                raise MvwanError(
                    f"data.cameras: episode {episode.name} has no camera {name!r}; available: {', '.join(have)}."
                    f"{nearest(name, have)} Set data.cameras."
                )
    if len(chosen) != num_views:
        raise MvwanError(
            f"model.views={num_views}, but {len(chosen)} cameras are chosen ({', '.join(chosen)}); available: {', '.join(available)}. "
            "Name as many in data.cameras, or set model.views."
        )
    return chosen


def _views(episode: Episode, names: Sequence[str]) -> tuple[Camera, ...]:
    cameras = {camera.name: camera for camera in episode.cameras}
    return tuple(cameras[name] for name in names)
