"""Opens a dataset of many episodes and its latent cache in a process of its own, and tells its peak memory. Knows no test.

The episodes share one video and its pictures are never looked at; the entries of the cache are tiny and all the same.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mvwan.cameras import Camera
from mvwan.config import DataConfig
from mvwan.data.dataset import WindowDataset, read_episodes
from mvwan.data.lerobot import write_dataset
from mvwan.latent_cache import Keys, LatentCache, write_entry
from mvwan.latent_shards import SHARD_ENTRIES
from mvwan.tensors import digest, write_tensors

FRAMES = 24
WINDOWS = 20
"""Of each episode."""
DATA = DataConfig(num_frames=5, window_stride=1, height_px=32, width_px=32, text_tokens=4, validation_share=0.0)


def write_many(root: Path, episodes: int) -> Path:
    """`root`, a LeRobot dataset of so many episodes of one view: one is recorded, and the tables tell of it over and over."""
    camera = Camera(name="top", width_px=32, height_px=32, intrinsics=np.diag([32.0, 32, 1]), world_to_camera=np.eye(4))
    point_m = np.linspace((0, 0, 1.0), (0.2, 0.1, 1.2), FRAMES)
    with write_dataset(root, cameras=[camera], fps=10, action_names=("dx", "dy"), robot_type="none") as writer:
        writer.add_episode(
            name="many/000000",
            instruction="move",
            layout_seed=0,
            rgb=np.zeros((1, FRAMES, 32, 32, 3), np.uint8),
            point_m=point_m,
            hand_m=point_m,
            gripper_open=np.ones(FRAMES),
            action=np.zeros((FRAMES, 2)),
            success=np.ones(FRAMES, bool),
        )
    (rows_path,), (table_path,) = (root / "data").rglob("*.parquet"), (root / "meta/episodes").rglob("*.parquet")
    rows, table = pq.read_table(rows_path), pq.read_table(table_path)
    table = table.drop_columns([name for name in table.column_names if name.startswith("stats/")])
    numbers = pa.array(np.arange(episodes))
    names = pa.array([f"many/{number:06d}" for number in range(episodes)])
    pq.write_table(_with(pa.concat_tables([rows] * episodes), episode_index=pa.array(np.repeat(np.arange(episodes), FRAMES))), rows_path)
    pq.write_table(_with(pa.concat_tables([table] * episodes), episode_index=numbers, name=names), table_path)
    return root


def _with(table: pa.Table, **columns: pa.Array) -> pa.Table:
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, values)
    return table


def peak_bytes(root: Path) -> int:
    """The peak resident memory of a process that opens the dataset at `root` and a complete cache of it, and reads a batch."""
    done = subprocess.run([sys.executable, "-m", "tests.data_memory", str(root)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


def _open(root: Path) -> None:
    dataset = WindowDataset(read_episodes(root), DATA, 1, "train", 0)
    assert len(dataset) == WINDOWS * len(dataset.windows.episodes)
    keys = Keys(root / "latents", dataset, "codec", 1.0)
    _fill(keys)
    cache = LatentCache.open(keys.folder, dataset, "codec", 1.0)
    batch = cache.batch([0, len(cache) // 2, len(cache) - 1])
    assert batch.sample_ids[-1] == f"{dataset.windows.episodes[-1].name}@{WINDOWS - 1}#0"
    assert dataset.fingerprint
    dataset.check_actions("gripper")


def _fill(keys: Keys) -> None:
    """Writes the cache, without waiting for the disk."""
    entry = {"rgb": torch.zeros(1, 1, 2, 1, 1), "heat": torch.zeros(1, 1, 2, 1, 1), "heat_valid": torch.ones(1, 2, dtype=torch.bool)}
    told = torch.tensor(list(bytes.fromhex(digest(entry).removeprefix("sha256:"))), dtype=torch.uint8)
    (keys.folder / "shards").mkdir(parents=True)
    every = torch.tensor(keys.all())
    for start in range(0, len(every), SHARD_ENTRIES):
        own = every[start : start + SHARD_ENTRIES]
        stacked = {name: tensor.expand(len(own), *tensor.shape) for name, tensor in (entry | {"digests": told}).items()}
        write_tensors(keys.folder / "shards" / f"{start:08d}.safetensors", stacked | {"keys": own})
    for path in keys.texts().values():
        write_entry(path, {"text": torch.zeros(4, 4)})


if __name__ == "__main__":
    _open(Path(sys.argv[1]))
    status = Path("/proc/self/status").read_text(encoding="utf-8")  # not getrusage: that remembers the process it was forked from
    print(int(status.split("VmHWM:")[1].split()[0]) * 1024)
