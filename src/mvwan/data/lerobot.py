"""LeRobot v3 datasets on disk, written and read: the only file that knows this format.

    meta/info.json                                    features, fps, totals, path templates
    meta/stats.json                                   min, max, mean, std, count and quantiles of every feature
    meta/tasks.parquet                                instruction -> task_index
    meta/cameras.json                                 calibration of every camera (ours; `cameras.Camera` to the bit)
    meta/episodes/chunk-000/file-000.parquet          one row per episode: length, places in the files below, statistics
    data/chunk-000/file-000.parquet                   one row per frame
    videos/observation.images.<camera>/chunk-000/file-000.mp4   many episodes one after the other

Compatible with the package lerobot 0.4 (`codebase_version` v3.0). The state is the tool point and the hand in metres and the
measured gripper opening, found by the names of `observation.state`; the hand's orientation stands there as well where it is known. Knows
no simulator.
"""

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mvwan.batch import Episode
from mvwan.cameras import Camera
from mvwan.data.episode import (
    PIXEL_FORMAT,
    VIDEO_CODEC,
    VideoFrames,
    count_frames,
    summarise,
    summarise_pictures,
)
from mvwan.data.fields import AGAIN, get, inside, numbers, read_table, rows_of
from mvwan.data.left_out import LeftOut, leaving_out
from mvwan.data.lerobot_files import (
    DATA_FILE_MB,
    DATA_PATH,
    EPISODES_PATH,
    FILES_PER_CHUNK,
    VIDEO_FILE_MB,
    VIDEO_PATH,
    RowFile,
    VideoTrack,
    video_key,
)
from mvwan.errors import MvwanError, nearest
from mvwan.files import read_json, sha256_file, sha256_json, whole_directory, write_file, write_json

CODEBASE_VERSION = "v3.0"
POINT_NAMES = ("tool_x_m", "tool_y_m", "tool_z_m")
HAND_NAMES = ("hand_x_m", "hand_y_m", "hand_z_m")
GRIPPER_NAME = "gripper_open"
QUATERNION_NAMES = ("hand_qw", "hand_qx", "hand_qy", "hand_qz")
_STATE, _ACTION, _SUCCESS = "observation.state", "action", "next.success"
_INFO, _CAMERAS = "meta/info.json", "meta/cameras.json"
_MOST_FPS = 1000
_INDEX_FEATURES = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64", "task_index": "int64"}


@contextmanager
def write_dataset(
    root: str | Path,
    *,
    cameras: Sequence[Camera],
    fps: int,
    action_names: Sequence[str],
    robot_type: str,
    with_quaternion: bool = False,
) -> Iterator["LeRobotWriter"]:
    """A writer to add episodes to, `with_quaternion` with the hand's orientation in the state.

    The folder appears, whole, when the block ends well, and not at all otherwise.

    Raises `MvwanError` when `root` holds something already, or when no episode was added.
    """
    root = Path(root)
    if root.is_dir() and not any(root.iterdir()):
        root.rmdir()
    if root.exists():
        raise MvwanError(f"{root}: exists already and is not an empty folder. Remove it or choose another output folder.")
    with whole_directory(root) as folder:
        writer = LeRobotWriter(folder, cameras, fps, action_names, robot_type, with_quaternion)
        try:
            yield writer
        finally:
            writer.close_files()
        if not writer.num_episodes:
            raise MvwanError(f"{root}: no episode was added, nothing is written")
        writer.write_meta()


class LeRobotWriter:
    """A dataset under construction: made by `write_dataset`, which also ends it."""

    def __init__(
        self,
        folder: Path,
        cameras: Sequence[Camera],
        fps: int,
        action_names: Sequence[str],
        robot_type: str,
        with_quaternion: bool = False,
    ) -> None:
        self._folder, self._fps, self._robot_type, self._with_quaternion = folder, fps, robot_type, with_quaternion
        self._cameras = tuple(cameras)
        self._features = _features(cameras, fps, action_names, with_quaternion)
        self._calibration = _calibration_columns(cameras)
        self._tracks = [VideoTrack(folder, camera, fps) for camera in cameras]
        self._rows = RowFile(folder, self._features)
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._columns: list[dict[str, np.ndarray]] = []
        self._num_frames = 0

    @property
    def num_episodes(self) -> int:
        """Episodes added so far."""
        return len(self._episodes)

    def add_episode(
        self,
        *,
        name: str,
        instruction: str,
        layout_seed: int,
        rgb: np.ndarray,
        point_m: np.ndarray,
        hand_m: np.ndarray,
        gripper_open: np.ndarray,
        action: np.ndarray,
        success: np.ndarray,
        hand_quaternion_wxyz: np.ndarray | None = None,
    ) -> None:
        """Nothing; appends one episode of rgb [V F H W 3] uint8, point_m and hand_m [F 3], gripper_open [F], action [F A], success [F].

        hand_quaternion_wxyz [F 4] belongs to datasets made `with_quaternion` and to no others.
        """
        assert (hand_quaternion_wxyz is not None) == self._with_quaternion, f"episode {name}: with_quaternion={self._with_quaternion}"
        frames, index = len(point_m), len(self._episodes)
        assert rgb.shape[:2] == (len(self._cameras), max(frames, 1)), f"episode {name}: rgb is {rgb.shape} for {frames} frames"
        parts = [point_m, hand_m, np.reshape(gripper_open, (frames, 1))]
        state = np.concatenate([*parts, *([] if hand_quaternion_wxyz is None else [hand_quaternion_wxyz])], axis=1)
        task = self._tasks.setdefault(instruction, len(self._tasks))
        columns = {
            _STATE: state.astype(np.float32),
            _ACTION: action.astype(np.float32),
            _SUCCESS: success.astype(bool),
            **{key: np.repeat(value[None], frames, axis=0) for key, value in self._calibration.items()},
            "timestamp": (np.arange(frames) / self._fps).astype(np.float32),
            "frame_index": np.arange(frames, dtype=np.int64),
            "episode_index": np.full(frames, index, np.int64),
            "index": np.arange(self._num_frames, self._num_frames + frames, dtype=np.int64),
            "task_index": np.full(frames, task, np.int64),
        }
        row: dict[str, Any] = {"episode_index": index, "tasks": [instruction], "length": frames, "name": name, "layout_seed": layout_seed}
        row |= self._rows.add(columns)
        row |= {"dataset_from_index": self._num_frames, "dataset_to_index": self._num_frames + frames}
        statistics = {key: summarise(values) for key, values in columns.items()}
        for track, pictures in zip(self._tracks, rgb, strict=True):
            places, counts = track.add(pictures)
            row |= places
            statistics[track.key] = summarise_pictures(counts, frames)
        row |= {f"stats/{key}/{stat}": value for key, values in statistics.items() for stat, value in values.items()}
        self._episodes.append(row | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
        self._columns.append(columns)
        self._num_frames += frames

    def close_files(self) -> None:
        """Nothing; ends the videos and tables under construction."""
        for part in (*self._tracks, self._rows):
            part.close()

    def write_meta(self) -> None:
        """Nothing; writes the folder `meta`. Call it last."""
        totals = {key: summarise(np.concatenate([columns[key] for columns in self._columns])) for key in self._columns[0]}
        totals |= {track.key: summarise_pictures(track.counts, self._num_frames) for track in self._tracks}
        info = {
            "codebase_version": CODEBASE_VERSION,
            "robot_type": self._robot_type,
            "total_episodes": len(self._episodes),
            "total_frames": self._num_frames,
            "total_tasks": len(self._tasks),
            "chunks_size": FILES_PER_CHUNK,
            "data_files_size_in_mb": DATA_FILE_MB,
            "video_files_size_in_mb": VIDEO_FILE_MB,
            "fps": self._fps,
            "splits": {"train": f"0:{len(self._episodes)}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH,
            "features": self._features,
        }
        write_json(self._folder / _INFO, info)
        write_json(self._folder / "meta/stats.json", totals)
        write_json(self._folder / _CAMERAS, {"cameras": [camera.to_dict() for camera in self._cameras]})
        _write_table(self._folder / "meta/tasks.parquet", _tasks_table(self._tasks))
        _write_table(self._folder / EPISODES_PATH.format(chunk_index=0, file_index=0), pa.Table.from_pylist(self._episodes))


def _features(cameras: Sequence[Camera], fps: int, action_names: Sequence[str], with_quaternion: bool) -> dict[str, Any]:
    """The feature table of `meta/info.json`."""
    state_names = [*POINT_NAMES, *HAND_NAMES, GRIPPER_NAME, *(QUATERNION_NAMES if with_quaternion else ())]
    features: dict[str, Any] = {
        _STATE: {"dtype": "float32", "shape": [len(state_names)], "names": state_names},
        _ACTION: {"dtype": "float32", "shape": [len(action_names)], "names": list(action_names)},
        _SUCCESS: {"dtype": "bool", "shape": [1], "names": None},
    }
    for key, values in _calibration_columns(cameras).items():
        side = round(len(values) ** 0.5)
        features[key] = {"dtype": "float32", "shape": [len(values)], "names": [f"r{n // side}c{n % side}" for n in range(len(values))]}
    for camera in cameras:
        video = {"height": camera.height_px, "width": camera.width_px, "codec": VIDEO_CODEC, "pix_fmt": PIXEL_FORMAT, "is_depth_map": False}
        features[video_key(camera.name)] = {
            "dtype": "video",
            "shape": [camera.height_px, camera.width_px, 3],
            "names": ["height", "width", "channels"],
            "info": {f"video.{name}": value for name, value in video.items()} | {"video.fps": fps, "video.channels": 3, "has_audio": False},
        }
    return features | {key: {"dtype": dtype, "shape": [1], "names": None} for key, dtype in _INDEX_FEATURES.items()}


def _calibration_columns(cameras: Sequence[Camera]) -> dict[str, np.ndarray]:
    """Feature name -> the matrix row by row, for readers that do not know `meta/cameras.json`."""
    columns: dict[str, np.ndarray] = {}
    for camera in cameras:
        columns[f"camera.{camera.name}.intrinsics"] = camera.intrinsics.ravel().astype(np.float32)
        columns[f"camera.{camera.name}.world_to_camera"] = camera.world_to_camera.ravel().astype(np.float32)
    return columns


def _tasks_table(tasks: Mapping[str, int]) -> pa.Table:
    """`task_index` indexed by the instruction, with the note by which pandas finds the index again."""
    index = "__index_level_0__"
    text = {"name": None, "pandas_type": "unicode", "numpy_type": "object"}
    number = {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64", "metadata": None}
    note = {
        "index_columns": [index],
        "column_indexes": [text | {"field_name": None, "metadata": {"encoding": "UTF-8"}}],
        "columns": [number, text | {"field_name": index, "metadata": None}],
        "pandas_version": "2.2.0",
    }
    table = pa.table({"task_index": pa.array(list(tasks.values()), pa.int64()), index: pa.array(list(tasks), pa.string())})
    return table.replace_schema_metadata({"pandas": json.dumps(note)})


def _write_table(path: Path, table: pa.Table) -> None:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="snappy")
    write_file(path, buffer.getvalue())


def read_lerobot(root: str | Path, cameras: Sequence[str] | None = None, left_out: list[LeftOut] | None = None) -> tuple[Episode, ...]:
    """The episodes of a dataset, in order, with the named cameras (None: all, in the order of `meta/cameras.json`).

    Pictures are decoded when asked for. `MvwanError` naming the file, and the episode where there is one, for a folder that is no
    LeRobot v3 dataset, a missing or broken file, a missing column, uncalibrated cameras, or videos shorter than the table says. With a
    list `left_out`, an episode that stands on such data or video files is added to that instead; the folder `meta` must be whole.
    """
    root = Path(root)
    if not os.path.isfile(root / _INFO):
        raise MvwanError(f"{root}: not a LeRobot dataset, {_INFO} is missing. Give the folder that holds meta/, data/ and videos/.")
    return _Reader(root, cameras, left_out).episodes()


class _Reader:
    """One dataset folder: its description, read and checked; then its episodes."""

    def __init__(self, root: Path, cameras: Sequence[str] | None, left_out: list[LeftOut] | None) -> None:
        self._root, self._episodes, self._left_out = root, root / "meta/episodes", left_out
        self._broken: dict[Path, MvwanError] = {}
        self._videos: dict[Path, tuple[int, str]] = {}
        info = read_json(root / _INFO)
        version = get(info, "codebase_version", "text", root / _INFO)
        if not version.startswith("v3."):
            raise MvwanError(
                f"{root / _INFO}: codebase_version is {version}, only v3 is read. Convert it with lerobot's own v3.0 converter."
            )
        kinds = {"fps": "number", "features": "object", "data_path": "text", "video_path": "text"}
        self._fps, self._features, self._data_path, self._video_path = (get(info, key, kind, root / _INFO) for key, kind in kinds.items())
        if not 1 / _MOST_FPS <= self._fps <= _MOST_FPS:
            raise MvwanError(f"{root / _INFO}: fps={self._fps}, must be between {1 / _MOST_FPS} and {_MOST_FPS}. {AGAIN}")
        self._cameras = self._read_cameras(cameras)
        self._point, self._hand, self._gripper, self._quaternion = self._state_columns()

    def _feature(self, key: str) -> Mapping[str, Any]:
        feature, where = get(self._features, key, "object", self._root / _INFO), f"{self._root / _INFO}: {key}"
        return feature | {"dtype": get(feature, "dtype", "text", where), "shape": get(feature, "shape", "shape", where)}

    def _read_cameras(self, names: Sequence[str] | None) -> tuple[Camera, ...]:
        path = self._root / _CAMERAS
        if not path.exists():
            raise MvwanError(
                f'{path}: no such file. The cameras must be calibrated: write {{"cameras": [{{"name", "width_px", "height_px", '
                f'"intrinsics" 3x3, "world_to_camera" 4x4}}, ...]}}, one entry per observation.images.<name>.'
            )
        given = [Camera.from_dict(values) for values in get(read_json(path), "cameras", "list", path)]
        known = {camera.name: camera for camera in given}
        if len(known) < len(given):
            raise MvwanError(f"{path}: two cameras have one name. {AGAIN}")
        for name in names or ():
            if name not in known:
                raise MvwanError(f"{path}: no camera {name!r}.{nearest(name, known)} There are: {', '.join(known)}. Set data.cameras.")
        chosen = tuple(known[name] for name in names or known)
        for camera in chosen:
            feature, shape = self._feature(video_key(camera.name)), [camera.height_px, camera.width_px, 3]
            if feature["dtype"] != "video" or list(feature["shape"]) != shape:
                raise MvwanError(
                    f"{self._root / _INFO}: {video_key(camera.name)} is {feature['dtype']} {list(feature['shape'])}, "
                    f"{_CAMERAS} needs video {shape}"
                )
        return chosen

    def _state_columns(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """Places of the point, the hand, the gripper and the hand's quaternion in the state; all but the first may be empty."""
        names = self._feature(_STATE).get("names")
        names = list(names) if isinstance(names, list) else []
        missing = [name for name in POINT_NAMES if name not in names]
        if missing:
            raise MvwanError(
                f"{self._root / _INFO}: {_STATE} has no {', '.join(missing)} (its names: {names}). Name the tracked point's coordinates so."
            )
        if any(not isinstance(name, str) for name in names) or [len(names)] != self._feature(_STATE)["shape"]:
            raise MvwanError(f"{self._root / _INFO}: {_STATE} has names {names}, needs one for each of its values. {AGAIN}")
        groups = (POINT_NAMES, HAND_NAMES, (GRIPPER_NAME,), QUATERNION_NAMES)
        point, hand, gripper, turn = ([names.index(name) for name in group] if set(group) <= set(names) else [] for group in groups)
        return point, hand, gripper, turn

    def episodes(self) -> tuple[Episode, ...]:
        """All episodes, checked against the files they stand on."""
        table: list[dict[str, Any]] = []
        for path in sorted(self._episodes.glob("*/*.parquet")):
            table += rows_of(read_table(path, leave_out="stats/"), path)
        if not table:
            raise MvwanError(f"{self._episodes}: lists no episode. {AGAIN}")
        rows = self._read_rows(table)
        order = np.argsort(rows["episode_index"], kind="stable")
        indices = rows["episode_index"][order]
        result: list[Episode] = []
        for number, row in enumerate(table):
            with leaving_out(self._name(row, number), self._left_out):
                first, end = np.searchsorted(indices, (index := self._count(row, "episode_index"), index + 1))
                result.append(self._episode(row, rows, order[first:end]))
        twice = [name for name, times in Counter(episode.name for episode in result).items() if times > 1]
        if twice:
            raise MvwanError(
                f"{self._root}: {twice[0]} is in it twice, so that one could train while the other validates. Remove one of them."
            )
        return tuple(result)

    def _count(self, row: Mapping[str, Any], key: str) -> int:
        return get(row, key, "count", self._episodes)

    def _name(self, row: Mapping[str, Any], index: int) -> str:
        """The episode's own name, else one after its number."""
        return get(row, "name", "text", self._episodes) if row.get("name") else f"{self._root.name}/{index:06d}"

    def _data_file(self, row: Mapping[str, Any]) -> Path:
        place: dict[str, str | int] = {name: self._count(row, f"data/{name}") for name in ("chunk_index", "file_index")}
        return inside(self._root, self._data_path, self._root / _INFO, **place)

    def _read_rows(self, table: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """Column -> values of all frames, from the data files that the episodes name."""
        features = {key: self._feature(key) for key in (_STATE, _ACTION, _SUCCESS, *_INDEX_FEATURES) if key in self._features}
        for key in ("episode_index", "frame_index"):
            if self._feature(key)["dtype"] != "int64":
                raise MvwanError(f"{self._root / _INFO}: {key} is {self._feature(key)['dtype']}, needs int64. {AGAIN}")
        parts: dict[str, list[np.ndarray]] = {key: [] for key in features}
        for path in sorted({self._data_file(row) for row in table}):
            try:
                rows = read_table(path, leave_out="camera.")  # calibration: `meta/cameras.json` has it
                found = {key: numbers(rows, key, feature["dtype"], feature["shape"], path) for key, feature in features.items()}
            except MvwanError as error:
                self._broken[path] = error
                continue
            for key, values in found.items():
                parts[key].append(values)
        if self._broken and (self._left_out is None or not parts["episode_index"]):
            raise next(iter(self._broken.values()))
        return {key: np.concatenate(part) for key, part in parts.items()}

    def _video(self, path: Path) -> tuple[int, str]:
        """(pictures, hash) of a video file."""
        if path in self._broken:
            raise self._broken[path]
        if path not in self._videos:
            try:
                self._videos[path] = count_frames(path), sha256_file(path)
            except MvwanError as error:
                self._broken[path] = error
                raise
        return self._videos[path]

    def _video_places(self, row: Mapping[str, Any]) -> list[tuple[Path, int]]:
        """(file, first frame in it) of an episode for every camera."""
        places = []
        for key in (video_key(camera.name) for camera in self._cameras):
            chunk, file = (self._count(row, f"videos/{key}/{name}") for name in ("chunk_index", "file_index"))
            start_s = get(row, f"videos/{key}/from_timestamp", "number", self._episodes)
            path = inside(self._root, self._video_path, self._root / _INFO, video_key=key, chunk_index=chunk, file_index=file)
            places.append((path, round(start_s * self._fps)))
        return places

    def _episode(self, row: Mapping[str, Any], rows: Mapping[str, np.ndarray], mine: np.ndarray) -> Episode:
        """The episode of a row of the table; `mine` are its places in `rows`."""
        if (data_file := self._data_file(row)) in self._broken:
            raise self._broken[data_file]
        length, name = self._count(row, "length"), self._name(row, self._count(row, "episode_index"))
        if len(mine) != length or not np.array_equal(rows["frame_index"][mine], np.arange(length)):
            raise MvwanError(
                f"episode {name}: {self._root / 'data'} holds {len(mine)} of its rows in order, meta/episodes says {length}. {AGAIN}"
            )
        places = self._video_places(row)
        for path, first in places:
            if (held := self._video(path)[0]) < first + length:
                raise MvwanError(
                    f"episode {name}: {path} holds {held} pictures, pictures {first} to {first + length - 1} are needed. {AGAIN}"
                )
        own = {key: values[mine] for key, values in rows.items() if key not in _INDEX_FEATURES}
        state = own[_STATE]
        extra = {"state": state} | {short: own[key] for short, key in (("action", _ACTION), ("success", _SUCCESS)) if key in own}
        if self._hand:
            extra["hand_m"] = state[:, self._hand].astype(np.float64)
        if self._quaternion:
            extra["hand_quaternion_wxyz"] = state[:, self._quaternion].astype(np.float64)
        instruction = get(row, "tasks", "texts", self._episodes)[0]
        identity = [name, instruction, self._fps, [camera.to_dict() for camera in self._cameras]]
        identity += [[self._video(path)[1], first] for path, first in places]
        identity += [hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest() for values in own.values()]
        return Episode(
            name=name,
            instruction=instruction,
            cameras=self._cameras,
            fps=float(self._fps),
            point_m=state[:, self._point].astype(np.float64),
            gripper_open=state[:, self._gripper[0]] if self._gripper else np.full(length, np.nan, np.float32),
            read_rgb=VideoFrames(
                name=name,
                paths=tuple(path for path, _ in places),
                first_frames=tuple(first for _, first in places),
                sizes_px=tuple((camera.height_px, camera.width_px) for camera in self._cameras),
                num_frames=length,
                fps=float(self._fps),
            ),
            extra=extra,
            fingerprint=sha256_json(identity),
        ).check()
