"""Does a run fit on a machine, with what, how long does it take: a row per way of sharing it, and the words of the best one.

`step_trace` counts what one process takes; here that is spread as each strategy spreads it. What is assumed and not counted is
named in `ASSUMPTIONS` and printed with every plan. Knows no layer and touches no GPU.
"""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from mvwan.config import Config, Quantize
from mvwan.deepspeed_engine import BUCKET_ELEMENTS
from mvwan.devices import DEFAULT_EFFICIENCY, Machine
from mvwan.errors import MvwanError
from mvwan.memory import available_bytes
from mvwan.precision import settle
from mvwan.step_trace import Measurement, StepTrace, measure, trace

Strategy = Literal["one process", "DDP", "DeepSpeed ZeRO-1", "DeepSpeed ZeRO-2", "FSDP2"]
GB = 1e9
CONTEXT_GB = 0.6
"""Assumed, of each GPU: what CUDA and its libraries take for themselves."""
_BFLOAT16_KERNELS = 30_000_000
"""Bytes, measured: what a processor's library keeps for products in bfloat16 beyond what it keeps in float32, whatever the step's size."""
_FLOAT32_BYTES = 4
_GATHERED_BLOCKS = 3
"""Assumed, of FSDP2: the block at work, the next one, and the buffer that it arrives in."""
_LARGEST_GROUP = 4096
_LAUNCH: dict[Strategy, str] = {
    "DDP": "--multi_gpu",
    "DeepSpeed ZeRO-1": "--use_deepspeed --zero_stage 1",
    "DeepSpeed ZeRO-2": "--use_deepspeed --zero_stage 2",
    "FSDP2": "--use_fsdp --fsdp_version 2",
}
_Way = tuple[bool, Quantize]
"""(gradient checkpointing, what the frozen base is held as)."""
_SPREADING: tuple[Strategy, ...] = ("DeepSpeed ZeRO-1", "DeepSpeed ZeRO-2", "FSDP2")
"""What cannot cut quantised weights, nor rows and columns of moments."""
_ORDER: tuple[tuple[Strategy, bool], ...] = (
    ("one process", False),
    ("one process", True),
    ("DDP", False),
    ("DeepSpeed ZeRO-1", False),
    ("DeepSpeed ZeRO-2", False),
    ("DDP", True),
    ("DeepSpeed ZeRO-1", True),
    ("DeepSpeed ZeRO-2", True),
    ("FSDP2", False),
    ("FSDP2", True),
)
"""(strategy, gradient checkpointing), the first that fits being advised. FSDP2 is last: it sends every weight twice per micro-batch."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU at the moment of the step when most are taken; their sum is the peak."""

    frozen: float
    trained: float
    """Weights that train, and DeepSpeed's own copy of those that this process updates."""
    gradients: float
    """With the second copy that lies in DDP's buckets."""
    optimizer: float
    """Both moments, and the moving average where there is one."""
    activations: float
    """Batches, and what the forward pass keeps for the backward pass."""
    transient: float
    """What comes and goes: inside of a block, gradients of activations, gathered weights, what the update takes."""

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to run on a machine."""

    strategy: Strategy
    gradient_checkpointing: bool
    quantize: Quantize
    """Of the frozen base."""
    memory: Memory
    spare_gb: float
    """Left on each GPU beside the context; less than 0 where it does not fit."""
    step_s: float
    """Of products alone, at the given efficiency."""
    command: str

    @property
    def fits(self) -> bool:
        return self.spare_gb >= 0


@dataclass(frozen=True, kw_only=True)
class MachinePlan:
    """All options on one machine, in the order in which they are tried."""

    machine: Machine
    options: tuple[Option, ...]
    remedy: str
    """What to do where nothing fits, else empty."""

    @property
    def advised(self) -> Option | None:
        return next((option for option in self.options if option.fits), None)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Steps on this machine's processor, predicted and measured."""

    memory: Memory
    step_s: float
    """From the rate of a large product, measured in the same process, at the given efficiency."""
    measured: Measurement
    efficiency: float
    """What the measured seconds amount to, as a share of that rate."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is known of a run before it is run."""

    config: Config
    efficiency: float
    machines: tuple[MachinePlan, ...]
    trial: Trial | None
    checkpoint_bytes: int
    num_checkpoints: int
    """That lie on the disk at a time, the one being written among them; 0: all are kept."""
    window_bytes: int
    """Of a window in the latent cache, times its variants."""
    instruction_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for `json.dumps`; sizes in bytes unless a name says otherwise."""
        machines = [
            {
                "name": plan.machine.name,
                "count": plan.machine.count,
                **asdict(plan.machine.device),
                "options": [asdict(option) | {"peak": option.memory.total, "fits": option.fits} for option in plan.options],
                "advised": None if plan.advised is None else plan.advised.command,
                "remedy": plan.remedy,
            }
            for plan in self.machines
        ]
        names = ("efficiency", "checkpoint_bytes", "num_checkpoints", "window_bytes", "instruction_bytes")
        trial = None if self.trial is None else asdict(self.trial) | {"peak": self.trial.memory.total}
        return {**{name: getattr(self, name) for name in names}, "assumptions": self.assumptions(), "machines": machines, "trial": trial}

    def assumptions(self) -> list[str]:
        """A sentence for each thing that is in the numbers and was not counted."""
        compiled = ["train.compile=true is left out: memory and time are those of blocks that are not compiled."]
        return [
            f"Efficiency {self.efficiency:g} of the rate that the maker states is given, not measured.",
            "Time is that of products alone: without what processes send each other, data, evaluation and checkpoints.",
            f"Each GPU keeps {CONTEXT_GB:g} GB for CUDA. A maker's GB is 10^9 bytes; what cards hold beyond it is left to the allocator.",
            "Weights that view attention starts with and that stay frozen are held once with those of self-attention, but not under FSDP2.",
            "A GPU attends by a fused kernel, which keeps no matrix of attention weights; a processor keeps them.",
            f"FSDP2 holds {_GATHERED_BLOCKS} whole blocks for a moment, DeepSpeed a bucket of {BUCKET_ELEMENTS:,} gradients.",
            *(compiled if self.config.train.compile else []),
        ]


def make_plan(
    config: Config,
    machines: Sequence[Machine],
    given: Sequence[str] = (),
    efficiency: float = DEFAULT_EFFICIENCY,
    measured: bool = False,
) -> Plan:
    """The plan of `config` on `machines`; `given` are the words of the command line that made it, for the commands that are advised.

    `measured` also runs steps on this machine. Raises `MvwanError` for settings that do not fit the base and for steps that would
    not fit in this machine's memory.
    """
    if not 0 < efficiency <= 1:
        raise MvwanError(f"--efficiency {efficiency:g}: must be more than 0 and at most 1, the share of the stated rate. 0.4 is usual.")
    own = (config.model.gradient_checkpointing, config.base.quantize)
    traces: dict[_Way, StepTrace] = {}
    if machines:
        ways: set[_Way] = {(False, own[1]), (True, own[1]), (True, _narrowest(config))}
        traces = {way: trace(_changed(config, *way), "gpu") for way in ways}
    trial = _trial(config, efficiency) if measured else None
    sizes = traces[own] if traces else trace(config, "cpu")
    return Plan(
        config=config,
        efficiency=efficiency,
        machines=tuple(_plan_machine(config, machine, traces, given, efficiency) for machine in machines),
        trial=trial,
        checkpoint_bytes=sizes.trained * (2 if config.train.ema_decay else 1) + sizes.optimizer,
        num_checkpoints=config.train.keep_last + 1 + config.train.keep_best if config.train.keep_last else 0,
        window_bytes=sizes.window_bytes * (1 + config.data.augment.variants),
        instruction_bytes=sizes.instruction_bytes,
    )


def memory_of(step: StepTrace, strategy: Strategy, processes: int, has_average: bool) -> Memory:
    """What each of `processes` holds at the peak of a step."""
    spread = 1 / processes
    of_weights = spread if strategy == "FSDP2" else 1.0
    of_gradients = spread if strategy in ("FSDP2", "DeepSpeed ZeRO-2") else 1.0
    of_moments = 1.0 if strategy in ("one process", "DDP") else spread
    is_zero = strategy.startswith("DeepSpeed")
    optimizer = step.optimizer * of_moments + step.trained * of_weights * has_average
    frozen = step.frozen * spread if strategy == "FSDP2" else step.frozen - step.shared
    resident = {"frozen": frozen, "trained": step.trained * (of_weights + spread * is_zero), "optimizer": optimizer}
    bucketed = step.trained if strategy == "DDP" else 0
    sent = min(BUCKET_ELEMENTS * _FLOAT32_BYTES, step.trained) if is_zero else 0
    if strategy == "FSDP2":
        blocks = _GATHERED_BLOCKS * (step.block.frozen + step.block.trained)
        sent = blocks + step.rest.frozen + step.rest.trained + 2 * step.block.trained  # the last: its gradients whole, and as they are sent
    kept = min(step.kept, step.peak_others)
    in_passes = Memory(
        **resident,
        gradients=step.peak_gradients * of_gradients + bucketed,
        activations=step.batches + kept,
        transient=step.peak_others - kept + sent,
    )
    cut = step.trained * spread if strategy == "DeepSpeed ZeRO-1" else 0  # its part of the gradients in a row, beside them
    in_update = Memory(
        **resident,
        gradients=step.trained * of_gradients + bucketed + cut,
        activations=step.batches,
        transient=step.update * of_moments,
    )
    return max(in_passes, in_update, key=lambda memory: memory.total)


def _narrowest(config: Config) -> Quantize:
    """What the base is quantised to where nothing else makes a run fit."""
    if config.base.quantize != "none":
        return config.base.quantize
    return "int8" if config.train.compile else "nf4"


def _changed(config: Config, checkpointing: bool, quantize: Quantize) -> Config:
    model, base = replace(config.model, gradient_checkpointing=checkpointing), replace(config.base, quantize=quantize)
    return replace(config, model=model, base=base)


def _ways(config: Config, count: int) -> Iterator[tuple[Strategy, bool, Quantize]]:
    """(strategy, gradient checkpointing, base) in the order in which they are tried: what rounds the base comes last."""
    own = config.base.quantize
    for strategy, checkpointing in _ORDER:
        is_usable = strategy not in _SPREADING or (own == "none" and config.train.optimizer == "adamw")
        if (strategy == "one process") == (count == 1) and is_usable:
            yield strategy, checkpointing, own
    if own == "none":
        yield ("one process" if count == 1 else "DDP"), True, _narrowest(config)


def _plan_machine(config: Config, machine: Machine, traces: dict[_Way, StepTrace], given: Sequence[str], efficiency: float) -> MachinePlan:
    options: list[Option] = []
    for strategy, checkpointing, quantize in _ways(config, machine.count):
        step = traces[checkpointing, quantize]
        memory = memory_of(step, strategy, machine.count, config.train.ema_decay > 0)
        options.append(
            Option(
                strategy=strategy,
                gradient_checkpointing=checkpointing,
                quantize=quantize,
                memory=memory,
                spare_gb=machine.device.memory_gb - CONTEXT_GB - memory.total / GB,
                step_s=config.train.gradient_accumulation * step.flop / (machine.device.tflops * 1e12 * efficiency),
                command=_command(config, strategy, checkpointing, quantize, machine.count, given),
            )
        )
    fits = any(option.fits for option in options)
    remedy = "" if fits else _remedy(config, machine, traces[True, config.base.quantize])
    return MachinePlan(machine=machine, options=tuple(options), remedy=remedy)


def _remedy(config: Config, machine: Machine, step: StepTrace) -> str:
    """The smallest group of such GPUs that would do, or what to make smaller."""
    count = 2 * machine.count
    if config.base.quantize != "none" or config.train.optimizer != "adamw":
        return "Nothing fits. Set base.quantize=none and train.optimizer=adamw, which FSDP2 can spread over several GPUs."
    while count <= _LARGEST_GROUP:
        needed_gb = memory_of(step, "FSDP2", count, config.train.ema_decay > 0).total / GB + CONTEXT_GB
        if needed_gb <= machine.device.memory_gb:
            return f"Nothing fits. {count} x {machine.device.name} with FSDP2 and gradient checkpointing would: {needed_gb:.1f} GB each."
        count *= 2
    batch = f"train.batch_size={config.train.batch_size}, " if config.train.batch_size > 1 else ""
    return (
        f"Nothing fits, and spreading it further does not help: what a micro-batch takes stays whole. Lower {batch}model.views, "
        "data.num_frames, data.height_px or data.width_px, or take GPUs with more memory."
    )


def _command(config: Config, strategy: Strategy, checkpointing: bool, quantize: Quantize, count: int, given: Sequence[str]) -> str:
    words = ["train", *given]
    if checkpointing != config.model.gradient_checkpointing:
        words += ["--set", f"model.gradient_checkpointing={str(checkpointing).lower()}"]
    if quantize != config.base.quantize:
        words += ["--set", f"base.quantize={quantize}"]
    words += [] if config.data.root else ["--set", "data.root=DATA"]
    command = f"{shlex.join(words)} --output RUN"
    if strategy == "one process":
        return f"mvwan {command}"
    flags = f"{_LAUNCH[strategy]} --num_processes {count} --num_machines 1 --mixed_precision no --dynamo_backend no"
    return f"accelerate launch {flags} -m mvwan {command}"


def _trial(config: Config, efficiency: float) -> Trial:
    step = trace(config, "cpu")
    memory = memory_of(step, "one process", 1, has_average=False)
    if settle(config, "cpu").train.precision == "bf16":
        memory = replace(memory, transient=memory.transient + _BFLOAT16_KERNELS)
    available = available_bytes()
    if memory.total > available:
        raise MvwanError(
            f"--measure: a step takes {memory.total / GB:.1f} GB and this machine has {available / GB:.1f} GB free. Leave --measure out, "
            "or choose smaller settings, for example --preset tiny."
        )
    measured = measure(config)
    flop = config.train.gradient_accumulation * step.flop
    return Trial(
        memory=memory,
        step_s=flop / (measured.product_flop_per_s * efficiency),
        measured=measured,
        efficiency=flop / (measured.product_flop_per_s * measured.step_s),
    )
