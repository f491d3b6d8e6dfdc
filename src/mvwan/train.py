"""The trainer: build -> resume -> loop. `loop` and `train_step` are the ones to read.

    <output>/
        config.yaml, table.json      resolved settings; what trains
        first_batch.png              the first windows with their heatmaps drawn over the views: look at it
        latents/                     the latent cache, unless data.cache names another place
        skipped.json                 damaged episodes and windows that are left out, with reasons, when there are any
        metrics.jsonl                a line per logged step and per evaluation, each with its "kind"
        movement.json                the proof that what should move moved, and nothing else
        logs/                        of the tracker
        checkpoints/                 see `checkpoint`

What a step computes is a function of (settings, seed, step): data order, sigma and noise are arithmetic, so nothing random is
stored and a resumed run goes on to the bit. The loss of a step is one mean over all its windows, however they are cut into
processes and micro-batches. Knows no file format of demonstrations and no parameter name.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from rich.console import Console
from rich.table import Table
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from mvwan import checkpoint, flow, pictures, sharding, train_data
from mvwan.actions import action_counts
from mvwan.batch import Batch
from mvwan.checkpoint_writer import CheckpointWriter
from mvwan.compatibility import check_resume, check_skipped
from mvwan.config import Config, dump_yaml
from mvwan.data.dataset import WindowDataset, episodes_of
from mvwan.data.windows import spread
from mvwan.errors import MvwanError, PreemptedError
from mvwan.files import flatten, json_line, plain_words, read_json, read_json_lines, remove_leftovers, write_file, write_json
from mvwan.heat_reader import HeatReader
from mvwan.latent_cache import LatentCache
from mvwan.model.movement import MINIMUM_STEPS, Gradient, MovementProof, MovementReport, gradient_norms
from mvwan.model.surgery import share_copies
from mvwan.model.trainable import verify_trainable
from mvwan.optimizer import MovingAverage, load_optimizer, make_optimizer, make_schedule, optimizer_tensors
from mvwan.precision import in_words, settle
from mvwan.run_manifest import run_manifest, trainable_changes
from mvwan.signals import on_sigterm
from mvwan.strategy import forget_settings, make_accelerator, prepare, strategy_name
from mvwan.train_check import checkpoint_to_resume
from mvwan.training_module import HeatmapWanTrainingModule

HELD_OUT_STEP = -1
"""The step number that seeds held-out noise: no training step has it."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run left behind."""

    step: int
    losses: dict[str, float]
    """`loss`, `rgb_loss`, `heat_loss` of the last logged step, and `gripper_loss`, `rotation_loss` where an action head learns them.
    Empty where no step is logged."""
    held_out: dict[str, Any] | None
    """The last evaluation's line, or None without one."""
    movement: dict[str, Any] | None
    """What `movement.json` holds, or None when fewer than two steps were taken."""
    checkpoint: Path
    history: list[dict[str, Any]]
    """The lines of `metrics.jsonl`."""


@dataclass(kw_only=True)
class State:
    """All that the loop changes or reads."""

    config: Config
    output: Path
    accelerator: Accelerator
    module: Any
    """The module as accelerate wrapped it."""
    own: HeatmapWanTrainingModule
    """The module itself."""
    optimizer: Any
    gradient_of: Callable[[Parameter], Gradient]
    """The gradient of a parameter after the last micro-batch, or what this process holds of it."""
    schedule: LambdaLR
    windows: Iterator[Batch]
    """This process's micro-batches, from the next step on."""
    held_out: LatentCache | None
    manifest: dict[str, Any]
    proof: MovementProof | None
    proof_step: int
    """Step after which the movement is proved."""
    step: int = 0
    """Optimizer updates done."""
    first_step: int = 0
    """`step` when this process started."""
    average: MovingAverage
    writer: CheckpointWriter
    history: list[dict[str, Any]] = field(default_factory=list)
    stop_asked: bool = False
    """This process got SIGTERM."""
    stopping: bool = False
    """Some process did, and all know: save and stop after this step."""

    def ask_to_stop(self) -> None:
        """What a cluster that takes the machine back asks by SIGTERM: training ends after the present step, with all saved."""
        self.stop_asked = True


def train(config: Config, output: str | Path, resume: bool = False, accept_trainable_change: bool = False) -> TrainResult:
    """What the run left behind, after training `config.train.steps` steps into the folder `output`.

    `resume` goes on from the newest checkpoint there, and starts where there is none. `accept_trainable_change` lets it go on with
    the switch set otherwise than before: groups that are new start from the base with fresh optimizer state, and the manifest says
    so. Raises `MvwanError` before anything is written when the settings, the data, the checkpoint or the folder do not fit, and
    during training when a loss or gradient is not finite, the movement proof fails or the disk takes no more. Raises `PreemptedError`
    after SIGTERM, with the state saved.
    """
    output = Path(output)
    with plain_words(output):
        return _train(config, output, resume, accept_trainable_change)


def _train(config: Config, output: Path, resume: bool, accept_trainable_change: bool) -> TrainResult:
    found = checkpoint_to_resume(output, resume)
    config = settle(config, saved=checkpoint.read_manifest(found)["config"] if found else None)
    accelerator = make_accelerator(config, output)
    try:
        with ExitStack() as held:
            state = _build(config, output, accelerator, found, accept_trainable_change, held)
            with on_sigterm(state.ask_to_stop):
                loop(state)
            accelerator.wait_for_everyone()
            return _result(state)
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        forget_settings()


# ── the loop ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def loop(state: State) -> None:
    """Trains to `config.train.steps`. Order: fetch -> step (loss, backward, update) -> prove -> log -> evaluate -> save."""
    config, accelerator = state.config.train, state.accelerator
    _evaluate_if_due(state)
    redraw_s = 0.1 if sys.stderr.isatty() else 10
    bar = tqdm(total=config.steps, initial=state.step, unit="step", disable=not accelerator.is_main_process, mininterval=redraw_s)
    with bar:
        while state.step < config.steps:
            start = time.perf_counter()
            batches = [next(state.windows).check().to(accelerator.device) for _ in range(config.gradient_accumulation)]
            info = train_step(state, batches)
            info["seconds"] = time.perf_counter() - start
            _prove_if_due(state, info["gradient_norms"])
            if state.step % config.log_every == 0 or state.step == config.steps:
                _log(state, {"kind": "train", "step": state.step, **info})
            if not state.stopping or state.step == config.steps:  # who asks for the machine does not wait for long
                _evaluate_if_due(state)
            if state.step % config.save_every == 0 or state.step == config.steps or state.stopping:
                save(state)
            bar.set_postfix(loss=f"{info['loss']:.4f}", refresh=False)
            bar.update()
            if state.stopping:
                break
    state.writer.wait()
    if state.stopping and state.step < config.steps:
        raise PreemptedError(f"{state.output}: stopped by SIGTERM at step {state.step} of {config.steps}, which is saved; --resume goes on")


def train_step(state: State, batches: Sequence[Batch]) -> dict[str, Any]:
    """Losses, gradient norms and learning rates of one optimizer update on `batches`, one per micro-batch. `state.step` is one higher."""
    counts = _counts_of_step(state, batches)
    sums, broken = _accumulate_gradients(state, batches, counts)
    norms = gradient_norms(state.own.model, state.own.table, state.gradient_of)
    norm = _clip(state)
    _agree_to_go_on(state, broken, norm, batches)
    rates = {group["group"]: group["lr"] for group in state.optimizer.param_groups}
    state.optimizer.step()
    state.schedule.step()
    state.optimizer.zero_grad()
    state.average.update()
    state.step += 1
    losses = _losses(state.config, _over_processes(state.accelerator, sums), counts)
    return {**losses, "gradient_norm": norm, "gradient_norms": norms, "learning_rates": rates}


def _accumulate_gradients(state: State, batches: Sequence[Batch], counts: Sequence[int]) -> tuple[torch.Tensor, list[str]]:
    """([4] sums in the order of `StreamSums.sums`, names of the samples of which one is not finite), of this process."""
    accelerator, train = state.accelerator, state.config.train
    rgb, heat, gripper, rotation = counts
    # Accelerate divides by the micro-batches and DDP by the processes; the losses are shares of one mean already.
    undivided = accelerator.num_processes * len(batches)
    sums, broken = torch.zeros(len(counts), device=accelerator.device), []
    for batch in batches:
        with accelerator.accumulate(state.module):
            errors = state.module(batch, state.config.seed, state.step)
            loss = flow.total_loss(errors, rgb, heat, train.rgb_weight, gripper, rotation, train.action_weight)
            accelerator.backward(loss * undivided)
        sums += errors.sums.detach().sum(dim=1)
        finite = torch.isfinite(errors.sums).all(dim=0).tolist()
        broken += [name for name, is_finite in zip(batch.sample_ids, finite, strict=True) if not is_finite]
    assert accelerator.sync_gradients, "accelerate counts other micro-batches than the loop"
    return sums, broken


def _clip(state: State) -> float:
    """The norm of all gradients before they are scaled down to `max_gradient_norm` (0: left alone)."""
    norm = state.accelerator.clip_grad_norm_(state.own.parameters(), state.config.train.max_gradient_norm or math.inf)
    assert norm is not None
    return float(sharding.full_tensor(norm))


def _counts_of_step(state: State, batches: Sequence[Batch]) -> list[int]:
    """[4] elements in the loss of this step, over all micro-batches and processes: the masks are known before any forward pass."""
    given, head = state.config.train.condition_frames, state.config.model.action_head
    mine = []
    for batch in batches:
        rgb, heat = flow.stream_counts(batch.latents.shape, batch.heat_valid, given)
        mine.append(torch.stack([rgb.sum(), heat.sum(), *action_counts(head, batch.gripper_open, batch.rotation_deg, given)]))
    return [int(count) for count in _over_processes(state.accelerator, torch.stack(mine).sum(0))]


def _over_processes(accelerator: Accelerator, values: torch.Tensor) -> list[float]:
    """The sum of each value over all processes, the same on every one."""
    total = accelerator.reduce(values, "sum")
    assert isinstance(total, torch.Tensor)
    return total.tolist()


def _agree_to_go_on(state: State, broken: list[str], norm: float, batches: Sequence[Batch]) -> None:
    """Nothing, or `MvwanError` on every process when a loss or gradient of any of them is NaN or infinite. Called before the update.

    After it all processes know whether one of them was asked to stop.
    """
    accelerator = state.accelerator
    mine = torch.tensor([bool(broken) or not math.isfinite(norm), state.stop_asked], device=accelerator.device)
    at_fault, stops = _over_processes(accelerator, mine.int())
    state.stopping = bool(stops)
    if not at_fault:
        return
    losses = gather_object(broken)
    names = losses or gather_object([name for batch in batches for name in batch.sample_ids])
    raise MvwanError(
        f"step {state.step + 1}: the {'loss' if losses else 'gradient'} is NaN or infinite; samples: {', '.join(sorted(names))}. "
        "Stopped before the update, nothing was saved. Look at these windows in the data, or lower train.learning_rate."
    )


def _prove_if_due(state: State, norms: Mapping[str, float]) -> None:
    if state.proof is None or state.step != state.proof_step:
        return
    report: MovementReport = state.proof.check(state.own.model, state.step - state.first_step, norms)
    state.proof = None
    if state.accelerator.is_main_process:
        write_json(state.output / "movement.json", {"first_step": state.first_step, **report.to_json()})
        with tqdm.external_write_mode():
            _show(report.render())


# ── once in a while: log, save, evaluate ──────────────────────────────────────────────────────────────────────────────────────────


def _log(state: State, line: dict[str, Any]) -> None:
    state.history.append(line)
    if state.accelerator.is_main_process:
        path = state.output / "metrics.jsonl"
        with plain_words(path), open(path, "a", encoding="utf-8") as file:
            file.write(json_line(line))
    numbers = {name: value for name, value in line.items() if name not in ("kind", "step")}
    state.accelerator.log(flatten({line["kind"]: numbers}, "/"), step=line["step"])


def save(state: State) -> None:
    """Nothing; the checkpoint of this step is on the disk, whole, or being written in the background (`train.async_save`).

    Every process gives its parts; the main one writes.
    """
    state.writer.wait()  # so that at most one copy is in memory
    moments, updates = optimizer_tensors(state.optimizer, state.own)
    keep, copy = state.accelerator.is_main_process, state.config.train.async_save
    parts = (state.own.saved_tensors(), moments, state.average.tensors)
    tensors, moments, average = (sharding.gathered(part, keep, copy) for part in parts)
    if keep:
        measured = [line["loss"] for line in state.history if line["kind"] == "held_out" and line["step"] == state.step]
        state.writer.save(
            state.step,
            tensors,
            {**state.manifest, "held_out_loss": measured[-1] if measured else None},
            moments,
            {"updates": updates, "random": "data order, sigma and noise are functions of (seed, step, sample id)"},
            ema=average or None,
            reader=None if state.own.reader is None else {name: tensor.cpu() for name, tensor in state.own.reader.tensors.items()},
        )
    state.accelerator.wait_for_everyone()


def _evaluate_if_due(state: State) -> None:
    """Held-out losses per band of trained sigma and stream, at fixed sigma and noise: before the first step, every so often, at the end."""
    config = state.config.train
    due = config.evaluate_every and config.evaluate_windows and (state.step % config.evaluate_every == 0 or state.step == config.steps)
    if state.held_out is None or not due or any(line["kind"] == "held_out" and line["step"] == state.step for line in state.history):
        return
    start = time.perf_counter()
    chosen = spread(len(state.held_out), config.evaluate_windows)
    bands = {name: _held_out_loss(state, (low + high) / 2, chosen) for low, high, name in flow.sigma_bands(state.config.flow)}
    sharding.release_full_parameters(state.own)
    means = {name: sum(band[name] for band in bands.values()) / len(bands) for name in _loss_names(state.config)}
    line = {"kind": "held_out", "step": state.step, **means, "bands": bands, "windows": len(chosen)}
    if not math.isfinite(means["loss"]):
        at = ", ".join(f"sigma {name}" for name, band in bands.items() if not math.isfinite(band["loss"]))
        raise MvwanError(
            f"step {state.step}: the held-out loss is NaN or infinite at {at}; the model is no longer sound. Go on from an earlier "
            "checkpoint with a lower train.learning_rate, or look at the held-out windows in the data."
        )
    _log(state, {**line, "seconds": time.perf_counter() - start})


@torch.no_grad()
def _held_out_loss(state: State, sigma: float, indices: Sequence[int]) -> dict[str, float]:
    config, accelerator = state.config, state.accelerator
    assert state.held_out is not None
    totals = torch.zeros(8, dtype=torch.float64, device=accelerator.device)
    mine = indices[accelerator.process_index :: accelerator.num_processes]
    for start in range(0, math.ceil(len(indices) / accelerator.num_processes), config.train.batch_size):
        # A forward pass of spread parameters takes every process: one that has run out of windows computes and does not count.
        items = mine[start : start + config.train.batch_size]
        batch = state.held_out.batch(items or [0], config.model.view_code != "slot").check().to(accelerator.device)
        errors = state.own(batch, config.seed, HELD_OUT_STEP, torch.full((len(batch.sample_ids),), sigma))
        totals += torch.cat([errors.sums.double(), errors.counts.double()]).sum(dim=1) if items else 0
    found = _over_processes(accelerator, totals)
    return _losses(config, found[:4], found[4:])


def _losses(config: Config, sums: Sequence[float], counts: Sequence[float]) -> dict[str, float]:
    """The loss and its parts, by the names of `_loss_names`."""
    rgb, heat, gripper, rotation = (total / max(count, 1) for total, count in zip(sums, counts, strict=True))
    loss = config.train.rgb_weight * rgb + (1 - config.train.rgb_weight) * heat + config.train.action_weight * (gripper + rotation)
    return dict(zip(_loss_names(config), (loss, rgb, heat, gripper, rotation), strict=False))


def _loss_names(config: Config) -> tuple[str, ...]:
    learned = {"none": (), "gripper": ("gripper_loss",), "gripper_rotation": ("gripper_loss", "rotation_loss")}
    return ("loss", "rgb_loss", "heat_loss", *learned[config.model.action_head])


# ── build ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _build(
    config: Config, output: Path, accelerator: Accelerator, found: Path | None, accept_trainable_change: bool, held: ExitStack
) -> State:
    """The state before the first step. Every check comes before the first byte is written. Until `held` is closed `output` is its own."""
    episodes = episodes_of(config.data)
    training, held_out = (WindowDataset(episodes, config.data, config.model.views, split, config.seed) for split in ("train", "validation"))
    training.check_actions(config.model.action_head)
    training.check_calibrated(config.model.view_code)
    HeatmapWanTrainingModule(config=config, device="meta", print_banners=False)  # do the groups fit the base?
    manifest = run_manifest(config, accelerator.num_processes, strategy_name(accelerator), training)
    step = 0
    if found is not None:
        saved = checkpoint.read_manifest(found)
        check_resume(saved, manifest, found, accept_trainable_change)
        step = saved["step"]
        manifest["trainable_changes"] = saved.get("trainable_changes", [])
    start: dict[str, Any] = {"checkpoint": found or config.train.from_checkpoint, "accept_trainable_change": accept_trainable_change}
    if start["checkpoint"] is not None:
        HeatmapWanTrainingModule(config=config, device="meta", print_banners=False, **start)  # does it fit the groups?
    caches = train_data.latent_caches(
        config, output, training, held_out, accelerator.device, accelerator.is_main_process, accelerator.wait_for_everyone
    )
    skipped = train_data.left_out(episodes, caches)
    manifest["data"]["skipped"] = [window["name"] for window in skipped["windows"]]
    if found is not None:
        check_skipped(checkpoint.read_manifest(found), manifest, found)

    reader = _reader(config, caches[0], accelerator, found)
    own = HeatmapWanTrainingModule(config=config, print_banners=accelerator.is_main_process, reader=reader, **start)
    manifest["trainable_changes"] += trainable_changes(own, start["checkpoint"], step)
    own.quantize_frozen()
    optimizer = make_optimizer(own, config.train)
    module, prepared, gradient_of = prepare(accelerator, own, optimizer)
    share_copies(own.model)
    verify_trainable(own.model, own.table, prepared)
    averaged = None
    if found is not None:
        moments, progress = checkpoint.read_optimizer(found)
        load_optimizer(prepared, own, moments, progress["updates"], found, accept_trainable_change)
        averaged = checkpoint.load_trained(found, ema=True).tensors if config.train.ema_decay else None
    if accelerator.is_main_process:
        held.enter_context(checkpoint.only_writer(output))
    state = State(
        config=config,
        output=output,
        accelerator=accelerator,
        module=module,
        own=own,
        optimizer=prepared,
        gradient_of=gradient_of,
        schedule=make_schedule(optimizer, config.train, step),
        windows=train_data.micro_batches(config, caches[0], accelerator.num_processes, accelerator.process_index, step),
        held_out=caches[1],
        manifest=manifest | {"groups": own.saved_groups()},
        proof=None,
        proof_step=min(step + config.train.movement_step, config.train.steps),
        step=step,
        first_step=step,
        average=MovingAverage(own, config.train.ema_decay, averaged),
        writer=CheckpointWriter(output, config.train.keep_last, config.train.keep_best, config.train.async_save),
        history=_history(output / "metrics.jsonl", step) if found else [],
    )
    # At the very end of a cosine, where a run may be resumed, steps are too small to tell from standing still.
    rates_are_alive = all(group["lr"] > 1e-3 * group["initial_lr"] for group in optimizer.param_groups)
    if state.proof_step - step >= MINIMUM_STEPS and (found is None or rates_are_alive):
        state.proof = MovementProof(own.model, own.table)
        output.mkdir(parents=True, exist_ok=True)
        state.proof.snapshot(output)
    if accelerator.is_main_process:
        _introduce(state, caches[0].dataset, skipped)
    # TensorBoard then hides what a killed run logged after its last checkpoint.
    accelerator.init_trackers("mvwan", init_kwargs={"tensorboard": {"purge_step": step + 1}} if found else {})
    return state


def _reader(config: Config, cache: LatentCache, accelerator: Accelerator, found: Path | None) -> HeatReader | None:
    """The run's heat reader, the same on all processes: that of the checkpoint it resumes from, else one fitted now."""
    if not config.train.heat_reader_weight:
        return None
    saved = None if found is None else checkpoint.read_heat_reader(found)
    if saved is not None:
        return HeatReader(**saved)
    shown = print if accelerator.is_main_process else lambda text: None
    fitted = train_data.fit_reader(config, cache, shown).to(accelerator.device)
    # Processors of different makes round differently.
    return HeatReader(**{name: broadcast(tensor) for name, tensor in fitted.tensors.items()})


def _history(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl up to `step`: what a killed run logged after its last checkpoint will be logged again."""
    lines = read_json_lines(path)
    if not all(isinstance(line, dict) and isinstance(line.get("step"), int) and isinstance(line.get("kind"), str) for line in lines):
        raise MvwanError(f"{path}: a line is not one that training wrote. Restore or remove the file, then resume.")
    return [line for line in lines if line["step"] <= step]


def _introduce(state: State, training: WindowDataset, skipped: dict[str, list[dict[str, str]]]) -> None:
    """Writes what a run is known by, and shows what trains."""
    config, output = state.config, state.output
    checkpoint.tidy(output, config.train.keep_last, config.train.keep_best)  # a killed save may have stopped before its pointer
    for folder in (output, *(output / "latents").glob("*/")):
        remove_leftovers(folder)
    write_file(output / "config.yaml", dump_yaml(config))
    write_json(output / "table.json", state.own.table.to_json(config.base.source, config.model.views, config.model.fusion))
    if said := train_data.in_words(skipped):
        print(said, file=sys.stderr)
        write_json(output / "skipped.json", skipped)
    write_file(output / "metrics.jsonl", "".join(json_line(line) for line in state.history))
    if state.first_step == 0:
        first = train_data.first_windows(training, config, state.manifest["items_per_step"])
        write_file(output / "first_batch.png", pictures.png(first))
    _show(state.own.table.render())
    for line in state.own.fit.describe() if state.own.fit else ():
        print(f"checkpoint: {line}")
    print(in_words(config))
    if state.first_step:
        print(f"going on at step {state.first_step} of {config.train.steps}")


def _show(table: Table) -> None:
    """Prints a table; it keeps its columns where the output is no terminal."""
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _result(state: State) -> TrainResult:
    steps = [line for line in state.history if line["kind"] == "train"]
    evaluations = [line for line in state.history if line["kind"] == "held_out"]
    movement = state.output / "movement.json"
    found = checkpoint.latest_checkpoint(state.output)
    assert found is not None
    return TrainResult(
        step=state.step,
        losses={name: steps[-1][name] for name in _loss_names(state.config)} if steps else {},
        held_out=evaluations[-1] if evaluations else None,
        movement=read_json(movement) if movement.is_file() else None,
        checkpoint=found,
        history=state.history,
    )
