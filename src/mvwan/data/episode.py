"""What every dataset format needs: pictures to mp4 (`VideoWriter`) and back exact to the frame (`VideoFrames`), and summary numbers.

Encoding is nearly lossless (full colour resolution, short groups of pictures, no reordered frames) and repeatable: one encoder
thread and no vector code, so the same pictures give the same bytes with the same FFmpeg. Knows no dataset format: readers pass paths
and frame numbers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from mvwan.data.fields import AGAIN
from mvwan.errors import MvwanError

VIDEO_CODEC = "h264"
PIXEL_FORMAT = "yuv444p"
_ENCODER = "libx264"
# asm=0: with AVX-512, x264 gave other bytes in 3 of 400 encodings of the same yuv444p pictures; in plain C in none of 4000, and the
# same on every processor. It costs a third of the encoding time.
_ENCODER_OPTIONS = {"crf": "8", "preset": "medium", "g": "8", "bf": "0", "x264-params": "asm=0"}
_SEEK_GAP = 24
_CONTAINER = "mp4"
"""Given, not guessed: FFmpeg would take a play list of that name for one, and open what it lists."""
_UNDECODABLE = (FFmpegError, OSError, ValueError, ArithmeticError)
_QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


class VideoWriter:
    """An mp4 file under construction; a context manager. Frame k is shown at k / fps seconds."""

    def __init__(self, path: Path, fps: int, height_px: int, width_px: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.num_frames = 0
        self.num_bytes = 0
        self._container = av.open(str(path), "w", format="mp4")
        self._stream = cast("VideoStream", self._container.add_stream(_ENCODER, rate=fps, options=dict(_ENCODER_OPTIONS)))
        self._stream.height, self._stream.width, self._stream.pix_fmt = height_px, width_px, PIXEL_FORMAT
        self._stream.codec_context.thread_count = 1
        self._stream.codec_context.time_base = Fraction(1, fps)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def add(self, rgb: np.ndarray) -> None:
        """Nothing; appends the pictures [F H W 3] uint8."""
        assert (rgb.dtype, rgb.shape[1:]) == (np.uint8, (self._stream.height, self._stream.width, 3)), (
            f"{self.path}: {rgb.dtype} {rgb.shape}"
        )
        for picture in rgb:
            frame = VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = self.num_frames
            self._mux(self._stream.encode(frame))
            self.num_frames += 1

    def close(self) -> None:
        """Nothing; writes what the encoder still holds and ends the file."""
        if self.num_frames:
            self._mux(self._stream.encode())
        self._container.close()

    def _mux(self, packets: list[Packet]) -> None:
        self.num_bytes += sum(packet.size for packet in packets)
        self._container.mux(packets)


def count_frames(path: Path) -> int:
    """Pictures that are stored whole in the file. `MvwanError` naming the file when it is missing, cut short or no video."""
    try:
        with av.open(str(path), format=_CONTAINER) as container:
            stream = _video_stream(container, path)
            return sum(1 for packet in container.demux(stream) if packet.size and packet.pts is not None)
    except MvwanError:
        raise
    except _UNDECODABLE as error:
        raise _broken(path, error) from error


def read_frames(path: Path, fps: float, frames: Sequence[int], size_px: tuple[int, int] | None = None) -> np.ndarray:
    """[len(frames) H W 3] uint8: the pictures shown at frame / fps seconds, in the order asked for, repeats allowed.

    `MvwanError` naming the file and the frame when one cannot be decoded, or is not of `size_px` (height, width; None: any).
    """
    wanted = sorted(set(frames))
    assert min(wanted, default=-1) >= 0, f"read_frames: frames {frames}"
    cuts = [place for place in range(1, len(wanted)) if wanted[place] - wanted[place - 1] > _SEEK_GAP]
    runs = [wanted[start:end] for start, end in zip([0, *cuts], [*cuts, len(wanted)], strict=True)]
    pictures: dict[int, np.ndarray] = {}
    try:
        with av.open(str(path), format=_CONTAINER) as container:
            stream = _video_stream(container, path)
            _check_size(path, (stream.codec_context.height, stream.codec_context.width), size_px)
            stream.codec_context.thread_count = 1
            for run in runs:
                for number, frame in _decode_run(container, stream, fps, run):
                    _check_size(path, (frame.height, frame.width), size_px)
                    pictures[number] = frame.to_ndarray(format="rgb24")
    except MvwanError:
        raise
    except _UNDECODABLE as error:
        raise _broken(path, error) from error
    lost = [frame for frame in wanted if frame not in pictures]
    if lost:
        raise MvwanError(f"{path}: frame {lost[0]} is not in the video ({len(lost)} of {len(wanted)} are missing). {AGAIN}")
    return np.stack([pictures[frame] for frame in frames])


def _check_size(path: Path, found_px: tuple[int, int], size_px: tuple[int, int] | None) -> None:
    if size_px is not None and found_px != size_px:
        raise MvwanError(f"{path}: pictures of {found_px[0]} x {found_px[1]} px, the dataset says {size_px[0]} x {size_px[1]}. {AGAIN}")


def _decode_run(container: InputContainer, stream: VideoStream, fps: float, run: list[int]) -> Iterator[tuple[int, VideoFrame]]:
    """(frame number, picture) for the ascending frame numbers of `run` that the video holds."""
    if not stream.time_base:
        raise ValueError("its pictures have no times")
    container.seek(int(run[0] / fps / stream.time_base), stream=stream, backward=True, any_frame=False)
    wanted = set(run)
    for frame in container.decode(stream):
        if frame.pts is None:
            continue
        number = round(float(frame.pts * stream.time_base) * fps)
        if number in wanted:
            yield number, frame
        if number >= run[-1]:
            break


def _video_stream(container: InputContainer, path: Path) -> VideoStream:
    if not container.streams.video or container.streams.video[0].codec_context is None:
        raise MvwanError(f"{path}: has no video stream that can be decoded. {AGAIN}")
    return container.streams.video[0]


def _broken(path: Path, error: Exception) -> MvwanError:
    reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be decoded ({getattr(error, 'strerror', None) or error})"
    return MvwanError(f"{path}: {reason}. {AGAIN}")


@dataclass(frozen=True, kw_only=True)
class VideoFrames:
    """The pictures of one episode in one video per view: call it with frame numbers. Plain data, so that it crosses to worker processes."""

    name: str
    """The episode, for messages."""
    paths: tuple[Path, ...]
    """One file per view."""
    first_frames: tuple[int, ...]
    """Where the episode starts in each file."""
    num_frames: int
    fps: float
    sizes_px: tuple[tuple[int, int] | None, ...] = ()
    """(height, width) of each view; empty: as stored."""

    def __call__(self, frames: Sequence[int]) -> np.ndarray:
        """[V len(frames) H W 3] uint8. `MvwanError` naming the episode and the file when a picture cannot be decoded."""
        assert all(0 <= frame < self.num_frames for frame in frames), f"{self.name}: {self.num_frames} frames, asked for {frames}"
        views = zip(self.paths, self.first_frames, self.sizes_px or (None,) * len(self.paths), strict=True)
        try:
            return np.stack([read_frames(path, self.fps, [first + int(frame) for frame in frames], size) for path, first, size in views])
        except MvwanError as error:
            raise MvwanError(f"episode {self.name}: {error}") from error


def summarise(values: np.ndarray) -> dict[str, list[Any]]:
    """min, max, mean, std, count and the quantiles q01 to q99 of each column of values [rows] or [rows K], as lists."""
    rows = values.reshape(len(values), -1).astype(np.float64)
    numbers = {"min": rows.min(axis=0), "max": rows.max(axis=0), "mean": rows.mean(axis=0), "std": rows.std(axis=0)}
    numbers |= dict(zip(_QUANTILES, np.quantile(rows, list(_QUANTILES.values()), axis=0), strict=True))
    return {name: number.tolist() for name, number in numbers.items()} | {"count": [len(rows)]}


def count_values(pictures: np.ndarray) -> np.ndarray:
    """[3 256] int64: how often each value occurs per colour in pictures [F H W 3] uint8. Counts of parts add up."""
    return np.stack([np.bincount(pictures[..., colour].ravel(), minlength=256) for colour in range(3)])


def summarise_pictures(counts: np.ndarray, num_frames: int) -> dict[str, list[Any]]:
    """The numbers of `summarise` per colour, in 0..1 and shaped (3, 1, 1), from the counts of `count_values`."""
    values, shares = np.arange(256) / 255.0, counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ values
    seen, below = counts > 0, np.cumsum(shares, axis=1)
    numbers = {"min": values[seen.argmax(axis=1)], "max": values[255 - seen[:, ::-1].argmax(axis=1)], "mean": mean}
    numbers["std"] = np.sqrt(np.maximum(shares @ values**2 - mean**2, 0))
    numbers |= {name: values[(below >= share - 1e-12).argmax(axis=1)] for name, share in _QUANTILES.items()}
    return {name: number.reshape(3, 1, 1).tolist() for name, number in numbers.items()} | {"count": [num_frames]}
