"""What is measured of one finished run of an ablation, per held-out episode: losses by sigma, predictions, trials, movement, costs.

Every run of a grid is measured on the same windows with the same noise, whatever its arm and learning rate, so that runs of one seed
can be compared episode by episode. Knows neither grid nor arm, and judges nothing.
"""

import hashlib
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mvwan import flow, metrics
from mvwan.baselines import Answer
from mvwan.batch import Sample
from mvwan.checkpoint import find_checkpoint, load_trained
from mvwan.closed_loop import TrialSettings, evaluate_closed_loop, is_widened, plan_trials
from mvwan.config import Config, FlowConfig
from mvwan.data.dataset import WindowDataset, episodes_of, kept_out, roots_of
from mvwan.data.windows import span_of, spread
from mvwan.errors import MvwanError
from mvwan.evaluate import answers_of, filled, predict_sample, save_prediction
from mvwan.files import read_json_lines
from mvwan.latent_cache import LatentCache
from mvwan.metrics import Tally
from mvwan.model.latents import codec_digest
from mvwan.model.trainable import adapted_weight, parameters_by_name, stock_name
from mvwan.policies import POLICIES
from mvwan.precision import default_device
from mvwan.sample import LoadedRun
from mvwan.training_module import HeatmapWanTrainingModule

Split = Literal["validation", "test"]
SPLITS: tuple[Split, ...] = ("validation", "test")
STREAMS = ("rgb", "heat")
NOISE_SEED, DRAWS = 0, 2
"""Of the noise that losses are measured with: `DRAWS` of it, each at a sigma of its own, in every band."""
_FIRST_STEP = -2
"""The step number of the first draw: neither training nor its held-out losses have it, so this noise is new to the run."""
_AT_ONCE = 8
"""Windows per forward pass; one number for all runs, whatever they trained with, so that sums round alike."""
_HORIZONS = 3


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number."""

    split: Split
    episode: str
    """Empty for an outcome of the run as a whole."""
    outcome: str
    value: float


def measured_windows(config: Config, test_dataset: str | Path | None, seeds: int) -> dict[Split, WindowDataset]:
    """The windows that choose a learning rate (`validation`) and those that arms are compared on (`test`), split by episode.

    With `test_dataset` the episodes held out of `config.data` validate and that folder tests; without it, the held-out episodes are
    halved, the larger half to test, and what tests in one of the grid's `seeds` validates in none: rates are chosen over all of them.
    Raises `MvwanError` when there are too few, or when a test episode is one of the run's own.
    """
    data, views, seed = config.data, config.model.views, config.seed
    episodes = episodes_of(data)
    held = WindowDataset(episodes, data, views, "validation", seed)
    names = {episode.name for episode in held.windows.used_episodes()}
    if test_dataset is not None:
        if not names:
            raise MvwanError(
                f"data.validation_share={data.validation_share:g} holds no episode out, so no learning rate can be chosen. Raise it."
            )
        further = episodes_of(data, test_dataset)
        if twice := {episode.demonstrated for episode in further} & {episode.demonstrated for episode in episodes}:
            raise MvwanError(
                f"--test-dataset {test_dataset}: {len(twice)} of its demonstrations are also in {' and '.join(roots_of(data.root))}. "
                "Record it with another --seed."
            )
        test = WindowDataset(further, replace(data, validation_share=1.0), views, "validation", seed)
        if not len(test):
            raise MvwanError(f"--test-dataset {test_dataset}: its episodes are all for training. Give another folder.")
        return {"validation": held, "test": test}
    if len(names) < 2:
        raise MvwanError(
            f"{len(names)} episodes are held out, two are needed: one to choose learning rates, one to compare arms. Raise "
            f"data.validation_share={data.validation_share:g}, or give --test-dataset with further demonstrations."
        )
    long_enough = {episode.name for episode in episodes if episode.num_frames + data.past_end >= span_of(data)}
    of_seeds = [kept_out(episodes, number, data.validation_share) & long_enough for number in range(max(seeds, seed + 1))]
    validation = names & _validating(of_seeds)
    if not 0 < len(validation) < len(names):
        raise MvwanError(
            f"seed {seed}: all {len(names)} episodes that it holds out {'choose rates' if validation else 'compare arms'} for other seeds. "
            f"Raise data.validation_share={data.validation_share:g}, or give --test-dataset with further demonstrations."
        )
    return {"validation": _of_episodes(held, validation), "test": _of_episodes(held, names - validation)}


def _validating(of_seeds: Sequence[Collection[str]]) -> set[str]:
    """Of the episodes that each seed holds out, those that validate: half of each seed's, as far as earlier seeds leave a choice."""
    decided, validation = set[str](), set[str]()
    for names in of_seeds:
        free = sorted(set(names) - decided, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        validation |= set(free[: max(0, len(names) // 2 - len(validation & set(names)))])
        decided |= set(names)
    return validation


def _of_episodes(windows: WindowDataset, names: set[str]) -> WindowDataset:
    chosen = np.array([episode.name in names for episode in windows.windows.episodes])
    return windows.without(np.flatnonzero(~chosen[windows.windows.episode_of]).tolist())


def open_cache(config: Config, folder: str | Path, windows: WindowDataset) -> LatentCache:
    """The latents of `windows` in the cache `folder`. Raises `MvwanError` when some are not there."""
    digest = codec_digest(config.base.codec or config.base.source, config.data.text_tokens)
    return LatentCache.open(folder, windows, digest, config.data.heatmap_sigma_px)


# ── losses ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def velocity_losses(
    run: Path, config: Config, caches: Mapping[Split, LatentCache], windows: int, rgb_weight: float, noise: FlowConfig
) -> list[Row]:
    """Mean squared velocity errors per episode of at most `windows` windows per split, of the newest checkpoint of `run`.

    `rgb_loss` and `heat_loss`, each also as `…@low-high` of every band of sigma that `noise` trains at, over which the former are
    means; and `velocity_loss`, w * rgb + (1 - w) * heat with the w given here. Weight and noise are those of the reference, for all
    arms. Raises `MvwanError` when a loss is NaN or infinite.
    """
    device = default_device()
    module = HeatmapWanTrainingModule(config=config, checkpoint=run, device=device, print_banners=False)
    module.quantize_frozen()
    module.eval()
    rows: list[Row] = []
    for split, cache in caches.items():
        of_episode: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        chosen = spread(len(cache), windows)
        for start in range(0, len(chosen), _AT_ONCE):
            items = chosen[start : start + _AT_ONCE]
            for item, losses in zip(items, _losses(module, cache, items, noise, device), strict=True):
                episode = cache.dataset.windows[item].episode.name
                for outcome, value in _with_means(losses, rgb_weight).items():
                    of_episode[episode][outcome].append(value)
        rows += [
            Row(split=split, episode=episode, outcome=outcome, value=statistics.fmean(values))
            for episode, outcomes in of_episode.items()
            for outcome, values in outcomes.items()
        ]
    if broken := [row for row in rows if not math.isfinite(row.value)]:
        raise MvwanError(f"{run}: {broken[0].outcome} of {broken[0].episode} is NaN or infinite; the model is no longer sound at this rate")
    return rows


@torch.inference_mode()
def _losses(
    module: HeatmapWanTrainingModule, cache: LatentCache, items: Sequence[int], noise: FlowConfig, device: torch.device
) -> list[dict[str, float]]:
    """Of each window: `<stream>_loss@<band>` -> mean squared error over all draws; without streams of which nothing counts."""
    batch = cache.batch(items, module.config.model.view_code != "slot").check().to(device)
    found: list[dict[str, float]] = [{} for _ in items]
    for low, high, band in flow.sigma_bands(noise):
        sums, counts = np.zeros((len(STREAMS), len(items))), np.zeros((len(STREAMS), len(items)))
        for draw in range(DRAWS):
            sigma = torch.full((len(items),), low + (draw + 0.5) / DRAWS * (high - low))
            with torch.autocast(device.type, torch.bfloat16, enabled=module.config.train.precision == "bf16"):
                errors = module(batch, NOISE_SEED, _FIRST_STEP - draw, sigma)
            sums += errors.sums[: len(STREAMS)].double().cpu().numpy()
            counts += errors.counts[: len(STREAMS)].cpu().numpy()
        for stream, of_stream, number in zip(STREAMS, sums, counts, strict=True):
            for window, total, count in zip(found, of_stream, number, strict=True):
                if count:
                    window[f"{stream}_loss@{band}"] = float(total / count)
    return found


def _with_means(losses: Mapping[str, float], rgb_weight: float) -> dict[str, float]:
    means = dict(losses)
    for stream in STREAMS:
        if of_bands := [value for name, value in losses.items() if name.startswith(f"{stream}_loss@")]:
            means[f"{stream}_loss"] = statistics.fmean(of_bands)
    if all(f"{stream}_loss" in means for stream in STREAMS):
        means["velocity_loss"] = rgb_weight * means["rgb_loss"] + (1 - rgb_weight) * means["heat_loss"]
    return means


# ── predictions and trials ────────────────────────────────────────────────────────────────────────────────────────────────────────


def prediction_errors(run: LoadedRun, test: WindowDataset, windows: int, denoise_steps: int, picture: Path) -> list[Row]:
    """Errors per test episode of predictions for at most `windows` windows; one of them is stored at `picture` (.npz).

    `peak_error_px`, also as `…@first-last` of a third of the predicted frames each; `error_3d_mm`; `rgb_psnr_db`. A peak or point that
    is not there counts as that of the last given frame. Raises `MvwanError` when no window can be read.
    """
    given = run.config.train.condition_frames
    first = metrics.num_given_frames(given)
    of_episode: dict[str, dict[str, Tally]] = defaultdict(lambda: defaultdict(Tally))
    chosen = spread(len(test), windows)
    for index in chosen:
        if (sample := test.readable_sample(index)) is None:
            continue
        prediction = predict_sample(run, sample, denoise_steps, seed=NOISE_SEED)
        answers = answers_of(run, sample, prediction, test.windows[index], None)
        tallies = of_episode[test.windows[index].episode.name]
        for name, views in _errors(sample, answers["predicted"], answers["hold_first"], given).items():
            tallies[name] = sum(views, tallies[name])
        if index == chosen[len(chosen) // 2]:
            save_prediction(picture, sample, prediction, run.config.data.heatmap_sigma_px)
    if not of_episode:
        raise MvwanError(f"data.on_corrupt=skip: none of the {len(chosen)} test windows can be read. Give another --test-dataset.")
    horizons = [part for part in np.array_split(np.arange(first, run.config.data.num_frames), _HORIZONS) if len(part)]
    rows: list[Row] = []
    for episode, tallies in of_episode.items():
        values = {"peak_error_px": tallies["peak_error_px"].mean, "error_3d_mm": tallies["error_3d_mm"].mean}
        for part in horizons if len(horizons) > 1 else ():
            errors = sum((tallies["peak_error_px"].at(frame) for frame in part.tolist()), Tally())
            values["peak_error_px@" + "-".join(map(str, dict.fromkeys((part[0], part[-1]))))] = errors.mean
        values["rgb_psnr_db"] = metrics.psnr_db(tallies["rgb_squared_error"].mean)
        rows += [
            Row(split="test", episode=episode, outcome=outcome, value=value) for outcome, value in values.items() if math.isfinite(value)
        ]
    return rows


def _errors(sample: Sample, answer: Answer, held: Answer, given: int) -> dict[str, tuple[Tally, ...]]:
    """Those of one window; `mvwan evaluate` has more measures, which take longer."""
    assert answer.rgb is not None, "a prediction has pictures"
    return {
        "peak_error_px": metrics.peak_error_px(filled(answer.uv_px, held.uv_px), sample.uv_px, sample.visible, given),
        "error_3d_mm": (metrics.error_3d_mm(filled(answer.point_m, held.point_m), sample.point_m, given),),
        "rgb_squared_error": metrics.squared_error(answer.rgb, sample.rgb, given),
    }


def trial_outcomes(
    run: Path, trials: int, tasks: Sequence[str], execute: int, denoise_steps: int, with_controls: bool
) -> tuple[list[Row], dict[str, Any]]:
    """(`success` of every trial, 1 or 0, each an episode of its own; policy -> its success rate), on layouts for tuning.

    Controls are tried where `with_controls` says so: they do not depend on what was trained. Raises `MvwanError` as
    `evaluate_closed_loop` does.
    """
    settings = TrialSettings(execute=execute, denoise_steps=denoise_steps, seed=NOISE_SEED, widened=is_widened(run))
    policies = POLICIES if with_controls else ("predicted",)
    wanted: dict[str, Any] = {"trials": trials, "tasks": tasks or None, "policies": policies, "settings": settings}
    result = evaluate_closed_loop(run, **wanted, processes=1, videos=0)
    lines = {line["digest"]: line for line in read_json_lines(run / "rollouts.jsonl")}
    rows = [
        Row(split="test", episode=f"{trial.task}/{trial.layout_seed}", outcome="success", value=float(lines[trial.digest]["success"]))
        for trial in plan_trials(run, **wanted)
        if trial.policy == "predicted"
    ]
    return rows, {policy: result["tasks"]["all"][policy] for policy in policies}


# ── the run itself ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def costs(run: Path, peak_memory_mb: float) -> list[Row]:
    """`seconds_per_step` (the median of those logged), `peak_memory_mb` as given, and `checkpoint_mb` of the newest checkpoint."""
    seconds = [line["seconds"] for line in read_json_lines(run / "metrics.jsonl") if line["kind"] == "train"]
    size = sum(path.stat().st_size for path in find_checkpoint(run).rglob("*") if path.is_file())
    found = {"seconds_per_step": statistics.median(seconds), "peak_memory_mb": peak_memory_mb, "checkpoint_mb": size / 2**20}
    return [Row(split="test", episode="", outcome=outcome, value=value) for outcome, value in found.items()]


def movement(run: Path, config: Config, accept_trainable_change: bool) -> list[dict[str, Any]]:
    """`group`, `block` (None: outside of all blocks) and `relative_movement` of what trained, from its start to the newest checkpoint.

    The norm of the change over the norm at the start; of adapters, the change of what they add over the norm of the weights that they
    adapt. Groups that started at zero have no such number and are left out.
    """
    start = HeatmapWanTrainingModule(
        config=config,
        checkpoint=config.train.from_checkpoint,
        accept_trainable_change=accept_trainable_change,
        print_banners=False,
    )
    before = {name: parameter.detach() for name, parameter in parameters_by_name(start.model).items()}
    stock = {stock_name(name): tensor for name, tensor in before.items()}
    lora, after = config.trainable.lora, load_trained(run).tensors
    scale = 1.0 if lora.alpha is None else lora.alpha / lora.rank
    squares: dict[tuple[str, int | None], np.ndarray] = defaultdict(lambda: np.zeros(2))
    for group in start.table.trainable_rows:
        for name in group.names:
            weight = adapted_weight(name)
            if weight is not None and ".lora_B." in name:
                continue  # counted with its A
            held, own = re.match(r"blocks\.(\d+)\.", name), stock[weight] if weight else before[name]
            change = after[name].double() - own.double() if weight is None else scale * (_added(after, name) - _added(before, name))
            norms = [float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) for tensor in (change, own)]
            squares[group.name, int(held[1]) if held else None] += np.square(norms)
    return [
        {"group": group, "block": block, "relative_movement": math.sqrt(change / at_start)}
        for (group, block), (change, at_start) in squares.items()
        if at_start
    ]


def _added(tensors: Mapping[str, torch.Tensor], name_of_a: str) -> torch.Tensor:
    """What a pair of adapters adds to its weight, but for their scale."""
    return tensors[name_of_a.replace(".lora_A.", ".lora_B.")].double() @ tensors[name_of_a].double()
