"""RLBench and PerAct demonstrations: the only file that knows this format.

    <task>/variation<K>/episodes/episode<N>/         as RLBench records them
    <task>/all_variations/episodes/episode<N>/       as PerAct does
    <episode>/<camera>_rgb/0.png, 1.png, …           the pictures of a camera, one per frame
    <episode>/low_dim_obs.pkl                        an rlbench Demo of Observations: gripper_pose x y z qx qy qz qw in metres,
                                                     gripper_open, and in misc <camera>_camera_extrinsics [4 4] camera -> world,
                                                     <camera>_camera_intrinsics [3 3]
    variation_descriptions.pkl                       sentences, in the episode or beside `episodes`; may be missing

The root is a task, a folder of tasks, or any folder on the way to the episodes. RLBench's cameras look along z with x to the left and y
up, which it tells by negative focal lengths; ours have both turned round. Only a camera that stands still over the whole of all
episodes is a view. Depth and masks are not read. Pickles are read without running anything that they name.
"""

import os
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mvwan.batch import Episode
from mvwan.cameras import Camera
from mvwan.data.fields import AGAIN, array_in, shown
from mvwan.data.left_out import LeftOut, leaving_out
from mvwan.data.picture_files import PictureFiles, size_px_of
from mvwan.errors import MvwanError
from mvwan.files import sha256_json
from mvwan.pickles import Record, read_pickle

FPS = 20.0
"""RLBench's simulator makes a step, and its recorder a frame, every 50 ms."""
ORDER = ("front", "left_shoulder", "right_shoulder", "overhead")
"""The first views, where there are such cameras; the others follow by name."""
_DEMO, _OBSERVATION = ("rlbench.demo", "Demo"), ("rlbench.backend.observation", "Observation")
_LOW_DIM, _DESCRIPTIONS = "low_dim_obs.pkl", "variation_descriptions.pkl"
_EPISODE, _VARIATION = re.compile(r"episode\d{1,9}"), re.compile(r"all_variations|variation\d{1,9}")
_STILL = 1e-6


def is_rlbench(root: Path) -> bool:
    """Whether the folder holds recorded demonstrations of this format, at any of the levels of its tree."""
    return any((place.folder / _LOW_DIM).is_file() for place in _places(root))


def read_rlbench(root: str | Path, cameras: Sequence[str] | None = None, left_out: list[LeftOut] | None = None) -> list[Episode]:
    """The demonstrations in the order of tasks' names, variations and numbers; `cameras` None: all that stand still.

    Raises `MvwanError` naming the episode, and the frame, camera or file at fault; with a list `left_out`, such an episode is added to
    that instead. A camera that was asked for and moves is an error in any case.
    """
    demos: list[_Demo] = []
    for place in sorted(_places(Path(root)), key=lambda place: place.order):
        with leaving_out(place.name, left_out):
            demos.append(_Demo(place, cameras))
    moving = {name: (demo.name, frame) for demo in reversed(demos) for name, frame in demo.moving.items()}
    for name, (first, frame) in moving.items():
        if name in (cameras or ()):
            raise MvwanError(
                f"data.cameras: episode {first}: camera {name!r} moves (frame {frame}), and only what stands still can be a view. Leave it "
                "out of data.cameras."
            )
    episodes: list[Episode] = []
    for demo in demos:
        with leaving_out(demo.name, left_out):
            episodes.append(demo.episode(moving))
    return episodes


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a demonstration lies in the tree."""

    folder: Path
    task: str
    variation: str
    """The folder between the task and `episodes`, or nothing."""

    @property
    def order(self) -> tuple[str, int, int]:
        variation, number = (int(re.sub(r"\D", "", name) or -1) for name in (self.variation, self.folder.name))
        return self.task, variation, number

    @property
    def name(self) -> str:
        return "/".join((self.task, *([self.variation] if self.variation[-1:].isdigit() else []), self.folder.name))


def _places(root: Path) -> Iterator[_Place]:
    """Every folder episode<N> of the tree, in no order."""
    variations = [folder for task in (root, *_folders(root)) for folder in _folders(task) if _VARIATION.fullmatch(folder.name)]
    for folder in (root, root / "episodes", *(variation / "episodes" for variation in variations)):
        *_, above, parent, own = ("", "", *Path(os.path.abspath(folder)).parts)
        variation = parent if own == "episodes" and _VARIATION.fullmatch(parent) else ""
        task = above if variation else parent if own == "episodes" else own
        for episode in _folders(folder):
            if _EPISODE.fullmatch(episode.name):
                yield _Place(folder=episode, task=task, variation=variation)


def _folders(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []


class _Demo:
    """One demonstration: its numbers, read and checked, and the calibration of the cameras that may be views."""

    def __init__(self, place: _Place, asked: Sequence[str] | None) -> None:
        self._place, self.name = place, place.name
        self._observations = self._read()
        pose = np.stack([array_in(self._held(frame, "gripper_pose"), (7,), self._where(frame, "gripper_pose")) for frame in self._frames])
        self._pose = pose.astype(np.float64)
        if not np.isfinite(self._pose).all():
            frame = int(np.argmin(np.isfinite(self._pose).all(axis=1)))
            raise MvwanError(f"{self._where(frame, 'gripper_pose')}: NaN or infinity. {AGAIN}")
        self._open = np.array([self._gripper(frame) for frame in self._frames], np.float32)
        there = {folder.name.removesuffix("_rgb") for folder in _folders(place.folder) if folder.name.endswith("_rgb")}
        if not there:
            raise MvwanError(f"episode {self.name}: {place.folder} holds no folder <camera>_rgb. {AGAIN}")
        named = [name for name in there if asked is not None and name in asked] or there  # whoever asked is told which there are
        ranks = {name: rank for rank, name in enumerate(ORDER)}
        self._matrices = {name: self._calibration(name) for name in sorted(named, key=lambda name: (ranks.get(name, len(ORDER)), name))}
        self.moving = {name: frame for name in self._matrices if (frame := self._moves_at(name)) is not None}
        """Camera -> the first frame in which it is not what it was in frame 0."""

    def _read(self) -> list[Record]:
        path = self._place.folder / _LOW_DIM
        try:
            demo = read_pickle(path, (_DEMO, _OBSERVATION))
        except MvwanError as error:
            raise MvwanError(f"episode {self.name}: {error}. {AGAIN}") from None
        observations = demo.state.get("_observations") if isinstance(demo, Record) and demo.kind == ".".join(_DEMO) else None
        if not isinstance(observations, list) or not observations:
            raise MvwanError(f"episode {self.name}: {path} holds {shown(demo)}, needs a {'.'.join(_DEMO)} of observations. {AGAIN}")
        for frame, observation in enumerate(observations):
            if not isinstance(observation, Record) or observation.kind != ".".join(_OBSERVATION):
                raise MvwanError(f"{self._where(frame, path.name)}: holds {shown(observation)}, needs a {'.'.join(_OBSERVATION)}. {AGAIN}")
        return observations

    @property
    def _frames(self) -> range:
        return range(len(self._observations))

    def _where(self, frame: int, what: str) -> str:
        return f"episode {self.name}, frame {frame}: {what}"

    def _held(self, frame: int, attribute: str) -> Any:
        return self._observations[frame].state.get(attribute)

    def _gripper(self, frame: int) -> float:
        """0..1, NaN where it was not recorded."""
        value, where = self._held(frame, "gripper_open"), self._where(frame, "gripper_open")
        opening = np.nan if value is None else float(array_in(value, (), where, "iufb", "a number of 0 to 1"))
        if value is not None and not 0 <= opening <= 1:
            raise MvwanError(f"{where}: holds {opening:g}, needs a number of 0 (closed) to 1 (open). {AGAIN}")
        return opening

    def _calibration(self, camera: str) -> tuple[np.ndarray, np.ndarray]:
        """(intrinsics [F 3 3], extrinsics [F 4 4]) of a camera over the episode."""
        found: list[list[np.ndarray]] = []
        for frame in self._frames:
            misc, keys = self._held(frame, "misc"), {f"{camera}_camera_intrinsics": (3, 3), f"{camera}_camera_extrinsics": (4, 4)}
            known: Mapping[Any, Any] = misc if isinstance(misc, dict) else {}
            found.append([array_in(known.get(key), shape, self._where(frame, f"misc {key}")) for key, shape in keys.items()])
            if not all(np.isfinite(matrix).all() for matrix in found[-1]):
                raise MvwanError(f"{self._where(frame, f'camera {camera}')}: NaN or infinity in its calibration. {AGAIN}")
        intrinsics, extrinsics = (np.stack(matrices).astype(np.float64) for matrices in zip(*found, strict=True))
        return intrinsics, extrinsics

    def _moves_at(self, camera: str) -> int | None:
        changed = [(np.abs(matrices - matrices[0]) > _STILL).any(axis=(1, 2)) for matrices in self._matrices[camera]]
        moved = np.flatnonzero(np.any(changed, axis=0))
        return int(moved[0]) if len(moved) else None

    def episode(self, moving: Container[str]) -> Episode:
        """The demonstration seen by its cameras, those in `moving` left out."""
        still = [name for name in self._matrices if name not in moving]
        if not still:
            raise MvwanError(f"episode {self.name}: no camera stands still over all episodes ({', '.join(self._matrices)} move). {AGAIN}")
        paths = {name: self._pictures(name) for name in still}
        sizes = {name: size_px_of(found[0]) for name, found in paths.items()}
        height, width = next(iter(sizes.values()))
        stored = [[[path.name, path.stat().st_size] for path in found] for found in paths.values()]
        return Episode(
            name=self.name,
            instruction=self._instruction(),
            cameras=tuple(self._camera(name, *sizes[name]).resized(width, height) for name in still),
            fps=FPS,
            point_m=self._pose[:, :3],
            gripper_open=self._open,
            read_rgb=PictureFiles(name=self.name, paths=tuple(paths.values()), sizes_px=tuple(sizes.values())),
            extra={"hand_quaternion_wxyz": self._pose[:, [6, 3, 4, 5]]},
            fingerprint=sha256_json(stored),
        ).check()

    def _pictures(self, camera: str) -> tuple[Path, ...]:
        """A file per frame."""
        folder = self._place.folder / f"{camera}_rgb"
        numbered = {int(path.stem): path for path in folder.glob("*.png") if re.fullmatch(r"[0-9]{1,9}", path.stem)}
        for frame in (*self._frames, *numbered):
            if frame not in numbered or frame not in self._frames:
                said = "no such picture" if frame not in numbered else f"a picture beyond the {len(self._observations)} observations"
                raise MvwanError(f"{self._where(frame, str(folder / f'{frame}.png'))}: {said}. {AGAIN}")
        return tuple(numbered[frame] for frame in self._frames)

    def _camera(self, name: str, height_px: int, width_px: int) -> Camera:
        """The camera in our axes: x and y are turned round in both matrices together, so every point keeps its pixel."""
        intrinsics, extrinsics = (matrices[0] for matrices in self._matrices[name])
        turns = np.sign(np.diag(intrinsics)[:2])
        if turns[0] * turns[1] <= 0:
            raise MvwanError(
                f"episode {self.name}: camera {name} has focal lengths {intrinsics[0, 0]:g} and {intrinsics[1, 1]:g} px, needs two of one "
                f"sign. {AGAIN}"
            )
        rotation = extrinsics[:3, :3].T
        world_to_camera = np.block([[rotation, -rotation @ extrinsics[:3, 3:]], [extrinsics[3:]]])
        try:
            return Camera(
                name=name,
                width_px=width_px,
                height_px=height_px,
                intrinsics=intrinsics @ np.diag([*turns, 1]),
                world_to_camera=np.diag([*turns, 1, 1]) @ world_to_camera,
            )
        except MvwanError as error:
            raise MvwanError(f"episode {self.name}: {error}. {AGAIN}") from None

    def _instruction(self) -> str:
        """The first description of the variation, else the task's name in words."""
        folder = self._place.folder
        for path in (place / _DESCRIPTIONS for place in (folder, folder.parent, folder.parent.parent)):
            if path.is_file():
                said = read_pickle(path)
                if not isinstance(said, list) or not said or not isinstance(said[0], str) or not said[0].strip():
                    raise MvwanError(f"{path}: holds {shown(said)}, needs a list of sentences. {AGAIN}")
                return said[0].strip()
        return self._place.task.replace("_", " ")
