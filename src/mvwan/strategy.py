"""How the processes of a run share it: alone, DDP, FSDP2 or DeepSpeed, as accelerate was told; the only place where it is set up.

What accelerate was asked for is done or refused, never replaced. Knows no loop and no checkpoint.
"""

import atexit
import importlib.util
import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from mvwan.config import Config
from mvwan.deepspeed_engine import InTuples, ZeroEngine, ZeroOptimizer, zero_settings
from mvwan.errors import MvwanError
from mvwan.model.attention import check_attention
from mvwan.model.context_parallel import TokenSplit
from mvwan.model.quantized import check_quantize
from mvwan.precision import has_fast_bfloat16, settle
from mvwan.sharding import FlatPart
from mvwan.training_module import HeatmapWanTrainingModule

_LONGEST_WAIT = timedelta(days=7)
"""Other processes wait for the main one, which may encode for hours."""
_NAMES = {DistributedType.NO: "one process", DistributedType.FSDP: "FSDP2"}
_BLOCK = "MultiViewWanBlock"
_REMEDIES = {
    "FSDP_OFFLOAD_PARAMS": "Leave --fsdp_offload_params out.",
    "FSDP_ACTIVATION_CHECKPOINTING": "Set model.gradient_checkpointing=true, which does the same under every strategy.",
}
_UNSUPPORTED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM needs models of its own",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor and context parallelism would have to split the model's layers",
}


def make_accelerator(config: Config, output: Path) -> Accelerator:
    """The accelerator of this process. Raises `MvwanError` for a launch, a strategy or a tracker that cannot work."""
    # `accelerate launch --num_processes 2` on a CPU names a port for two processes and starts one.
    if "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ:
        raise MvwanError(
            "accelerate launch was asked for several processes and started one, as it does on a CPU. Add --multi_gpu, which works "
            "without a GPU too, and leave --cpu out: accelerate launch --multi_gpu --num_processes 2 ... (or unset MASTER_PORT for one.)"
        )
    tracker = config.train.tracker
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise MvwanError(
            f"train.tracker={tracker}: the package {tracker} is not installed. Run `pip install {tracker}`, or set train.tracker=none."
        )
    if _is_on("ACCELERATE_USE_FSDP") and _is_on("ACCELERATE_USE_DEEPSPEED"):
        raise MvwanError("FSDP2 and DeepSpeed were both asked for. Leave one of --use_fsdp and --use_deepspeed out.")
    plugin = _sharding_plugin()
    zero = DeepSpeedPlugin(hf_ds_config=zero_settings(config.train)) if _is_on("ACCELERATE_USE_DEEPSPEED") else None
    on_cpu = not torch.accelerator.is_available()
    if plugin is not None and on_cpu and not hasattr(torch.cpu.Stream, "record_event"):
        raise MvwanError(f"FSDP2 on CPUs needs a newer torch than {torch.__version__}: it is tested with 2.13. Or use DDP (--multi_gpu).")
    _check_kernels(config, is_spread=plugin is not None or zero is not None)
    if config.train.compile:
        _check_compiler(on_cpu)
    accelerator = Accelerator(
        cpu=on_cpu and zero is None,  # with it, accelerate would forget DeepSpeed
        mixed_precision=settle(config).train.precision,
        # A plugin, since the plain argument gives way to an environment variable.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.train.gradient_accumulation, sync_with_dataloader=False),
        fsdp_plugin=plugin,
        deepspeed_plugin=zero,
        log_with=None if tracker == "none" else tracker,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "logs")),
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(backend="gloo" if on_cpu and zero is not None else None, timeout=_LONGEST_WAIT),
        ],
    )
    try:
        _join_processes(accelerator, plugin)
    except MvwanError:
        forget_settings()
        raise
    return accelerator


def join_for_prediction() -> tuple[TokenSplit, torch.device]:
    """(share of this process, its device) among the processes that were started together. `MvwanError` where it is the only one."""
    state = PartialState(cpu=not torch.accelerator.is_available())
    if state.num_processes == 1:
        raise MvwanError(
            "--context-parallel shares one prediction among several processes, and this one is alone. Start them together: "
            "torchrun --nproc-per-node 2 -m mvwan sample ... --context-parallel"
        )
    assert state.device is not None
    atexit.register(state.destroy_process_group)
    return TokenSplit.over_all_processes(state.device), state.device


def _check_kernels(config: Config, is_spread: bool) -> None:
    """Nothing, or `MvwanError` for a kernel, a type of frozen weights or an optimizer that this machine or strategy cannot use."""
    settled = settle(config)
    half = settled.train.precision == "bf16" or (settled.base.dtype == "bfloat16" and has_fast_bfloat16())
    check_attention(config.model.attention, half=half, trains=True)
    check_quantize(config.base.quantize)
    for name, value, usual in (("base.quantize", config.base.quantize, "none"), ("train.optimizer", config.train.optimizer, "adamw")):
        if is_spread and value != usual:
            raise MvwanError(f"{name}={value}: not with FSDP2 or DeepSpeed, which cut tensors apart. Set {name}={usual}, or use DDP.")


def forget_settings() -> None:
    """Nothing; the next accelerator of this process starts anew. Accelerate keeps its settings in class variables.

    The process group stays for it, since it cannot be joined twice.
    """
    AcceleratorState._reset_state()
    GradientState._reset_state()


def strategy_name(accelerator: Accelerator) -> str:
    """`one process`, `DDP`, `FSDP2`, `DeepSpeed ZeRO-1` or `DeepSpeed ZeRO-2`."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        assert accelerator.deepspeed_plugin is not None
        return f"DeepSpeed ZeRO-{accelerator.deepspeed_plugin.zero_stage}"
    return _NAMES.get(accelerator.distributed_type, "DDP")


def prepare(
    accelerator: Accelerator, own: HeatmapWanTrainingModule, optimizer: torch.optim.Optimizer
) -> tuple[Any, Any, Callable[[nn.Parameter], torch.Tensor | FlatPart | None]]:
    """(module, optimizer, parameter -> gradient) as the strategy needs them. Under FSDP2 the module is `own`, its parameters spread."""
    if own.config.train.compile:
        own.compile_blocks()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # Here accelerate leaves autocast to DeepSpeed, which would choose other layers for it.
        own.forward = torch.autocast(accelerator.device.type, torch.bfloat16, own.config.train.precision == "bf16")(own.forward)
        engine, _ = accelerator.prepare(InTuples(own), optimizer)
        driven: Any = ZeroEngine(engine)
        accelerator.deepspeed_engine_wrapped = driven  # through which its `backward` and `clip_grad_norm_` go
        return driven, ZeroOptimizer(engine, optimizer), driven.gradient
    if accelerator.is_fsdp2:
        # Here accelerate leaves autocast out.
        own.forward = accelerator.autocast()(own.forward)
    module, prepared = accelerator.prepare(own, optimizer)
    return module, prepared, lambda parameter: parameter.grad


def _sharding_plugin() -> FullyShardedDataParallelPlugin | None:
    """What accelerate's environment asks of FSDP2, or None when it does not ask for it; a whole block is gathered at a time."""
    for variable, why in _UNSUPPORTED.items():
        if _is_on(variable):
            raise MvwanError(f"{variable}: not supported here, {why}. Use DDP (--multi_gpu), or FSDP2 (--use_fsdp --fsdp_version 2).")
    if not _is_on("ACCELERATE_USE_FSDP"):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise MvwanError("FSDP version 1 is not supported: it flattens tensors that train and tensors that do not. Use --fsdp_version 2.")
    for variable, remedy in _REMEDIES.items():
        if _is_on(variable):
            raise MvwanError(f"{variable}=true is not supported. {remedy}")
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    blocks = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", _BLOCK)
    if policy.upper() != "TRANSFORMER_BASED_WRAP" or blocks != _BLOCK:
        raise MvwanError(
            f"FSDP2 by {policy} of {blocks} is not supported: each {_BLOCK} is one unit. "
            f"Leave the flags out, or use --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP --fsdp_transformer_layer_cls_to_wrap {_BLOCK}."
        )
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[_BLOCK],
        # Autocast decides about precision, as under every strategy; a policy would round the float32 islands too.
        mixed_precision_policy=MixedPrecisionPolicy(),
        # Every process has read the base already.
        cpu_ram_efficient_loading=False,
    )


def _join_processes(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin | None) -> None:
    """Nothing; all processes are there, and accelerate uses `plugin`. On CPUs it would replace FSDP2 by DDP without a word."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise MvwanError(
            f"WORLD_SIZE={launched}, but accelerate joined {accelerator.num_processes} processes. Use accelerate launch or torchrun."
        )
    atexit.register(accelerator.state.destroy_process_group)
    if plugin is None:
        return
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    if accelerator.distributed_type != DistributedType.FSDP:
        raise MvwanError(
            "FSDP2 was asked for without a group of processes to spread over. "
            "Start with accelerate launch --use_fsdp --fsdp_version 2 --num_processes 2 ... (or unset ACCELERATE_USE_FSDP for one.)"
        )


def _check_compiler(on_cpu: bool) -> None:
    """Nothing, or `MvwanError` where `torch.compile` would find nothing to compile with."""
    if not on_cpu:
        if importlib.util.find_spec("triton") is None:
            raise MvwanError("train.compile=true: the package triton is not installed. Run `pip install triton`, or leave the setting out.")
        return
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        raise MvwanError(
            f"train.compile=true: on a processor it needs a C++ compiler; there is no {' and no '.join(compilers)}. Install one, or leave "
            "the setting out."
        )


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")
