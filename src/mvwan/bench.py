"""What a machine makes of this project, in one table: steps beside peers and the floor, costs, the way of the data, and growth.

What is compared takes turns in one process, so that a busy machine slows all of it alike; medians count, and their ratios. Memory is
that of processes of their own. Nothing here needs a download or demonstrations: weights and pictures are random where none ship.
"""

import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

import mvwan
from mvwan.bench_networks import (
    DEFAULT_SIZES,
    SizeName,
    Sizes,
    Step,
    base_of,
    config_for,
    denoising_step,
    in_stock_style,
    stock_training_step,
    training_step,
    untrained,
)
from mvwan.bench_pipeline import measure_pipeline
from mvwan.bench_points import GROWTH, Growth, measure_growth, run_point
from mvwan.config import Config
from mvwan.errors import MvwanError
from mvwan.model.movement import MovementProof, gradient_norms
from mvwan.model.trainable import merge_adapters, parameters_by_name
from mvwan.step_trace import large_product
from mvwan.training_module import HeatmapWanTrainingModule

Section = Literal["steps", "costs", "pipeline", "growth"]
SECTIONS: tuple[Section, ...] = ("steps", "costs", "pipeline", "growth")
STOCK_STYLE, STOCK, OFF, ON, COMPILED, COMPILED_ON = (
    "the same network in stock style",
    "stock Wan, views alone",
    "MultiViewWan, switch off",
    "MultiViewWan, switch on",
    "MultiViewWan, switch off, compiled",
    "MultiViewWan, switch on, compiled",
)
FLOOR = "the floor: its products alone"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table."""

    what: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    """Smallest and largest of the repeats."""
    ratio: float | None = None
    """Of `value` to that of `beside`."""
    beside: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """The lines of one comparison."""

    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """All that was measured."""

    size: SizeName
    sizes: Sizes
    machine: Mapping[str, Any]
    tables: tuple[Table, ...]
    growth: tuple[Growth, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for `json.dumps`."""
        return asdict(self)


def run_bench(
    size: SizeName = "tiny",
    sizes: Sizes | None = None,
    sections: Sequence[Section] = SECTIONS,
    repeats: int = 7,
    seed: int = 0,
    compiled: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> BenchReport:
    """What was measured, each step `repeats` times after one that is not counted. `compiled` adds the model as `train.compile` makes it.

    `say` hears what is being measured. Raises `MvwanError` for a bad number.
    """
    if repeats < 1:
        raise MvwanError(f"repeats={repeats}: must be at least 1. Set --repeats.")
    sizes = sizes or DEFAULT_SIZES[size]
    if "pipeline" in sections and size != "tiny" and tuple(sections) != SECTIONS:
        raise MvwanError(f"pipeline: size {size} has random weights and no VAE. Set --size tiny, or choose other parts by --part.")
    tables: list[Table] = []
    growth: tuple[Growth, ...] = ()
    with base_of(size) as base:
        config = config_for(size, base, sizes.views)
        if "steps" in sections:
            say("training and denoising steps")
            tables += measure_steps(config, sizes, repeats, seed, compiled)
        if "costs" in sections:
            say("what the switch, float32 masters and the proof cost")
            tables.append(measure_costs(config, sizes, repeats, seed, compiled))
        if "pipeline" in sections and size == "tiny":
            say("from pictures to steps, checkpoints, start and predictions")
            with tempfile.TemporaryDirectory() as folder:
                found = measure_pipeline(config, sizes, Path(folder), repeats, seed)
            tables += [Table(title=title, rows=tuple(Row(**row) for row in rows)) for title, rows in found.items()]
        if "growth" in sections:
            growth = tuple(measure_growth(config, sizes, axis, say) for axis in GROWTH)
    return BenchReport(size=size, sizes=sizes, machine=machine(config), tables=tuple(tables), growth=growth)


def machine(config: Config) -> dict[str, Any]:
    """The machine, as far as it explains the numbers, and what is computed in."""
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "mvwan": mvwan.__version__,
        "products": "bfloat16" if config.train.precision == "bf16" else "float32",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def take_turns(arms: Mapping[str, Step], repeats: int) -> dict[str, list[float]]:
    """Arm -> seconds of each of its `repeats` steps, one of each arm in turn, after one of each that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 1):
        for name, step in arms.items():
            start = time.perf_counter()
            step(repeat)
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def row(what: str, seconds: Sequence[float], beside: tuple[str, Sequence[float]] | None = None, note: str = "") -> Row:
    """The line of a step: its median, spread, and ratio to the median of what it stands beside."""
    middle = statistics.median(seconds)
    ratio = None if beside is None else middle / statistics.median(beside[1])
    return Row(
        what=what, value=middle, unit="s", low=min(seconds), high=max(seconds), ratio=ratio, beside=beside[0] if beside else "", note=note
    )


# ── steps beside peers and floor ──────────────────────────────────────────────────────────────────────────────────────────────────


def measure_steps(config: Config, sizes: Sizes, repeats: int, seed: int, compiled: bool) -> list[Table]:
    """Two tables: training steps, and the network call of a denoising step."""
    multiply, flops_of_product = large_product(torch.bfloat16 if config.train.precision == "bf16" else torch.float32)
    tables = []
    for title, arms, trained in (
        ("Training step: forward, backward, AdamW", *_training_arms(config, sizes, seed, compiled)),
        ("Denoising step: one network call", *_denoising_arms(config, sizes, seed)),
    ):
        with FlopCounterMode(display=False) as counter:
            arms[OFF](0)
        flops = counter.get_total_flops()
        seconds = take_turns({**arms, FLOOR: lambda _: multiply()}, repeats)
        rate = flops_of_product / statistics.median(seconds[FLOOR])
        peer = (STOCK_STYLE, seconds[STOCK_STYLE])
        rows = [row(name, times, peer, trained.get(name, "")) for name, times in seconds.items() if name != FLOOR]
        floor_s = flops / rate
        peer_s, own_s = statistics.median(seconds[STOCK_STYLE]), statistics.median(seconds[OFF])
        said = f"{flops / 1e9:.1f} GFLOP at {rate / 1e9:.1f} GFLOP/s of a large product: {floor_s / own_s:.0%} of {OFF}"
        rows.append(Row(what=FLOOR, value=floor_s, unit="s", ratio=floor_s / peer_s, beside=STOCK_STYLE, note=said))
        tables.append(Table(title=title, rows=tuple(rows)))
    return tables


def _training_arms(config: Config, sizes: Sizes, seed: int, compiled: bool) -> tuple[dict[str, Step], dict[str, str]]:
    modules = {
        STOCK_STYLE: HeatmapWanTrainingModule(config=config, print_banners=False),
        OFF: HeatmapWanTrainingModule(config=config, print_banners=False),
        ON: HeatmapWanTrainingModule(config=switched_on(config), print_banners=False),
    }
    in_stock_style(modules[STOCK_STYLE].model)
    if compiled:
        modules[COMPILED] = _compiled(config)
    arms = {name: training_step(module, sizes, seed) for name, module in modules.items()}
    trained = {name: f"{module.table.trainable_parameters:,} trained" for name, module in modules.items()}
    stock, count = stock_training_step(config, sizes, seed)
    return arms | {STOCK: stock}, trained | {STOCK: f"{count:,} trained; no view attention, no heatmaps"}


def _denoising_arms(config: Config, sizes: Sizes, seed: int) -> tuple[dict[str, Step], dict[str, str]]:
    merged = untrained(config)
    merge_adapters(merged, getattr(torch, config.base.dtype))
    models = {STOCK_STYLE: in_stock_style(untrained(config)), OFF: untrained(config), "MultiViewWan, LoRA merged": merged}
    return {name: denoising_step(model, config, sizes, seed) for name, model in models.items()}, {}


def _compiled(config: Config) -> HeatmapWanTrainingModule:
    module = HeatmapWanTrainingModule(config=config, print_banners=False)
    module.compile_blocks()
    return module


def switched_on(config: Config) -> Config:
    """The same settings with the switch on."""
    return replace(config, unfreeze_modulation_and_norms=True)


# ── what the project's own features cost ──────────────────────────────────────────────────────────────────────────────────────────


def measure_costs(config: Config, sizes: Sizes, repeats: int, seed: int, compiled: bool) -> Table:
    """What the switch costs in time, compiled too if asked for, in memory and bytes, and float32 masters and the movement proof in time."""
    off, on = (HeatmapWanTrainingModule(config=one, print_banners=False) for one in (config, switched_on(config)))
    arms = {OFF: training_step(off, sizes, seed), ON: training_step(on, sizes, seed)}
    masters = "MultiViewWan, trained tensors in bfloat16 too"
    if config.base.dtype == "bfloat16":
        rounded = HeatmapWanTrainingModule(config=config, print_banners=False)
        for parameter in rounded.model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16) if parameter.requires_grad else parameter.data
        arms[masters] = training_step(rounded, sizes, seed)
    if compiled:
        arms |= {name: training_step(_compiled(one), sizes, seed) for name, one in ((COMPILED, config), (COMPILED_ON, switched_on(config)))}
    seconds = take_turns(arms, repeats)
    beside = (OFF, seconds[OFF])
    rows = [row(OFF, seconds[OFF]), row(ON, seconds[ON], beside)]
    if compiled:
        rows += [row(COMPILED, seconds[COMPILED]), row(COMPILED_ON, seconds[COMPILED_ON], (COMPILED, seconds[COMPILED]))]
    if masters in seconds:
        rows.append(row(masters, seconds[masters], beside))
    points = {name: run_point(one, sizes) for name, one in ((OFF, config), (ON, switched_on(config)))}
    peaks = {name: point["peak_mb"] for name, point in points.items()}
    rows.append(Row(what="peak memory, switch off", value=peaks[OFF], unit="MB"))
    rows.append(Row(what="peak memory, switch on", value=peaks[ON], unit="MB", ratio=peaks[ON] / peaks[OFF], beside="switch off"))
    sizes_mb = [sum(tensor.nbytes for tensor in module.saved_tensors().values()) / 2**20 for module in (off, on)]
    rows.append(Row(what="trained tensors in a checkpoint, switch off", value=sizes_mb[0], unit="MB"))
    more = Row(
        what="trained tensors in a checkpoint, switch on",
        value=sizes_mb[1],
        unit="MB",
        ratio=sizes_mb[1] / sizes_mb[0],
        beside="switch off",
    )
    proof = [_seconds_of_proof(off, arms[OFF]) for _ in range(max(1, repeats // 2))]
    run_s = config.train.steps * statistics.median(seconds[OFF])
    note = f"{statistics.median(proof) / run_s:.2%} of the preset's {config.train.steps:,} steps"
    return Table(title="What the switch and the proof cost", rows=(*rows, more, row("movement proof, once per run", proof, note=note)))


def _seconds_of_proof(module: HeatmapWanTrainingModule, step: Step) -> float:
    proof, start = MovementProof(module.model, module.table), time.perf_counter()
    proof.snapshot()
    seconds = time.perf_counter() - start
    for number in range(3):
        step(number)
    parameters = parameters_by_name(module.model)
    for name in module.table.trainable_names:  # a step has cleared them
        parameters[name].grad = torch.ones_like(parameters[name])
    start = time.perf_counter()
    proof.check(module.model, 3, gradient_norms(module.model, module.table))
    seconds += time.perf_counter() - start
    module.zero_grad()
    return seconds
