"""The files of a LeRobot v3 dataset that many episodes share, under construction: videos and tables of rows, and where each lies.

Knows no meaning of a column; `data/lerobot` does.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mvwan.cameras import Camera
from mvwan.data.episode import VideoWriter, count_values

FILES_PER_CHUNK = 1000
DATA_FILE_MB = 100
VIDEO_FILE_MB = 200
_PLACE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
DATA_PATH = f"data/{_PLACE}.parquet"
VIDEO_PATH = "videos/{video_key}/" + f"{_PLACE}.mp4"
EPISODES_PATH = f"meta/episodes/{_PLACE}.parquet"


def video_key(camera: str) -> str:
    """LeRobot's name of a camera's pictures."""
    return f"observation.images.{camera}"


class VideoTrack:
    """The videos of one camera: appends episodes and starts a new file when one is full."""

    def __init__(self, folder: Path, camera: Camera, fps: int) -> None:
        self.key = video_key(camera.name)
        self.counts = np.zeros((3, 256), np.int64)
        self._folder, self._camera, self._fps = folder, camera, fps
        self._place = (0, 0)
        self._writer: VideoWriter | None = None

    def add(self, pictures: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
        """(the episode's columns that say where its pictures are, how often each value 0..255 occurs per colour [3 256])."""
        if self._writer is not None and self._writer.num_bytes >= VIDEO_FILE_MB * 2**20:
            self.close()
            self._place = _next_place(self._place)
        chunk, file = self._place
        if self._writer is None:
            path = self._folder / VIDEO_PATH.format(video_key=self.key, chunk_index=chunk, file_index=file)
            self._writer = VideoWriter(path, self._fps, self._camera.height_px, self._camera.width_px)
        first = self._writer.num_frames
        self._writer.add(pictures)
        counts = count_values(pictures)
        self.counts += counts
        places = {"chunk_index": chunk, "file_index": file}
        places |= {"from_timestamp": first / self._fps, "to_timestamp": self._writer.num_frames / self._fps}
        return {f"videos/{self.key}/{name}": value for name, value in places.items()}, counts

    def close(self) -> None:
        """Nothing; ends the file under construction."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()


class RowFile:
    """The parquet files with one row per frame: appends episodes and starts a new file when one is full."""

    def __init__(self, folder: Path, features: Mapping[str, Any]) -> None:
        self._folder = folder
        self._schema = pa.schema([(key, _arrow_type(feature)) for key, feature in features.items() if feature["dtype"] != "video"])
        self._place = (0, 0)
        self._path = folder
        self._writer: pq.ParquetWriter | None = None

    def add(self, columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The episode's columns that say where its rows are."""
        if self._writer is not None and self._path.stat().st_size >= DATA_FILE_MB * 2**20:
            self.close()
            self._place = _next_place(self._place)
        chunk, file = self._place
        if self._writer is None:
            self._path = self._folder / DATA_PATH.format(chunk_index=chunk, file_index=file)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self._path, self._schema, compression="snappy")
        arrays = [_arrow_array(columns[field.name], field.type) for field in self._schema]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        return {"data/chunk_index": chunk, "data/file_index": file}

    def close(self) -> None:
        """Nothing; ends the file under construction."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()


def _next_place(place: tuple[int, int]) -> tuple[int, int]:
    chunk, file = place
    return (chunk + 1, 0) if file == FILES_PER_CHUNK - 1 else (chunk, file + 1)


def _arrow_type(feature: Mapping[str, Any]) -> pa.DataType:
    value = {"float32": pa.float32(), "int64": pa.int64(), "bool": pa.bool_()}[feature["dtype"]]
    return value if feature["shape"] == [1] else pa.list_(value, feature["shape"][0])


def _arrow_array(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values, kind)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
