"""Squared gradients of single windows and short trainings of some parameters, each made once and kept as a line of a file.

A training here copies what it trains and puts the original back: whatever is measured first or last, the model is the same to the bit. See
`sensitivity` for what the numbers mean. Knows no group's worth, no budget and no ranking.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from mvwan.batch import Batch
from mvwan.checkpoint import find_checkpoint, read_manifest
from mvwan.config import Config
from mvwan.data.dataset import WindowDataset, global_indices
from mvwan.errors import MvwanError
from mvwan.files import json_line, plain_words, read_json_lines, sha256_file, sha256_json, write_file
from mvwan.latent_cache import LatentCache
from mvwan.model.latents import codec_digest
from mvwan.model.surgery import share_copies
from mvwan.model.trainable import parameters_by_name
from mvwan.model.wan import base_digest
from mvwan.sensitivity_candidates import Candidate, block_of, candidates_of, load_module
from mvwan.train import HELD_OUT_STEP
from mvwan.train_data import fit_reader, latent_caches
from mvwan.training_module import HeatmapWanTrainingModule

_FORMAT = 2
"""Raised whenever the code changes what a line of probes.jsonl holds or how it is measured."""
LINES = "probes.jsonl"
_DRAWS = 2
"""Draws of sigma and noise per held-out window."""
_BLOCK_DRAWS = 1


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user chooses beside the settings of a training."""

    batches: int = 8
    """Batches of `train.batch_size` windows whose gradients are squared, window by window."""
    probe_steps: int = 30
    learning_rates: tuple[float, ...] = (3e-4, 3e-3)
    budget: int | None = None
    """Parameters; None with `budget_mb` None: as many as the settings train."""
    budget_mb: float | None = None
    """10^6 bytes."""

    def __post_init__(self) -> None:
        if self.batches < 1 or self.probe_steps < 1:
            raise MvwanError(f"--batches {self.batches}, --probe-steps {self.probe_steps}: both must be at least 1")
        rates = self.learning_rates
        if not rates or len(set(rates)) < len(rates) or not all(math.isfinite(rate) and rate > 0 for rate in rates):
            raise MvwanError(f"--learning-rates {list(rates)}: needs different numbers above 0, for example 3e-4,3e-3")
        for name, value in (("--budget", self.budget), ("--budget-mb", self.budget_mb)):
            if value is not None and not value > 0:
                raise MvwanError(f"{name} {value:g}: must be more than 0")


# ── losses, gradients, short trainings ────────────────────────────────────────────────────────────────────────────────────────────


def window_losses(module: HeatmapWanTrainingModule, batch: Batch, step: int) -> torch.Tensor:
    """[B] float32: the loss of each window with the sigma and noise of (settings' seed, `step`, sample id). What has no label adds 0."""
    train = module.config.train
    with torch.autocast(batch.rgb.device.type, torch.bfloat16, enabled=train.precision == "bf16"):
        found = module(batch, module.config.seed, step)
    weights = torch.tensor([train.rgb_weight, 1 - train.rgb_weight, train.action_weight, train.action_weight])
    return (weights[:, None].to(found.sums.device) * found.sums / found.counts.clamp(min=1)).sum(0)


@contextmanager
def training_only(module: HeatmapWanTrainingModule, names: Sequence[str]) -> Iterator[dict[str, nn.Parameter]]:
    """{name: parameter} of those that train in this block, as float32 copies; afterwards all is as before, to the bit.

    What was there is never written to: it is put aside and put back. So nothing that shares its memory moves either.
    """
    every = parameters_by_name(module.model)
    held = {name: every[name].data for name in names}
    trained_before = [parameter for parameter in every.values() if parameter.requires_grad]
    try:
        for parameter in trained_before:
            parameter.requires_grad_(False)
        for name, data in held.items():
            every[name].data = data.detach().to(torch.float32, copy=True)
            every[name].requires_grad_(True)
        yield {name: every[name] for name in names}
    finally:
        for name, data in held.items():
            every[name].grad = None
            every[name].data = data
            every[name].requires_grad_(False)
        for parameter in trained_before:
            parameter.requires_grad_(True)


def squared_gradients(
    module: HeatmapWanTrainingModule, names: Sequence[str], windows: Iterable[tuple[Batch, int]], tick: Callable[[], Any] = lambda: None
) -> dict[str, float]:
    """Name -> mean over `windows`, (batch of one window, step), of the sum of the squares of its gradient. `MvwanError` for NaN."""
    totals, count = dict.fromkeys(names, 0.0), 0
    with training_only(module, names) as parameters:
        for batch, step in windows:
            assert len(batch.sample_ids) == 1, "a gradient of several windows is another thing"
            loss = window_losses(module, batch, step).sum()
            if not math.isfinite(loss.item()):
                raise MvwanError(f"the loss of {batch.sample_ids[0]} is NaN or infinite before any training. Look at it in the data.")
            loss.backward()
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    totals[name] += float(parameter.grad.square().sum(dtype=torch.float64))
                    parameter.grad = None
            count += 1
            tick()
    return {name: total / count for name, total in totals.items()}


@torch.no_grad()
def held_out_losses(module: HeatmapWanTrainingModule, batches: Sequence[Batch], draws: int = _DRAWS) -> np.ndarray:
    """[windows] float64: the mean loss of each window over `draws` draws of sigma and noise that no training step has."""
    rounds = [torch.cat([window_losses(module, batch, HELD_OUT_STEP - draw) for batch in batches]) for draw in range(draws)]
    return torch.stack(rounds).double().mean(0).cpu().numpy()


def _clear_beyond(parameters: Mapping[str, nn.Parameter], ranks: Mapping[str, int]) -> None:
    """Nothing; of the adapters named in `ranks` only the first directions have a gradient, so Adam leaves the others alone."""
    for name, rank in ranks.items():
        gradient = parameters[name].grad
        if gradient is not None:
            (gradient if ".lora_A." in name else gradient.T)[rank:] = 0


def train_shortly(
    module: HeatmapWanTrainingModule,
    parameters: Mapping[str, nn.Parameter],
    steps: Iterator[Sequence[Batch]],
    rate: float,
    ranks: Mapping[str, int],
    tick: Callable[[], Any] = lambda: None,
) -> bool:
    """Whether every loss was finite, after AdamW on `parameters` alone, an update per item of `steps` (its micro-batches)."""
    train = module.config.train
    optimizer = torch.optim.AdamW(parameters.values(), lr=rate, betas=train.adam_betas, weight_decay=0.0)
    for step, batches in enumerate(steps):
        size = sum(len(batch.sample_ids) for batch in batches)
        total = 0.0
        for batch in batches:
            loss = window_losses(module, batch, step).sum() / size
            if loss.requires_grad:
                loss.backward()
            total += loss.item()
        _clear_beyond(parameters, ranks)
        norm = nn.utils.clip_grad_norm_(parameters.values(), train.max_gradient_norm or math.inf)
        if not math.isfinite(total) or not math.isfinite(float(norm)):
            return False
        optimizer.step()
        optimizer.zero_grad()
        tick()
    return True


# ── measured once ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Measurements:
    """Those of one folder, each made once: a line that is there is not measured again."""

    def __init__(self, config: Config, output: Path, options: Options, training: WindowDataset, held_out: WindowDataset) -> None:
        device = (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None) or torch.device("cpu")
        caches = latent_caches(config, output, training, held_out, device, True, lambda: None)
        assert caches[1] is not None, "checked by `_datasets`"
        self.options, self.device = options, device
        self.windows: LatentCache = caches[0]
        self.module = load_module(config, device)
        self.module.quantize_frozen()
        if config.train.heat_reader_weight:
            self.module.reader = fit_reader(config, self.windows, lambda _: None).to(device)
        share_copies(self.module.model)
        self.module.requires_grad_(False).eval()
        self.config = self.module.config
        self.candidates = candidates_of(self.module, config)
        self.held_out = self._held_out_batches(caches[1])
        self._path = output / LINES
        self._lines: dict[str, Any] = {line["key"]: line for line in read_json_lines(self._path)}
        write_file(self._path, "".join(map(json_line, self._lines.values())))  # without a last line that a killed one left unfinished
        self._common = self._key_of_everything(config, self.windows, caches[1])
        self._trained: dict[str, torch.Tensor] = {}
        """What the latest probe that ran trained, where blocks are to be told apart."""
        self.bar: tqdm[Any] | None = None

    def _held_out_batches(self, cache: LatentCache) -> list[Batch]:
        train = self.config.train
        chosen = np.unique(np.linspace(0, len(cache) - 1, train.evaluate_windows).round().astype(int)).tolist()
        return [self._batch(cache, chosen[start : start + train.batch_size]) for start in range(0, len(chosen), train.batch_size)]

    def _batch(self, cache: LatentCache, items: Sequence[int]) -> Batch:
        return cache.batch(items, self.config.model.view_code != "slot").check().to(self.device)

    def _key_of_everything(self, config: Config, training: LatentCache, held_out: LatentCache) -> str:
        """The hash of what every measurement depends on, but for its own parameters, rate and steps."""
        values, start = self.config.to_dict(), config.train.from_checkpoint
        found = None if start is None else find_checkpoint(start)
        names = ("batch_size", "gradient_accumulation", "adam_betas", "max_gradient_norm", "rgb_weight", "action_weight")
        names = (*names, "heat_reader_weight", "precision", "condition_frames", "evaluate_windows")
        return sha256_json(
            {
                "format": _FORMAT,
                "base": [
                    base_digest(config.base.source, config.base.random_weights, config.seed),
                    *(values["base"][name] for name in ("dtype", "quantize")),
                ],
                "start": None if found is None else sha256_file(found) if found.is_file() else sha256_json(read_manifest(found)),
                "model": values["model"],
                "lora": [config.trainable.lora.rank, config.trainable.lora.alpha],
                "flow": values["flow"],
                "train": {name: values["train"][name] for name in names},
                "seed": config.seed,
                "data": [cache.dataset.fingerprint for cache in (training, held_out)],
                "latents": [codec_digest(config.base.codec or config.base.source, config.data.text_tokens), config.data.heatmap_sigma_px],
            }
        )

    def _once(self, what: Mapping[str, Any], ticks: int, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The line of `what`, measured now or read."""
        key = sha256_json([self._common, dict(what)])
        if key in self._lines:
            self._tick(ticks)
            return self._lines[key]
        start = time.perf_counter()
        line = {"key": key, **{name: what[name] for name in ("kind", "name", "rate") if name in what}, **measure()}
        line["seconds"] = round(time.perf_counter() - start, 2)
        with plain_words(self._path), open(self._path, "a", encoding="utf-8") as file:
            file.write(json_line(line))
        self._lines[key] = line
        return line

    def _tick(self, count: int = 1) -> None:
        if self.bar is not None:
            self.bar.update(count)

    def fisher(self) -> dict[str, float]:
        """Name -> mean square of its gradient, summed over the tensor, of every candidate's parameters."""
        names = [name for candidate in self.candidates for name in candidate.names]
        train, batches = self.config.train, self.options.batches
        items = [(item, step) for step in range(batches) for item in self._items(step, train.batch_size)]

        def measure() -> dict[str, Any]:
            windows = ((self._batch(self.windows, [item]), step) for item, step in items)
            return {"squares": squared_gradients(self.module, names, windows, self._tick)}

        what = {"kind": "fisher", "name": "all candidates", "names": names, "batches": batches}
        return self._once(what, len(items), measure)["squares"]

    def _items(self, step: int, size: int) -> list[int]:
        return global_indices(self.config.seed, step, size, len(self.windows)).tolist()

    def _steps(self) -> Iterator[list[Batch]]:
        train = self.config.train
        for step in range(self.options.probe_steps):
            items = self._items(step, train.batch_size * train.gradient_accumulation)
            yield [self._batch(self.windows, items[start : start + train.batch_size]) for start in range(0, len(items), train.batch_size)]

    @cached_property
    def start(self) -> np.ndarray:
        """[windows] held-out losses before any training."""
        line = self._once({"kind": "start"}, 0, lambda: {"losses": held_out_losses(self.module, self.held_out).tolist()})
        return np.array(line["losses"])

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Name -> how many numbers that parameter holds."""
        return {name: parameter.numel() for name, parameter in parameters_by_name(self.module.model).items()}

    def probe(self, name: str, parts: Sequence[Candidate], blocks: bool = False) -> dict[str, Any]:
        """The line of the best learning rate of a probe of `parts` together: `rate`, `losses` [windows], `blocks`; and `rates`.

        `blocks`: also what each block is worth, where there are several. Where every rate ended in NaN, `losses` is None.
        """
        names = list(dict.fromkeys(one for part in parts for one in part.names))
        ranks = {one: part.rank for part in parts if part.rank is not None for one in part.names}
        asked = {"name": name, "names": names, "ranks": ranks, "steps": self.options.probe_steps}
        lines: list[dict[str, Any]] = []
        kept: dict[str, torch.Tensor] = {}
        for rate in sorted(self.options.learning_rates):
            self._trained = {}
            what = {"kind": "probe", **asked, "rate": rate}
            lines.append(self._once(what, self.options.probe_steps, lambda rate=rate: self._run(names, ranks, rate, blocks)))
            if _mean(lines[-1]) == min(map(_mean, lines)):
                kept = self._trained
        best = lines[np.argmin([_mean(line) for line in lines])]
        self._trained = {}
        rates = {f"{line['rate']:g}": None if line["losses"] is None else _mean(line) for line in lines}
        worths: dict[str, float] = {}
        if blocks and best["losses"] is not None and len({block_of(name) for name in names} - {None}) > 1:
            what = {"kind": "blocks", **asked, "rate": best["rate"]}
            worths = self._once(what, 0, lambda: {"blocks": self._block_worths(names, ranks, best["rate"], kept)})["blocks"]
        return {**best, "rates": rates, "blocks": worths}

    def _run(self, names: Sequence[str], ranks: Mapping[str, int], rate: float, keep: bool) -> dict[str, Any]:
        with training_only(self.module, names) as parameters:
            finite = train_shortly(self.module, parameters, self._steps(), rate, ranks, self._tick)
            losses = held_out_losses(self.module, self.held_out)
            self._trained = {name: parameter.data for name, parameter in parameters.items()} if keep else {}
        return {"losses": losses.tolist() if finite and np.isfinite(losses).all() else None}

    def _block_worths(
        self, names: Sequence[str], ranks: Mapping[str, int], rate: float, trained: Mapping[str, torch.Tensor]
    ) -> dict[str, float]:
        """Block -> what the mean held-out loss rises by when that block alone goes back to its start.

        `trained` are the values after the probe; empty: it is run again.
        """
        members: dict[int, list[str]] = {}
        for name in names:
            if (block := block_of(name)) is not None:
                members.setdefault(block, []).append(name)
        worths: dict[str, float] = {}
        with training_only(self.module, names) as parameters:
            start = {name: parameter.data.clone() for name, parameter in parameters.items()}
            if not trained:
                train_shortly(self.module, parameters, self._steps(), rate, ranks)
            for name, data in trained.items():
                parameters[name].data = data
            after = held_out_losses(self.module, self.held_out, _BLOCK_DRAWS).mean()
            for block, own in sorted(members.items()):
                reached = {name: parameters[name].data for name in own}
                for name in own:
                    parameters[name].data = start[name]
                worths[str(block)] = float(held_out_losses(self.module, self.held_out, _BLOCK_DRAWS).mean() - after)
                for name, data in reached.items():
                    parameters[name].data = data
        return worths


def _mean(line: Mapping[str, Any]) -> float:
    """The mean held-out loss of a probe's line, infinity when it ended in NaN."""
    return math.inf if line["losses"] is None else float(np.mean(line["losses"]))
