"""The way of the data and of a run, timed: pictures to latents to steps, checkpoints beside the disk, the start, predictions.

The demonstration is made up: noise, seen by cameras that do not matter. Knows no table: it gives rows as plain dicts.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mvwan import flow
from mvwan.bench_networks import Sizes, autocast, untrained
from mvwan.cameras import Camera
from mvwan.checkpoint import load_trained, save_checkpoint
from mvwan.config import Config
from mvwan.data.dataset import WindowDataset, episodes_of
from mvwan.data.lerobot import write_dataset
from mvwan.errors import MvwanError
from mvwan.files import write_json
from mvwan.heat_reader import HeatReader
from mvwan.latent_cache import build_cache
from mvwan.model.latents import LatentCodec
from mvwan.optimizer import make_optimizer, optimizer_tensors
from mvwan.run_manifest import run_manifest
from mvwan.sample import denoise
from mvwan.shapes import num_frames_of
from mvwan.training_module import HeatmapWanTrainingModule

Rows = list[dict[str, Any]]
_WINDOWS = 8
_DENOISE_STEPS = (1, 5, 50)
_PX_PER_LATENT = 16


def measure_pipeline(config: Config, sizes: Sizes, folder: Path, repeats: int, seed: int) -> dict[str, Rows]:
    """Title -> rows, each with what `bench.Row` takes. `folder` is written to."""
    frames = num_frames_of(sizes.latent_frames)
    data = replace(
        config.data,
        root=str(write_demonstration(folder / "demonstration", config, sizes)),
        num_frames=frames,
        frame_interval=1,
        past_end=0,
        window_stride=1,
        height_px=sizes.latent_height * _PX_PER_LATENT,
        width_px=sizes.latent_width * _PX_PER_LATENT,
        validation_share=0.0,
    )
    config = replace(config, data=data, train=replace(config.train, batch_size=sizes.batch))
    windows = WindowDataset(episodes_of(data), data, config.model.views, "train", config.seed)
    return {
        "Windows: with a latent cache, and encoding every step": _windows(config, windows, folder, repeats, seed),
        "Checkpoints beside the disk": _checkpoints(config, windows, folder, max(1, repeats // 2)),
        "Start and predictions": [*_start(config, folder), *_predictions(config, sizes, seed)],
    }


def write_demonstration(root: Path, config: Config, sizes: Sizes) -> Path:
    """`root`, a dataset of one made-up demonstration with `_WINDOWS` windows."""
    frames = num_frames_of(sizes.latent_frames) + _WINDOWS - 1
    height, width = (side * _PX_PER_LATENT for side in (sizes.latent_height, sizes.latent_width))
    intrinsics, pose = np.array([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1.0]]), np.eye(4)
    pose[2, 3] = 1.0
    names = [f"camera{index}" for index in range(sizes.views)]
    cameras = [Camera(name=name, width_px=width, height_px=height, intrinsics=intrinsics, world_to_camera=pose) for name in names]
    draw = np.random.default_rng(0)
    point_m = np.linspace([-0.2, -0.2, 0.0], [0.2, 0.2, 0.1], frames)
    with write_dataset(root, cameras=cameras, fps=10, action_names=("dx", "dy"), robot_type="none") as writer:
        writer.add_episode(
            name="noise",
            instruction="move",
            layout_seed=0,
            rgb=draw.integers(0, 256, (sizes.views, frames, height, width, 3), np.uint8),
            point_m=point_m,
            hand_m=point_m,
            gripper_open=np.ones(frames),
            action=np.zeros((frames, 2)),
            success=np.ones(frames, bool),
        )
    return root


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def _row(what: str, values: list[float], unit: str, beside: tuple[str, list[float]] | None = None, note: str = "") -> dict[str, Any]:
    middle = statistics.median(values)
    ratio = None if beside is None else middle / statistics.median(beside[1])
    spread = {"low": min(values), "high": max(values)}
    return {"what": what, "value": middle, "unit": unit, **spread, "ratio": ratio, "beside": beside[0] if beside else "", "note": note}


def _windows(config: Config, windows: WindowDataset, folder: Path, repeats: int, seed: int) -> Rows:
    codec, sigma_px = LatentCodec.load(config.base.source, config.data.text_tokens), config.data.heatmap_sigma_px
    module = HeatmapWanTrainingModule(config=config, print_banners=False)
    optimizer, train = make_optimizer(module, config.train), config.train
    batch_size = min(train.batch_size, len(windows))
    items = list(range(batch_size))
    of_step = windows.without(range(batch_size, len(windows)))
    cache = build_cache(of_step, codec, folder / "latents", sigma_px, progress=False)
    built: list[float] = []
    made = iter(range(10**6))

    def step(number: int, read: Callable[[], Any]) -> None:
        with autocast(config):
            sums = module(read(), seed, number)
        counts = sums.rgb_count.sum(), sums.heat_count.sum(), train.rgb_weight, sums.gripper_count.sum()
        flow.total_loss(sums, *counts, action_weight=train.action_weight).backward()
        optimizer.step()
        optimizer.zero_grad()

    def encoded_anew() -> Any:
        seconds, fresh = _timed(lambda: build_cache(of_step, codec, folder / f"latents-{next(made)}", sigma_px, progress=False))
        built.append(batch_size / seconds)
        return fresh.batch(items)

    step(0, lambda: cache.batch(items))
    cached, uncached, read = [], [], []
    for number in range(1, repeats + 1):
        cached.append(batch_size / _timed(lambda number=number: step(number, lambda: cache.batch(items)))[0])
        uncached.append(batch_size / _timed(lambda number=number: step(number, encoded_anew))[0])
        read.append(batch_size / _timed(lambda: cache.batch(items))[0])
    name = "training, encoding every step"
    return [
        _row(name, uncached, "windows/s", note=f"{batch_size} windows per step"),
        _row("training from the latent cache", cached, "windows/s", (name, uncached)),
        _row("encoding into a cache", built, "windows/s"),
        _row("reading the cache alone", read, "windows/s"),
    ]


def _checkpoints(config: Config, windows: WindowDataset, folder: Path, repeats: int) -> Rows:
    module = HeatmapWanTrainingModule(config=config, print_banners=False)
    manifest = run_manifest(config, 1, "one process", windows) | {"groups": module.saved_groups()}
    optimizer = make_optimizer(module, config.train)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    def save(number: int) -> Path:
        moments, updates = optimizer_tensors(optimizer, module)
        return save_checkpoint(folder / f"saved-{number}", 1, module.saved_tensors(), manifest, moments, {"updates": updates})

    saves, loads, writes, reads = [], [], [], []
    size = 0
    for number in range(repeats):
        seconds, saved = _timed(lambda number=number: save(number))
        size = sum(path.stat().st_size for path in saved.iterdir())
        trained = (saved / "trained.safetensors").stat().st_size
        raw = folder / f"raw-{number}"
        whole = os.urandom(2**20) * (size // 2**20 + 1)
        writes.append(_timed(lambda raw=raw, whole=whole: _write_through(raw, whole))[0])
        reads.append(_timed(lambda raw=raw, trained=trained: _read(raw, trained))[0])
        saves.append(seconds)
        loads.append(_timed(lambda saved=saved: {name: tensor.clone() for name, tensor in load_trained(saved).tensors.items()})[0])
        raw.unlink()
    size_mb, disk = size / 2**20, "the disk alone"
    return [
        _row(f"{disk}, writing as much", writes, "s", note=f"{size_mb:.1f} MB, to the platter"),
        _row("saving a checkpoint with its optimizer", saves, "s", (disk, writes), note="with digests, to the platter"),
        _row(f"{disk}, reading as much", reads, "s", note="from the file cache"),
        _row("loading the trained tensors", loads, "s", (disk, reads), note="with digests"),
    ]


def _write_through(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path, size: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(size)


def _start(config: Config, folder: Path) -> Rows:
    """Seconds from the command to its first finished step, the latents being there."""
    settings = folder / "start.yaml"
    train = replace(config.train, steps=2, movement_step=2, tracker="none", evaluate_every=0, gradient_accumulation=1, batch_size=1)
    config = replace(config, train=train, data=replace(config.data, cache=str(folder / "start-latents")))
    write_json(settings, config.to_dict())
    seconds = []
    for attempt in ("encodes", "starts"):
        run = folder / f"start-{attempt}"
        command = [sys.executable, "-m", "mvwan", "train", "--config", str(settings), "--output", str(run)]
        start, log = time.perf_counter(), run / "metrics.jsonl"
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            while process.poll() is None and not (log.is_file() and '"train"' in log.read_text(encoding="utf-8")):
                time.sleep(0.02)
            seconds.append(time.perf_counter() - start)
            said = process.communicate()[1]
        if process.returncode:
            last = (said.strip().splitlines() or ["no message"])[-1]
            raise MvwanError(f"bench: `mvwan train` ended with code {process.returncode}: {last}. Leave the part pipeline out by --part.")
    return [_row("from `mvwan train` to its first step", seconds[1:], "s", note="imports, base, latents there already")]


def _predictions(config: Config, sizes: Sizes, seed: int) -> Rows:
    model = untrained(config)
    shape = (1, sizes.views, 2 * model.config["in_channels"], 1, sizes.latent_height, sizes.latent_width)
    given = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    text = torch.zeros(1, sizes.text_tokens, model.config["text_dim"])
    rows: Rows = []
    one: list[float] = []
    for steps in _DENOISE_STEPS:
        times = [
            _timed(
                lambda steps=steps: denoise(
                    model, given, text, sizes.latent_frames, denoise_steps=steps, seed=seed, shift=5.0, precision=config.train.precision
                )
            )[0]
            for _ in range(2 if steps > 5 else 3)
        ]
        one = one or times
        rows.append(_row(f"latents of a prediction, {steps} denoising steps", times, "s", ("1 step", one)))
    codec = LatentCodec.load(config.base.source, config.data.text_tokens)
    videos = torch.randn(2 * sizes.views, 48, sizes.latent_frames, sizes.latent_height, sizes.latent_width)
    decoding = [_timed(lambda: codec.decode_video(videos))[0] for _ in range(3)]
    rows.append(_row("decoding them, all views and streams", decoding, "s"))
    channels = videos.shape[1]
    reader = HeatReader(torch.randn(16, 3 * channels, 3, 3), torch.randn(16), torch.randn(16, 2 * channels, 3, 3), torch.randn(16))
    reading = [_timed(lambda: reader.pictures(videos[: sizes.views]))[0] for _ in range(3)]
    rows.append(_row("reading the heat of all views from them, without the VAE", reading, "s", ("decoding them", decoding)))
    return rows
