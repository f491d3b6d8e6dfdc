"""A dataset of 10,000 episodes with 20 windows each, and its latent cache, cost little memory per episode to open."""

from pathlib import Path

from tests.data_memory import WINDOWS, peak_bytes, write_many

FEW, MANY = 1_000, 10_000
MOST_BYTES_PER_EPISODE = 24 * 1024
"""At the peak, while the tables are read; measured: 17 KB. A kilobyte for each window, as names and paths take it, would make it 37 KB."""


def test_memory_grows_by_a_few_kilobytes_per_episode(tmp_path: Path) -> None:
    few, many = (peak_bytes(write_many(tmp_path / str(count), count)) for count in (FEW, MANY))
    per_episode = (many - few) / (MANY - FEW)
    assert per_episode < MOST_BYTES_PER_EPISODE, f"{per_episode:,.0f} bytes per episode of {WINDOWS} windows"
