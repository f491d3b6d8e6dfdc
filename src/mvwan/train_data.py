"""What the trainer reads: the latent caches of both splits, this process's micro-batches in order, a picture of the first windows.

Knows no model, no loss and no step but its number.
"""

import math
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from mvwan import pictures
from mvwan.batch import Batch
from mvwan.config import Config, TrainConfig
from mvwan.data.dataset import Episodes, WindowDataset, global_indices, heat_video
from mvwan.data.windows import spread
from mvwan.errors import MvwanError
from mvwan.heat_reader import Clips, HeatReader, fit_heat_reader
from mvwan.heatmaps import render
from mvwan.latent_cache import LatentCache, build_cache, is_complete
from mvwan.model.latents import LatentCodec, codec_digest

_READER_WINDOWS, _READER_LATENTS = 512, 400_000
"""That a heat reader is fitted to at most."""


def latent_caches(
    config: Config,
    output: Path,
    training: WindowDataset,
    held_out: WindowDataset,
    device: torch.device,
    is_main: bool,
    wait_for_everyone: Callable[[], None],
) -> tuple[LatentCache, LatentCache | None]:
    """The latent caches of both splits (None: nothing is held out), complete.

    The main process encodes what is missing or damaged, with `train.num_workers` processes that decode pictures; VAE and text encoder
    are gone before the model comes. Damaged windows are in neither cache where `data.on_corrupt` says so.
    """
    folder = Path(config.data.cache or output / "latents")
    splits = [training, held_out] if len(held_out) else [training]
    sigma_px, source = config.data.heatmap_sigma_px, config.base.codec or config.base.source
    digest = codec_digest(source, config.data.text_tokens)
    if is_main and not all(is_complete(folder, split, digest, sigma_px) for split in splits):
        codec = LatentCodec.load(source, config.data.text_tokens, device)
        for split in splits:
            build_cache(split, codec, folder, sigma_px, workers=config.train.num_workers)
        del codec
    wait_for_everyone()
    caches = [LatentCache.open(folder, split, digest, sigma_px) for split in splits]
    return caches[0], caches[1] if len(caches) > 1 else None


def fit_reader(config: Config, cache: LatentCache, show: Callable[[str], Any]) -> HeatReader:
    """The layers that read heat from latents, fitted to plain windows of the training split, evenly spread, and not too many.

    `show` is told how well it reads. A pure function of the cached latents and their labels.
    """
    dataset = cache.dataset
    of_one = cache.heat(0)[:, 0, 1:].numel()
    chosen = spread(len(dataset), min(_READER_WINDOWS, max(2, _READER_LATENTS // of_one)))

    def clips() -> Iterator[Clips]:
        for index in chosen:
            uv_px, visible = dataset.places(index)
            yield Clips(latents=cache.heat(index * dataset.num_variants), uv_px=uv_px, visible=visible)

    reader, quality = fit_heat_reader(clips(), config.data.heatmap_sigma_px)
    show(str(quality))
    return reader


def micro_batches(config: Config, cache: LatentCache, num_processes: int, process: int, first_step: int) -> Iterator[Batch]:
    """The micro-batches of one process from `first_step` to the end. Raises the `MvwanError` of an entry that cannot be read."""
    items = _items(config.train, config.seed, len(cache), num_processes, process, first_step)
    numbers: Any = range(len(cache))  # the loader deals in item numbers; the cache makes a batch of them, in a worker if there is one
    workers: dict[str, Any] = {"num_workers": config.train.num_workers, "worker_init_fn": _outlive_sigterm}
    for batch in DataLoader(numbers, batch_sampler=items, collate_fn=_BatchOrError(cache, config), **workers):
        if isinstance(batch, MvwanError):
            raise batch
        yield batch


def _outlive_sigterm(_: int) -> None:
    """In a worker: the trainer, which finishes its step and saves, needs it when a whole group of processes is asked to stop."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _BatchOrError:
    """Makes a batch of item numbers. An error is returned: raised in a worker, torch would wrap it into a traceback."""

    def __init__(self, cache: LatentCache, config: Config) -> None:
        self._cache, self._with_rays = cache, config.model.view_code != "slot"

    def __call__(self, items: Sequence[int]) -> Batch | MvwanError:
        try:
            return self._cache.batch(items, self._with_rays)
        except MvwanError as error:
            return error


def _items(train: TrainConfig, seed: int, num_items: int, num_processes: int, process: int, first_step: int) -> Iterable[list[int]]:
    """Item numbers of each micro-batch of one process. The windows of a step are the same however processes and micro-batches cut it."""
    for step in range(first_step, train.steps):
        shape = (train.gradient_accumulation, num_processes, train.batch_size)
        yield from global_indices(seed, step, math.prod(shape), num_items).reshape(shape)[:, process].tolist()


def left_out(episodes: Episodes, caches: Sequence[LatentCache | None]) -> dict[str, list[dict[str, str]]]:
    """`episodes` and `windows` that are damaged and left out, each with its name and the reason: what `skipped.json` holds."""
    windows = [window for cache in caches if cache is not None for window in cache.skipped]
    return {"episodes": [asdict(episode) for episode in episodes.left_out], "windows": [asdict(window) for window in windows]}


def in_words(skipped: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    """How many are left out and why the first of them is; nothing when none is."""
    reasons = [one["reason"] for kind in skipped.values() for one in kind]
    counts = " and ".join(f"{len(kind)} {name}" for name, kind in skipped.items() if kind)
    return f"data.on_corrupt=skip: {counts} left out as damaged. The first: {reasons[0]}" if reasons else ""


def first_windows(training: WindowDataset, config: Config, items_per_step: int, at_most: int = 4) -> np.ndarray:
    """[H W 3] uint8: the windows of the first step, as `sheet` shows them."""
    items = global_indices(config.seed, 0, items_per_step, len(training) * training.num_variants)
    return sheet(training, items.tolist()[:at_most])


def sheet(windows: WindowDataset, items: Sequence[int]) -> np.ndarray:
    """[H W 3] uint8: items (window * variants + variant), a row per item and view, frames from left to right, heatmaps laid over them."""
    rows, sigma_px = [], windows.data.heatmap_sigma_px
    for item in items:
        sample = windows.sample(*divmod(item, windows.num_variants))
        height_px, width_px = sample.rgb.shape[2:4]
        share = 0.8 * render(sample.uv_px, sample.visible, height_px, width_px, sigma_px)[..., None]
        blend = (sample.rgb * (1 - share) + heat_video(sample, sigma_px) * share).round().astype(np.uint8)
        rows.append(blend[:, list(pictures.columns_shown(blend.shape[1]))])
    return pictures.grid(np.concatenate(rows))
