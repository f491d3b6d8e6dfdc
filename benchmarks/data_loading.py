"""How fast windows become a latent cache and are read back: a way without shared pictures and shards beside the one in use.

    python benchmarks/data_loading.py data/drawer --preset tiny --windows 40 --rounds 5

Prints a Markdown table. Ways are measured in turn, round after round, so that what else the machine does meets both alike; the median
of the rounds counts. Seconds are of this process's processor where nothing else is said. Writes to a temporary folder only.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from mvwan.cli import Door
from mvwan.cli_settings import Preset, Settings
from mvwan.config import parse_overrides
from mvwan.data.dataset import WindowDataset, episodes_of, heat_video
from mvwan.errors import MvwanError
from mvwan.latent_cache import WINDOW, Keys, build_cache, is_complete, read_entry, write_entry
from mvwan.latent_shards import Shards
from mvwan.model.latents import LatentCodec
from mvwan.presets import config_from_preset
from mvwan.tensors import digest

app = typer.Typer(cls=Door, help=__doc__, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

Way = Callable[[], object]


@app.command()
def main(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a dataset.")],
    preset_name: Preset = "tiny",
    settings: Settings = None,
    windows: Annotated[int, typer.Option("--windows", min=2, help="Windows to measure with, at most: the first ones.")] = 40,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Times that each way is measured.")] = 5,
) -> None:
    """Measures and prints."""
    config = config_from_preset(preset_name, parse_overrides(settings or []), {"data": {"root": str(folder)}}, where="settings")
    data, sigma_px = config.data, config.data.heatmap_sigma_px
    whole = WindowDataset(episodes_of(data), data, config.model.views, "train", config.seed)
    dataset = whole.without(range(windows, len(whole)))
    codec = LatentCodec.load(config.base.codec or config.base.source, data.text_tokens)
    items = range(len(dataset))
    with tempfile.TemporaryDirectory() as place:
        shared, alone = Path(place) / "shards", Path(place) / "files"
        cache = build_cache(dataset, codec, shared, sigma_px, progress=False)
        keys, shards = Keys(shared, dataset, codec.digest, sigma_px), Shards(shared, WINDOW)
        places = keys.find(shards)[0].tolist()
        files = [Keys(alone, dataset, codec.digest, sigma_px).file(item) for item in items]
        for path, at in zip(files, places, strict=True):
            write_entry(path, shards.read(at))
        builds = iter(range(10**6))

        def pixels_alone() -> None:
            for index in items:
                heat_video(dataset.sample(index), sigma_px)

        def pixels_shared() -> None:
            for _, sample in dataset.samples(items):
                if isinstance(sample, MvwanError):
                    raise sample
                heat_video(sample, sigma_px)

        def build_alone() -> None:
            folder = Path(place) / f"alone-{next(builds)}"
            for index in items:
                sample = dataset.sample(index)
                rgb, heat = codec.encode_video(np.concatenate([sample.rgb, heat_video(sample, sigma_px)])).chunk(2)
                write_entry(folder / f"{index}.safetensors", {"rgb": rgb.contiguous(), "heat": heat.contiguous()})

        def build(workers: int) -> Way:
            return lambda: build_cache(dataset, codec, Path(place) / f"build-{next(builds)}", sigma_px, False, workers)

        rows = [
            ("pixels of a window", "each alone", pixels_alone, "shared pictures decoded once", pixels_shared, False),
            ("encoding a window", "each alone, a file each", build_alone, "in use", build(0), False),
            ("encoding a window, wall time", "no worker", build(0), "1 worker", build(1), True),
            (
                "reading an entry and comparing its digest",
                "a file each",
                lambda: [read_entry(path, WINDOW) for path in files],
                "from a shard",
                lambda: [shards.read(at) for at in places],
                False,
            ),
            (
                "finding all complete at the start, per entry",
                "every entry read",
                lambda: [read_entry(path, WINDOW) for path in files],
                "shards that changed are read",
                lambda: is_complete(shared, dataset, codec.digest, sigma_px),
                False,
            ),
        ]
        print(f"{len(items)} windows, entries of {cache.batch([0]).latents.nbytes / 2**20:.2f} MB, {torch.get_num_threads()} threads\n")
        print("| | before | ms | now | ms | before / now |\n| --- | --- | ---: | --- | ---: | ---: |")
        for name, old_name, old, new_name, new, wall in rows:
            times = [(_seconds(old, wall), _seconds(new, wall)) for _ in range(rounds)]
            before, now = (statistics.median(side) * 1000 / len(items) for side in zip(*times, strict=True))
            print(f"| {name} | {old_name} | {before:.2f} | {new_name} | {now:.2f} | {before / now:.2f} |", flush=True)
        entry = shards.read(places[0])
        hashing = statistics.median(_seconds(lambda: digest(entry), False) for _ in range(20)) * 1000
        print(f"\nDigest of an entry: {hashing:.2f} ms.", _batched(dataset, codec, sigma_px))


def _seconds(way: Way, wall: bool) -> float:
    clock = time.perf_counter if wall else time.process_time
    start = clock()
    way()
    return clock() - start


def _batched(dataset: WindowDataset, codec: LatentCodec, sigma_px: float) -> str:
    """Whether a window's bits depend on what is encoded together with it."""
    samples = [dataset.sample(index) for index in range(2)]
    videos = np.concatenate([part for sample in samples for part in (sample.rgb, heat_video(sample, sigma_px))])
    together = codec.encode_video(videos)
    parts = {
        size: torch.cat([codec.encode_video(part) for part in np.split(videos, len(videos) // size)]) for size in (1, len(videos) // 2)
    }
    told = [f"{size} in a call {float((part - together).abs().max()):.1e}" for size, part in parts.items()]
    return f"Largest difference to the latents of {len(videos)} videos encoded in one call: {', '.join(told)}."


if __name__ == "__main__":
    app()
