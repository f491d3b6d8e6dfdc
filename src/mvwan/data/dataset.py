"""Windows over episodes -> `Sample`: what is in a window, in which order windows come, and which episodes are held out.

All three are pure functions of the seed and of names, so that a run can be resumed by arithmetic. Knows no model, no latents and
no file format: `read_episodes` only finds out which reader a folder needs.
"""

import copy
import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mvwan.actions import rotation_from_first
from mvwan.batch import Episode, Sample
from mvwan.cameras import Camera
from mvwan.config import DataConfig, TrailConfig
from mvwan.data.left_out import LeftOut
from mvwan.data.lerobot import read_lerobot
from mvwan.data.mvtrack import is_mvtrack, read_mvtrack
from mvwan.data.rlbench import is_rlbench, read_rlbench
from mvwan.data.trail import CloudFiles, is_trail, read_trail
from mvwan.data.transforms import crop_and_resize, cropped_cameras, draw_augmentation, move, resize, whole_pictures
from mvwan.data.windows import READ_TOGETHER, ReadAhead, Window, Windows, span_of
from mvwan.errors import MvwanError, nearest
from mvwan.files import sha256_json
from mvwan.heatmaps import colour, render

_PIXEL_VERSION = 1
"""Raised whenever the code changes the pixels of a sample, so that cached latents of the old ones are not taken for the new."""


Root = str | Path | Sequence[str]
"""A dataset's folder, or those of several that are one training set."""


def roots_of(root: Root) -> tuple[str, ...]:
    """The folders."""
    return (str(root),) if isinstance(root, (str, Path)) else tuple(root)


class Episodes(tuple[Episode, ...]):
    """The episodes of a training set that can be read."""

    left_out: tuple[LeftOut, ...] = ()
    """The others."""


def read_episodes(
    root: Root,
    cameras: Sequence[str] | None = None,
    trail: TrailConfig | None = None,
    on_corrupt: Literal["stop", "skip"] = "stop",
) -> Episodes:
    """The episodes in the folder `root`, seen by `cameras` (None: all); `trail` says how clouds become pictures.

    Of several folders each episode is named `<folder>/<its own name>`. `on_corrupt` as in `DataConfig`. `MvwanError` when a folder is
    missing or holds no known dataset, and when none of its episodes can be read.
    """
    left_out: list[LeftOut] | None = [] if on_corrupt == "skip" else None
    found = Episodes(_read_folders(roots_of(root), cameras, trail, left_out))
    if left_out and not found:
        raise MvwanError(f"data.on_corrupt=skip: all {len(left_out)} episodes are damaged. The first: {left_out[0].reason}")
    found.left_out = tuple(left_out or ())
    return found


def episodes_of(data: DataConfig, root: Root | None = None) -> Episodes:
    """The episodes that a run with these settings sees, of its own dataset or of the one at `root`. Errors as of `read_episodes`."""
    return read_episodes(data.root if root is None else root, data.cameras, data.trail, data.on_corrupt)


def _read_folders(
    roots: Sequence[str], cameras: Sequence[str] | None, trail: TrailConfig | None, left_out: list[LeftOut] | None
) -> Iterable[Episode]:
    if len(roots) == 1:
        return _read_folder(roots[0], cameras, trail, left_out)
    named = {Path(folder).name: folder for folder in roots}
    if len(named) < len(roots):
        raise MvwanError(f"data.root={list(roots)}: two folders have the same name, and so would their episodes. Rename one of them.")
    episodes = []
    for name, folder in named.items():
        own: list[LeftOut] | None = None if left_out is None else []
        episodes += [replace(episode, name=f"{name}/{episode.name}") for episode in _read_folder(folder, cameras, trail, own)]
        if left_out is not None:
            left_out += [replace(damaged, name=f"{name}/{damaged.name}") for damaged in own or ()]
    return episodes


def _read_folder(root: str, cameras: Sequence[str] | None, trail: TrailConfig | None, left_out: list[LeftOut] | None) -> Iterable[Episode]:
    folder, kind = Path(root), format_of(root)
    if kind == "LeRobot v3":
        return read_lerobot(folder, cameras, left_out)
    if kind == "trail":
        return read_trail(folder, trail or TrailConfig(), cameras, left_out)
    if kind == "RLBench":
        return read_rlbench(folder, cameras, left_out)
    return read_mvtrack(folder, cameras, left_out)


def format_of(root: str | Path) -> Literal["LeRobot v3", "trail", "RLBench", "MVTrack"]:
    """The format of the dataset in the folder `root`, by its layout. `MvwanError` when it is missing or holds no known dataset."""
    folder = Path(root)
    understood = (
        "mvwan reads LeRobot v3 datasets (a folder with meta/info.json; `mvwan record` makes one), trail (folders trail_<N>), RLBench "
        "(folders episode<N> with low_dim_obs.pkl) and MVTrack (folders <scene>/<scene>-<view>). Set data.root."
    )
    if not str(root) or not os.path.exists(folder):
        raise MvwanError(f"data.root={str(root)!r}: no such folder. {understood}")
    if not folder.is_dir():
        raise MvwanError(f"data.root={str(root)!r}: a file, not a folder. {understood}")
    if (folder / "meta" / "info.json").is_file():
        return "LeRobot v3"
    if is_trail(folder):
        return "trail"
    if is_rlbench(folder):
        return "RLBench"
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
    """The names of the episodes that are for validation: as their dataset itself says, else as `held_out` draws them."""
    open_to_draw = [episode.name for episode in episodes if episode.split is None]
    return held_out(open_to_draw, seed, share) | {episode.name for episode in episodes if episode.split == "validation"}


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
        self.view_names = _choose_cameras(episodes, data.cameras, num_views)
        chosen = _split(episodes, data.validation_share, split, seed)
        span = span_of(data)
        self.skipped = tuple(episode.name for episode in chosen if episode.num_frames + data.past_end < span)
        """Names of the split's episodes that are shorter than a window."""
        if chosen and len(self.skipped) == len(chosen):
            longest = max(episode.num_frames for episode in chosen)
            raise MvwanError(
                f"data.num_frames={data.num_frames} with data.frame_interval={data.frame_interval} spans {span} recorded frames; "
                f"the longest of {len(chosen)} {split} episodes has {longest}. "
                "Lower data.num_frames or data.frame_interval, raise data.past_end, or record longer episodes."
            )
        self.windows = Windows(chosen, data)

    def __len__(self) -> int:
        return len(self.windows)

    def sample_id(self, index: int, variant: int = 0) -> str:
        """The name of a sample: episode, first frame, variant."""
        return _sample_id(self.windows[index], variant)

    def cameras(self, index: int, variant: int = 0) -> tuple[Camera, ...]:
        """The cameras of `sample`, without reading its pictures."""
        cameras = _views(self.windows[index].episode, self.view_names)
        boxes = whole_pictures(cameras)
        if variant:
            drawn = draw_augmentation(self._rng(index, variant), self.data.augment, cameras)
            boxes = drawn.boxes_px
            if not isinstance(self.windows[index].episode.read_rgb, CloudFiles):
                cameras, _ = move(cameras, np.zeros((0, 3)), drawn.world_from_old_world)
        return cropped_cameras(cameras, boxes, self.data.height_px, self.data.width_px)

    def _rng(self, index: int, variant: int) -> np.random.Generator:
        name = self.sample_id(index, variant)
        return np.random.default_rng(list(hashlib.sha256(f"{self.seed}/{name}".encode()).digest()))

    def without(self, windows: Collection[int]) -> "WindowDataset":
        """The dataset with these windows left out and the others numbered anew."""
        if not windows:
            return self
        other, keep = copy.copy(self), np.ones(len(self), bool)
        keep[list(windows)] = False
        other.windows = self.windows.kept(keep)
        other.__dict__.pop("fingerprint", None)
        if "sample_fingerprints" in other.__dict__:
            other.sample_fingerprints = self.sample_fingerprints[np.repeat(keep, self.num_variants)]
        return other

    def sample(self, index: int, variant: int = 0) -> Sample:
        """Window `index` in pixels: plain for variant 0, else augmented by numbers drawn from the seed and the sample's name."""
        return self._sample(index, variant, self.windows[index].episode.read_rgb)

    def readable_sample(self, index: int, variant: int = 0) -> Sample | None:
        """The same, None where a picture cannot be decoded and `data.on_corrupt` says to go without."""
        try:
            return self.sample(index, variant)
        except MvwanError:
            if self.data.on_corrupt == "stop":
                raise
            return None

    def samples(self, items: Sequence[int]) -> Iterator[tuple[int, Sample | MvwanError]]:
        """Each of the ascending items (window * variants + variant) with its sample, or with the error that says why there is none.

        Pictures that windows of an episode share are decoded once; as many as a window has are in memory, and a run read ahead.
        """
        for number, group in groupby(items, key=lambda item: int(self.windows.episode_of[item // self.num_variants])):
            own = list(group)
            frames = (frame for item in own for frame in self.windows[item // self.num_variants].frames)
            read = ReadAhead(self.windows.episodes[number].read_rgb, frames)
            for item in own:
                try:
                    yield item, self._sample(*divmod(item, self.num_variants), read)
                except MvwanError as error:
                    yield item, error

    def _sample(self, index: int, variant: int, read: Callable[[Sequence[int]], np.ndarray]) -> Sample:
        """The sample; `read` gives the pictures as they were recorded."""
        assert 0 <= variant < self.num_variants, f"variant {variant} of {self.num_variants}"
        window, name = self.windows[index], self.sample_id(index, variant)
        frames, cameras = list(window.frames), _views(window.episode, self.view_names)
        point_m, size = window.episode.point_m[frames], (self.data.height_px, self.data.width_px)
        if variant:
            drawn = draw_augmentation(rng := self._rng(index, variant), self.data.augment, cameras)
            if isinstance(window.episode.read_rgb, CloudFiles):  # the cameras stay, the scene moves
                moved = window.episode.read_rgb.about_its_middle(drawn.world_from_old_world)
                noise = {"noise": rng, "noise_size": self.data.augment.colour_noise}
                rgb = self._chosen(window.episode, window.episode.read_rgb(frames, moved=moved, **noise), cameras)
                point_m = point_m @ moved[:3, :3].T + moved[:3, 3]
            else:
                rgb = self._chosen(window.episode, read(frames), cameras)
                cameras, point_m = move(cameras, point_m, drawn.world_from_old_world)
            rgb, cameras = crop_and_resize(rgb, cameras, drawn.boxes_px, *size)
        else:
            rgb, cameras = resize(self._chosen(window.episode, read(frames), cameras), cameras, *size)
        (gripper_open, rotation_deg), (uv_px, visible) = self.actions(index), self._places(window, cameras, point_m)
        return Sample(
            sample_id=name,
            instruction=window.episode.instruction,
            cameras=cameras,
            rgb=rgb,
            uv_px=uv_px,
            visible=visible,
            point_m=point_m,
            gripper_open=gripper_open,
            rotation_deg=rotation_deg,
        ).check()

    def places(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(uv_px [V F 2], visible [V F]) of plain window `index` as in `Sample`. Reads no picture."""
        window = self.windows[index]
        return self._places(window, self.cameras(index), window.episode.point_m[list(window.frames)])

    def _places(self, window: Window, cameras: Sequence[Camera], point_m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seen = [camera.project(point_m) for camera in cameras] if window.episode.uv_px is None else self._labelled(window, cameras)
        inside = [camera.inside(*one) for camera, one in zip(cameras, seen, strict=True)]
        return np.stack([uv_px for uv_px, _ in seen]).astype(np.float32), np.stack(inside)

    def _labelled(self, window: Window, cameras: Sequence[Camera]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per view (uv_px [F 2] in the pictures of `cameras`, a depth [F] of 1 where it is labelled) of an episode labelled in pictures."""
        episode, found = window.episode, []
        assert episode.uv_px is not None
        for old, new in zip(_views(episode, self.view_names), cameras, strict=True):
            place = [camera.name for camera in episode.cameras].index(old.name)
            uv_px = np.concatenate([episode.uv_px[place, list(window.frames)], np.ones((len(window.frames), 1))], axis=1)
            uv_px = uv_px @ (new.intrinsics @ np.linalg.inv(old.intrinsics)).T  # how crops and resizes changed it
            found.append((uv_px[:, :2], np.where(np.isfinite(uv_px[:, 0]), 1.0, np.nan)))
        return found

    def actions(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(gripper_open [F], rotation_deg [F 3]) float32 of window `index` as in `Sample`: the same in all variants. Reads no picture."""
        window: Window = self.windows[index]
        episode, frames = window.episode, list(window.frames)
        turns, unknown = episode.extra.get("hand_quaternion_wxyz"), np.full((len(frames), 3), np.nan, np.float32)
        return episode.gripper_open[frames].astype(np.float32), unknown if turns is None else rotation_from_first(turns[frames])

    def check_actions(self, action_head: str) -> None:
        """Nothing, or `MvwanError` when no window has the labels that `model.action_head` learns from, or an opening is not in 0..1."""
        if action_head == "none":
            return
        for episode in self.windows.used_episodes():
            outside = episode.gripper_open[(episode.gripper_open < 0) | (episode.gripper_open > 1)]
            if len(outside):
                raise MvwanError(
                    f"model.action_head={action_head}: episode {episode.name} has gripper_open={outside[0]:g}, needs 0 (closed) to 1 "
                    "(open). Rescale it in the dataset, or set model.action_head=none."
                )

        def known(kind: int) -> bool:
            return any(np.isfinite(self.actions(index)[kind][1:]).any() for index in range(len(self)))

        if not known(0):
            raise MvwanError(
                f"model.action_head={action_head}: no window of the dataset says how far the gripper is open (gripper_open in "
                "observation.state). Record it, or set model.action_head=none."
            )
        if action_head == "gripper_rotation" and not known(1):
            raise MvwanError(
                "model.action_head=gripper_rotation: no window of the dataset says how the hand is turned (hand_quaternion_wxyz of its "
                "episodes; hand_qw, hand_qx, hand_qy, hand_qz in observation.state). Record it, or set model.action_head=gripper."
            )

    def check_calibrated(self, view_code: str) -> None:
        """Nothing, or `MvwanError` when `model.view_code` needs cameras and an episode does not say where its own stood."""
        unknown = [episode.name for episode in self.windows.used_episodes() if episode.uv_px is not None]
        if view_code != "slot" and unknown:
            raise MvwanError(
                f"model.view_code={view_code}: episode {unknown[0]} is labelled in pictures of cameras that nobody calibrated, so there "
                "are no rays in space. Set model.view_code=slot, or train on calibrated data."
            )

    def pictures_at(self, indices: Sequence[int], place: int) -> Iterator[np.ndarray | None]:
        """The plain picture number `place` of each of the windows, [V H W 3] uint8; neighbours of one episode are read together.

        None for one that cannot be decoded where `data.on_corrupt` says to go without.
        """
        for start in range(0, len(indices), READ_TOGETHER):
            windows: list[Window] = [self.windows[index] for index in indices[start : start + READ_TOGETHER]]
            for _, group in groupby(windows, key=lambda window: window.episode.name):
                same = list(group)
                frames = [window.frames[place] for window in same]
                try:
                    yield from self._plain(same[0].episode, frames)
                except MvwanError:
                    if self.data.on_corrupt == "stop":
                        raise
                    yield from (self._plain_or_none(same[0].episode, frame) for frame in frames)

    def _plain(self, episode: Episode, frames: Sequence[int]) -> np.ndarray:
        """[F V H W 3] uint8."""
        cameras = _views(episode, self.view_names)
        rgb = self._chosen(episode, episode.read_rgb(frames), cameras)
        return resize(rgb, cameras, self.data.height_px, self.data.width_px)[0].swapaxes(0, 1)

    def _plain_or_none(self, episode: Episode, frame: int) -> np.ndarray | None:
        try:
            return self._plain(episode, [frame])[0]
        except MvwanError:
            return None

    def _chosen(self, episode: Episode, rgb: np.ndarray, cameras: Sequence[Camera]) -> np.ndarray:
        """[V F H W 3] uint8 of the chosen views out of all of the episode's, checked against the size that the cameras state."""
        order_of_episode = [camera.name for camera in episode.cameras]
        rgb = rgb[[order_of_episode.index(name) for name in self.view_names]]
        for camera in cameras:
            needed = (len(cameras), rgb.shape[1], camera.height_px, camera.width_px, 3)
            if rgb.shape != needed or rgb.dtype != np.uint8:
                raise MvwanError(
                    f"episode {episode.name}: pictures are {rgb.shape} {rgb.dtype}, camera {camera.name} needs {needed} uint8. "
                    "All views of a dataset must have the size that its cameras state."
                )
        return rgb

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits that change with whatever the pixels and labels of any sample depend on."""
        total = hashlib.sha256()  # the hash of the list of all as JSON, without such a list in memory
        for item, name in enumerate(self.sample_fingerprints):
            total.update(f'{"," if item else "["}"{name.tobytes().hex()}"'.encode())
        total.update(b"]" if len(self) else b"[]")
        return total.hexdigest()

    @cached_property
    def sample_fingerprints(self) -> np.ndarray:
        """[N * variants, 32] uint8: the bytes of `sample_fingerprint` of every item."""
        items = (divmod(item, self.num_variants) for item in range(len(self) * self.num_variants))
        return np.frombuffer(b"".join(bytes.fromhex(self.sample_fingerprint(*item)) for item in items), np.uint8).reshape(-1, 32)

    def sample_fingerprint(self, index: int, variant: int = 0) -> str:
        """64 hex digits that change with whatever the pixels and labels of this sample depend on, and with nothing else.

        Growing the dataset, another stride or split, and (for variant 0) another seed or augmentation leave it as it is.
        """
        window = self.windows[index]
        return sha256_json(
            {
                "version": _PIXEL_VERSION,
                "sample_id": _sample_id(window, variant),
                "episode": self._episode_fingerprints[window.episode.name],
                "frames": list(window.frames),
                "size_px": [self.data.height_px, self.data.width_px],
                "augment": self._augmentation if variant else None,
            }
        )

    @cached_property
    def _augmentation(self) -> dict[str, Any]:
        return {"seed": self.seed, **{key: value for key, value in asdict(self.data.augment).items() if key != "variants"}}

    @cached_property
    def _episode_fingerprints(self) -> dict[str, str]:
        return {episode.name: _episode_fingerprint(episode, self.view_names) for episode in self.windows.used_episodes()}


def _sample_id(window: Window, variant: int) -> str:
    return f"{window.episode.name}@{window.frames[0]}#{variant}"


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
