"""Pictures that lie in files of their own, a file per view and frame: their size, and reading those that are asked for.

Knows no dataset, and not in which folders pictures lie.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mvwan.data.fields import AGAIN
from mvwan.errors import MvwanError

_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What decoding a damaged picture raises."""


def size_px_of(path: Path) -> tuple[int, int]:
    """(height, width) of a picture. `MvwanError` naming the file when it is none."""
    try:
        with Image.open(path) as picture:
            return picture.height, picture.width
    except _UNREADABLE as error:
        raise MvwanError(f"{path}: cannot be decoded ({type(error).__name__}). {AGAIN}") from None


@dataclass(frozen=True, kw_only=True)
class PictureFiles:
    """The pictures of one episode, a file each: call it with frame numbers. Plain data, so that it crosses to worker processes."""

    name: str
    """The episode, for messages."""
    paths: tuple[tuple[Path, ...], ...]
    """Per view, a file per frame."""
    sizes_px: tuple[tuple[int, int], ...]
    """(height, width) of each view's files; all are brought to that of the first."""

    def __call__(self, frames: Sequence[int]) -> np.ndarray:
        """[V len(frames) H W 3] uint8. `MvwanError` naming the episode, the frame and the file when a picture cannot be decoded."""
        views = zip(self.paths, self.sizes_px, strict=True)
        return np.stack([np.stack([self._read(paths[frame], size, frame) for frame in frames]) for paths, size in views])

    def _read(self, path: Path, size_px: tuple[int, int], frame: int) -> np.ndarray:
        height, width = self.sizes_px[0]
        try:
            with Image.open(path) as picture:
                found = (picture.height, picture.width)
                if found != size_px:
                    raise MvwanError(
                        f"episode {self.name}, frame {frame}: {path} is {found[0]} x {found[1]} px, the first picture of its view "
                        f"{size_px[0]} x {size_px[1]}. {AGAIN}"
                    )
                rgb = picture.convert("RGB")
                return np.asarray(rgb if found == (height, width) else rgb.resize((width, height), Image.Resampling.BICUBIC))
        except MvwanError:
            raise
        except _UNREADABLE as error:
            raise MvwanError(f"episode {self.name}, frame {frame}: {path} cannot be decoded ({type(error).__name__}). {AGAIN}") from None
