"""MVTrack, several synchronised cameras that follow an object (as in MITracker, CVPR 2025): the only file that knows this format.

    <root>/<scene>/<scene>-<view>/img/*.jpg         the pictures of a view, in the order of their names
    <root>/<scene>/<scene>-<view>/groundtruth.txt   a line per picture: x,y,w,h of the object's box, px
    <root>/<scene>/<scene>-<view>/invisible.txt     a number per picture, 0 where the object is seen; may be missing
    <root>/train_split.txt, val_split.txt, test_split.txt    names of views, a line each; may be missing

A scene is an episode. The tracked point is the middle of the box, labelled view by view, and nowhere in space: no calibration is
stored, and cameras stand for the size of their pictures alone. Where a view has lost the object its label is missing, in that view and
frame only; the views stay in step. Scenes of the test split are left out.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from mvwan.batch import Episode
from mvwan.cameras import Camera
from mvwan.data.fields import AGAIN
from mvwan.data.left_out import LeftOut, leaving_out
from mvwan.data.picture_files import PictureFiles, size_px_of
from mvwan.errors import MvwanError
from mvwan.files import read_text, sha256_json

FPS = 30.0
"""The format does not say; written videos have this rate."""
_SPLITS: Mapping[str, Literal["train", "validation", "test"]] = {"train": "train", "val": "validation", "test": "test"}
_PICTURES = (".jpg", ".jpeg", ".png")
_LARGEST_PX = 2**15


def is_mvtrack(root: Path) -> bool:
    """Whether the folder holds scenes of this format."""
    return any(_views_of(scene) for scene in _folders(root))


def read_mvtrack(root: str | Path, cameras: Sequence[str] | None = None, left_out: list[LeftOut] | None = None) -> list[Episode]:
    """The scenes in the order of their names, views in the order of their numbers and named `view1`, `view2`, …; `cameras` None: all.

    Raises `MvwanError` naming the scene, and the view or file at fault; with a list `left_out`, such a scene is added to that instead.
    """
    root = Path(root)
    splits = _read_splits(root)
    episodes = []
    for scene in _folders(root):
        views = _views_of(scene)
        if not views:
            continue
        found = {splits.get(view.name, "unlisted") for view in views} if splits else {"train"}
        if len(found) > 1:
            raise MvwanError(f"scene {scene.name}: its views are in different splits ({', '.join(sorted(found))}). {AGAIN}")
        (split,) = found
        if split != "test":
            with leaving_out(scene.name, left_out):
                if split not in ("train", "validation"):
                    raise MvwanError(f"scene {scene.name}: is in none of the split files of {root}. List it there, or remove its folder.")
                episodes.append(_episode(scene, views, cameras, split if splits else None))
    return episodes


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir())


def _views_of(scene: Path) -> list[Path]:
    """The folders of a scene's views by number; none when it is no scene."""
    named = re.compile(re.escape(scene.name) + r"-(\d{1,4})")
    numbered = {path: named.fullmatch(path.name) for path in _folders(scene) if (path / "groundtruth.txt").is_file()}
    return sorted((path for path, found in numbered.items() if found), key=lambda path: int(path.name.rsplit("-", 1)[1]))


def _read_splits(root: Path) -> dict[str, Literal["train", "validation", "test"]]:
    splits: dict[str, Literal["train", "validation", "test"]] = {}
    for stem, split in _SPLITS.items():
        path = root / f"{stem}_split.txt"
        if not path.is_file():
            continue
        for name in read_text(path).split():
            if splits.setdefault(name, split) != split:
                raise MvwanError(f"{path}: {name} is in the split {splits[name]} too. {AGAIN}")
    return splits


def _episode(scene: Path, views: Sequence[Path], cameras: Sequence[str] | None, split: Literal["train", "validation"] | None) -> Episode:
    by_name = {f"view{view.name.rsplit('-', 1)[1]}": view for view in views}
    chosen = {name: view for name, view in by_name.items() if cameras is None or name in cameras}
    if not chosen:
        chosen = by_name  # whoever asked is told which there are
    paths = {name: _pictures(view) for name, view in chosen.items()}
    counts = {name: len(found) for name, found in paths.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise MvwanError(f"scene {scene.name}: its views have different numbers of pictures ({listed}). {AGAIN}")
    sizes = {name: size_px_of(found[0]) for name, found in paths.items()}
    height, width = next(iter(sizes.values()))
    uv_px = np.stack([_middles(chosen[name], counts[name]) * (width / size[1], height / size[0]) for name, size in sizes.items()])
    frames = uv_px.shape[1]
    stored = [[[path.name, path.stat().st_size] for path in found] for found in paths.values()]
    return Episode(
        name=scene.name,
        instruction=f"Track the {' '.join(re.findall('[A-Za-z]+', scene.name)) or 'object'}",
        cameras=tuple(_stand_in(name, height, width) for name in chosen),
        fps=FPS,
        point_m=np.full((frames, 3), np.nan),
        gripper_open=np.full(frames, np.nan, np.float32),
        read_rgb=PictureFiles(name=scene.name, paths=tuple(paths.values()), sizes_px=tuple(sizes.values())),
        uv_px=uv_px,
        split=split,
        fingerprint=sha256_json(stored),
    ).check()


def _stand_in(name: str, height: int, width: int) -> Camera:
    """A camera of that picture; where it stood nobody knows."""
    focal = float(max(height, width))
    intrinsics = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    return Camera(name=name, width_px=width, height_px=height, intrinsics=intrinsics, world_to_camera=np.eye(4))


def _pictures(view: Path) -> tuple[Path, ...]:
    folder = view / "img"
    if not folder.is_dir():
        raise MvwanError(f"{folder}: no such folder. {AGAIN}")
    found = [path for path in folder.iterdir() if path.suffix.lower() in _PICTURES]
    if not found:
        raise MvwanError(f"{folder}: holds no picture. {AGAIN}")
    # 2.jpg before 10.jpg
    return tuple(sorted(found, key=lambda path: (len(path.stem), path.stem) if path.stem.isdigit() else (0, path.stem)))


def _middles(view: Path, count: int) -> np.ndarray:
    """[F 2] float64 px, the middles of the boxes, NaN where the object is not seen or not labelled."""
    path = view / "groundtruth.txt"
    boxes = np.array([_numbers(line, path, row, 4) for row, line in enumerate(_lines(path), 1)]).reshape(-1, 4)
    hidden = np.zeros(len(boxes), bool)
    flags = view / "invisible.txt"
    if flags.is_file():
        said = re.split(r"[,\s]+", read_text(flags).strip())
        hidden = np.concatenate([_numbers(flag, flags, row, 1) for row, flag in enumerate(said, 1)]) != 0
    for file, number in ((path, len(boxes)), (flags, len(hidden))):
        if number != count:
            raise MvwanError(f"{file}: {number} entries for {count} pictures. {AGAIN}")
    labelled = np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] > 0).all(axis=1)
    boxes[~labelled | hidden] = np.nan
    return boxes[:, :2] + boxes[:, 2:] / 2


def _lines(path: Path) -> list[str]:
    return read_text(path).strip().splitlines()


def _numbers(text: str, path: Path, row: int, count: int) -> np.ndarray:
    try:
        values = np.array([float(part) for part in re.split(r"[,\s]+", text.strip())])
    except ValueError:
        values = np.zeros(0)
    if values.shape != (count,) or (np.abs(values[np.isfinite(values)]) > _LARGEST_PX).any():
        raise MvwanError(f"{path}: entry {row} is {text[:60]!r}, needs {count} number{'s' if count > 1 else ''}. {AGAIN}")
    return values
