"""trail, robot demonstrations with three depth cameras: the only file that knows this format.

    <task>/trail_<N>/poses/NNNNNN.pkl             x y z qw qx qy qz of the hand in the robot's frame, metres
    <task>/trail_<N>/gripper_states/NNNNNN.pkl    whether it is open
    <task>/trail_<N>/3rd_<c>_pcd/NNNNNN.pkl       [H W 3] points in the frame of camera c = 1, 2, 3, metres
    <task>/trail_<N>/3rd_<c>_bgr/NNNNNN.pkl       [H W 3] uint8 colours, blue first
    <task>/trail_<N>/extrinsics.pkl               {"3rd_<c>": [4 4] camera -> robot}
    <task>/trail_<N>/instruction.txt

The root is a task or a folder of tasks. Pictures are orthographic views of the clouds, cut to the scene and made when asked for, so a
cloud can be moved before it is seen. Pickles are read without running anything that they name.
"""

import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mvwan.batch import Episode
from mvwan.cameras import Camera
from mvwan.config import TrailConfig
from mvwan.data.fields import AGAIN, array_in, shown
from mvwan.data.left_out import LeftOut, leaving_out
from mvwan.data.point_clouds import splat, virtual_rig
from mvwan.errors import MvwanError
from mvwan.files import read_text, sha256_json
from mvwan.pickles import read_pickle

FPS = 10.0
"""The format does not say; written videos and converted datasets have this rate."""
SENSORS = ("3rd_1", "3rd_2", "3rd_3")
_PLACES, _PIECE_BYTES = 16, 4096
_TRAIL = re.compile(r"trail_(\d{1,9})")


def is_trail(root: Path) -> bool:
    """Whether the folder is a task of this format, or holds some."""
    return any(_trails(folder) for folder in (root, *_folders(root)))


def read_trail(
    root: str | Path, settings: TrailConfig, cameras: Sequence[str] | None = None, left_out: list[LeftOut] | None = None
) -> list[Episode]:
    """The demonstrations of every task, in the order of the tasks' names and the trails' numbers; `cameras` are virtual ones, None: all.

    Raises `MvwanError` naming the trail and the file at fault, or when `settings` leave none. With a list `left_out`, a trail that is
    damaged is added to that instead.
    """
    root = Path(root)
    rig = virtual_rig(settings.scene_bounds_m, settings.size_px)
    chosen = [place for place, camera in enumerate(rig) if cameras is None or camera.name in cameras] or list(range(len(rig)))
    tasks = [folder for folder in (root, *_folders(root)) if _trails(folder)]
    numbered = [(task, number, trail) for task in tasks for number, trail in _trails(task)]
    kept = [
        (task, trail)
        for task, number, trail in numbered
        if settings.first <= number <= (number if settings.last is None else settings.last)
    ]
    if not kept:
        numbers = sorted({number for _, number, _ in numbered})
        raise MvwanError(
            f"{root}: data.trail.first={settings.first} and data.trail.last={settings.last} leave no demonstration; there are trails "
            f"{numbers[0]} to {numbers[-1]}. Set data.trail."
        )
    episodes = []
    for task, trail in kept:
        with leaving_out(f"{task.name}/{trail.name}", left_out):
            episodes.append(_episode(task, trail, settings, rig, chosen))
    return episodes


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir())


def _trails(task: Path) -> list[tuple[int, Path]]:
    """(number, folder) of a task's demonstrations."""
    named = [(found, path) for path in _folders(task) if (found := _TRAIL.fullmatch(path.name)) and (path / "poses").is_dir()]
    return sorted((int(found[1]), path) for found, path in named)


def _episode(task: Path, trail: Path, settings: TrailConfig, rig: tuple[Camera, ...], chosen: list[int]) -> Episode:
    name = f"{task.name}/{trail.name}"
    frames = sorted(path.stem for path in (trail / "poses").glob("*.pkl"))
    if not frames:
        raise MvwanError(f"{trail / 'poses'}: holds no pose. {AGAIN}")
    poses = np.stack([_pose(trail / "poses" / f"{frame}.pkl") for frame in frames])
    gripper_open = [_is_open(trail / "gripper_states" / f"{frame}.pkl") for frame in frames]
    extrinsics = _extrinsics(trail / "extrinsics.pkl")
    clouds = CloudFiles(
        name=name,
        folder=trail,
        frames=tuple(frames),
        base_from_sensor=tuple(extrinsics[sensor] for sensor in SENSORS),
        rig=rig,
        chosen=tuple(chosen),
        settings=settings,
    )
    stored = [_looked_into(sorted(folder.glob("*.pkl"))) for sensor in SENSORS for folder in sorted(trail.glob(f"{sensor}_*"))]
    scene = [
        settings.scene_bounds_m,
        settings.size_px,
        settings.merged,
        settings.radius_px,
        [matrix.tolist() for matrix in clouds.base_from_sensor],
    ]
    return Episode(
        name=name,
        instruction=read_text(trail / "instruction.txt").strip() or task.name.replace("_", " "),
        cameras=tuple(rig[place] for place in chosen),
        fps=FPS,
        point_m=poses[:, :3],
        gripper_open=np.array(gripper_open, np.float32),
        read_rgb=clouds,
        extra={"hand_quaternion_wxyz": poses[:, 3:]},
        fingerprint=sha256_json([stored, scene]),
    ).check()


def _looked_into(clouds: Sequence[Path]) -> list[tuple[str, int, str]]:
    """(name, bytes, digest) of the clouds of one folder. All have as many bytes, whatever they show, and are too large to be read at every
    start: of the first, the one in the middle and the last some places are looked into."""
    chosen = {clouds[place] for place in (0, len(clouds) // 2, -1)} if clouds else set[Path]()
    return [(path.name, path.stat().st_size, _digest_of_places(path) if path in chosen else "") for path in clouds]


def _digest_of_places(path: Path) -> str:
    """64 hex digits over `_PLACES` pieces of the file, evenly spread, and its end; those of nothing where it cannot be read."""
    total, size = hashlib.sha256(), path.stat().st_size
    with suppress(OSError), open(path, "rb") as file:  # whoever needs the cloud says so
        for place in range(_PLACES + 1):
            file.seek(max(0, size - _PIECE_BYTES) * place // _PLACES)
            total.update(file.read(_PIECE_BYTES))
    return total.hexdigest()


def _pose(path: Path) -> np.ndarray:
    pose = array_in(read_pickle(path), (7,), path).astype(np.float64)
    if not np.isfinite(pose).all():
        raise MvwanError(f"{path}: NaN or infinity in a pose. {AGAIN}")
    return pose


def _is_open(path: Path) -> bool:
    value = read_pickle(path)
    if not isinstance(value, bool | np.bool_ | int) or value not in (0, 1):
        raise MvwanError(f"{path}: holds {shown(value)}, needs true (open) or false. {AGAIN}")
    return bool(value)


def _extrinsics(path: Path) -> dict[str, np.ndarray]:
    value = read_pickle(path)
    found: dict[str, np.ndarray] = {}
    for sensor in SENSORS:
        where = f"{path}: {sensor!r}"
        matrix = array_in(value.get(sensor) if isinstance(value, dict) else None, (4, 4), where).astype(np.float64)
        rigid = np.isfinite(matrix).all() and np.allclose(matrix[3], (0, 0, 0, 1), atol=1e-4)
        if not rigid or not np.allclose(matrix[:3, :3] @ matrix[:3, :3].T, np.eye(3), atol=1e-3) or np.linalg.det(matrix[:3, :3]) < 0:
            raise MvwanError(f"{where} is no rotation and shift, [4 4] from camera to robot. {AGAIN}")
        found[sensor] = matrix
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class CloudFiles:
    """The clouds of one demonstration as pictures: call it with frame numbers. Plain data, so that it crosses to worker processes."""

    name: str
    """The episode, for messages."""
    folder: Path
    frames: tuple[str, ...]
    """Names of the frames' files, without their ending."""
    base_from_sensor: tuple[np.ndarray, ...]
    """Per sensor [4 4], metres."""
    rig: tuple[Camera, ...]
    """All virtual cameras."""
    chosen: tuple[int, ...]
    """Places in `rig` of the views that are shown."""
    settings: TrailConfig

    def __call__(
        self, frames: Sequence[int], moved: np.ndarray | None = None, noise: np.random.Generator | None = None, noise_size: float = 0.0
    ) -> np.ndarray:
        """[V len(frames) H W 3] uint8.

        `moved` [4 4] moves the clouds before they are seen; what was cut off as outside of the scene stays away. `noise` shifts the
        colours of all points of a frame's cloud, each by its own draw of standard deviation `noise_size` (colours are 0..1).
        `MvwanError` naming the episode and the frame when a cloud cannot be read.
        """
        pictures = [self._views(int(frame), moved, noise, noise_size) for frame in frames]
        return np.stack(pictures, axis=1)

    def about_its_middle(self, rigid: np.ndarray) -> np.ndarray:
        """[4 4] the same rotation about the middle of the scene, then the same shift."""
        middle = np.reshape(self.settings.scene_bounds_m, (2, 3)).mean(axis=0)
        moved = rigid.copy()
        moved[:3, 3] += middle - rigid[:3, :3] @ middle
        return moved

    def _views(self, frame: int, moved: np.ndarray | None, noise: np.random.Generator | None, noise_size: float) -> np.ndarray:
        try:
            clouds = [self._cloud(frame, place) for place in range(len(SENSORS))]
        except MvwanError as error:
            raise MvwanError(f"episode {self.name}, frame {frame}: {error}") from None
        if moved is not None:
            clouds = [(points @ moved[:3, :3].T + moved[:3, 3], rgb) for points, rgb in clouds]
        if noise is not None and noise_size:
            clouds = [
                (points, np.clip(rgb + 255 * noise_size * noise.standard_normal(rgb.shape), 0, 255).round()) for points, rgb in clouds
            ]
        if self.settings.merged:
            together = np.concatenate([points for points, _ in clouds]), np.concatenate([rgb for _, rgb in clouds])
            clouds = [together] * len(self.rig)
        return np.stack([self._picture(clouds[place][0], clouds[place][1], self.rig[place]) for place in self.chosen])

    def _picture(self, points_m: np.ndarray, rgb: np.ndarray, camera: Camera) -> np.ndarray:
        colours = torch.from_numpy(np.ascontiguousarray(rgb.astype(np.uint8)))
        return splat(torch.from_numpy(points_m), colours, camera, self.settings.radius_px).numpy()

    def _cloud(self, frame: int, place: int) -> tuple[np.ndarray, np.ndarray]:
        """(points_m [N 3] float64 in the robot's frame and inside the scene, rgb [N 3] uint8) of one sensor."""
        sensor, file = SENSORS[place], f"{self.frames[frame]}.pkl"
        cloud, colours = self.folder / f"{sensor}_pcd" / file, self.folder / f"{sensor}_bgr" / file
        points = array_in(read_pickle(cloud), (None, None, 3), cloud).astype(np.float64)
        bgr = array_in(read_pickle(colours), points.shape, colours, "u", "values of 0 to 255")
        if bgr.dtype != np.uint8:
            raise MvwanError(f"{colours}: holds {bgr.dtype}, needs uint8. {AGAIN}")
        points, rgb = points.reshape(-1, 3), bgr.reshape(-1, 3)[:, ::-1]
        base_from_sensor = self.base_from_sensor[place]
        points = points @ base_from_sensor[:3, :3].T + base_from_sensor[:3, 3]
        low, high = np.reshape(self.settings.scene_bounds_m, (2, 3))
        with np.errstate(invalid="ignore"):
            inside = ((points >= low) & (points <= high)).all(axis=1)
        return points[inside], rgb[inside]
