"""Entries of a latent cache changed in place, with digests that agree. Knows no test."""

from collections.abc import Callable
from pathlib import Path

import torch

from mvwan.config import Config
from mvwan.data.dataset import WindowDataset, read_episodes
from mvwan.latent_cache import WINDOW, Keys
from mvwan.latent_shards import Shards
from mvwan.model.latents import codec_digest


def keys_of(config: Config, folder: Path, split: str) -> Keys:
    """Where the entries of one split of a run lie in the cache `folder`."""
    dataset = WindowDataset(read_episodes(config.data.root), config.data, config.model.views, split, config.seed)
    codec = codec_digest(config.base.codec or config.base.source, config.data.text_tokens)
    return Keys(folder, dataset, codec, config.data.heatmap_sigma_px)


def change_entry(keys: Keys, item: int, change: Callable[[dict[str, torch.Tensor]], None]) -> str:
    """The name of the item's sample, after `change` was let loose on its entry."""
    shards = Shards(keys.folder, WINDOW)
    place = int(keys.find(shards)[0][item])
    entry = shards.read(place)
    change(entry)
    shards.replace(place, entry)
    return keys.sample_id(item)


def put_nan(entry: dict[str, torch.Tensor]) -> None:
    """Nothing; one number of the entry's pictures is none."""
    entry["rgb"][0, 0, 1, 0, 0] = float("nan")
