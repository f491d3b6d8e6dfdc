"""DeepSpeed's ZeRO-1 and ZeRO-2 in the order of `train_step`: gradients, their norm, then the update or none.

Every process holds the model whole. The parameters of a group lie one after the other in a row of numbers, of which each process
updates a range, its own row: there alone are its moments and, after the last micro-batch, its gradients. Knows no loop, no
checkpoint and no accelerate.
"""

import importlib.util
import logging
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from mvwan.batch import Batch
from mvwan.config import TrainConfig
from mvwan.errors import MvwanError
from mvwan.flow import StreamSums
from mvwan.sharding import FlatPart
from mvwan.training_module import HeatmapWanTrainingModule

_ALLOWED = {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": ("1", "2"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("none",),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("none",),
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": ("none",),
    "ACCELERATE_MIXED_PRECISION": ("no", "bf16"),
}
BUCKET_ELEMENTS = 50_000_000
"""Gradient elements that are summed over the processes at a time: a buffer of that size stays."""


def zero_settings(train: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's own settings for what accelerate's environment asks of it. Raises `MvwanError` for what is not supported."""
    for variable, allowed in _ALLOWED.items():
        if (value := os.environ.get(variable) or allowed[-1]).lower() not in allowed:
            raise MvwanError(
                f"DeepSpeed with {variable}={value} is not supported, only {' or '.join(allowed)}. Use --zero_stage 2 without offload, "
                "fp16 and configuration file, or FSDP2 (--use_fsdp --fsdp_version 2), which spreads the parameters as ZeRO-3 does."
            )
    if "LOCAL_RANK" not in os.environ:
        raise MvwanError(
            "DeepSpeed was asked for without a group of processes to spread over. "
            "Start with accelerate launch --use_deepspeed --zero_stage 2 --num_processes 2 ... (or unset ACCELERATE_USE_DEEPSPEED for one.)"
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise MvwanError(
            "ACCELERATE_USE_DEEPSPEED: the package deepspeed is not installed. "
            "Run `pip install 'mvwan[deepspeed]'`, or use FSDP2 (--use_fsdp --fsdp_version 2)."
        )
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") or 2)
    return {
        "zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET_ELEMENTS},
        "train_micro_batch_size_per_gpu": train.batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation,
        "gradient_clipping": train.max_gradient_norm,
        "zero_allow_untested_optimizer": True,
        # Autocast decides about precision, as under every strategy; these would round what trains.
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
    }


def _place(parameter: Any) -> tuple[slice, int]:
    """(where in this process's row its numbers lie, place of the first of them in the parameter), as DeepSpeed noted it there."""
    if parameter._hp_mapping is None:
        return slice(0, 0), 0
    address = parameter._hp_mapping.hp_fragment_address
    return slice(address.start, address.start + address.numel), parameter._hp_mapping.lp_fragment_address.start


class InTuples(nn.Module):
    """The training module with its result as a tuple: DeepSpeed learns that a backward pass begins from tensors in tuples alone."""

    def __init__(self, own: HeatmapWanTrainingModule) -> None:
        super().__init__()
        self.own = own

    def forward(self, batch: Batch, seed: int, step: int) -> tuple[torch.Tensor, ...]:
        """The fields of `StreamSums`, in order."""
        errors = self.own(batch, seed, step)
        return tuple(getattr(errors, field.name) for field in fields(StreamSums))


class ZeroEngine:
    """DeepSpeed's engine around `InTuples`: called as the training module is, and by accelerate for the backward pass and the norm."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def __call__(self, batch: Batch, seed: int, step: int) -> StreamSums:
        return StreamSums(*self.engine(batch, seed, step))

    def backward(self, loss: torch.Tensor, sync_gradients: bool) -> None:
        """Nothing; gradients are added up, and complete where `sync_gradients`. Accelerate's own wrapper would update here."""
        self.engine.set_gradient_accumulation_boundary(sync_gradients)
        self.engine.backward(loss)

    def get_global_grad_norm(self) -> torch.Tensor:
        """The norm of all gradients before the update, which clips by it; infinite where one is not finite."""
        return self.engine.optimizer.scaled_global_norm()

    def gradient(self, parameter: nn.Parameter) -> FlatPart | None:
        """This process's part of its gradient after the last micro-batch; None where it does not train."""
        if not parameter.requires_grad:
            return None
        in_row, start = _place(parameter)
        noted: Any = parameter
        if noted._hp_mapping is None:
            values = parameter.detach().new_empty(0)
        else:
            values = noted._hp_mapping.get_lp_grad_fragment(noted._index_in_param_group).detach().flatten()
        assert values.numel() == in_row.stop - in_row.start, "DeepSpeed cuts gradients otherwise than moments"
        return FlatPart(values=values, start=start, shape=parameter.shape)


class ZeroOptimizer:
    """`optimizer`, whose rows DeepSpeed cut, as if it still held the parameters: the update, `param_groups` and `state`."""

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer) -> None:
        self.engine = engine
        self.state = _StateByParameter(engine.optimizer, optimizer)
        self._optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """A dict per group, with the parameters that DeepSpeed trains; changing it changes nothing."""
        held = self.engine.optimizer.bit16_groups
        return [{**group, "params": list(params)} for group, params in zip(self._optimizer.param_groups, held, strict=True)]

    def step(self) -> None:
        """Clips and updates; gradients are gone then."""
        self.engine.step()

    def zero_grad(self) -> None:
        """Nothing: `step` did it."""


class _StateByParameter:
    """AdamW's state by parameter, each moment the part of it that this process holds."""

    def __init__(self, zero: Any, optimizer: torch.optim.Optimizer) -> None:
        self._states = optimizer.state
        self._rows: dict[nn.Parameter, torch.Tensor] = {
            parameter: row
            for parameters, row in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)
            for parameter in parameters
        }

    def __getitem__(self, parameter: nn.Parameter) -> dict[str, Any]:
        in_row, start = _place(parameter)
        return {
            name: value if name == "step" else FlatPart(values=value[in_row], start=start, shape=parameter.shape)
            for name, value in self._states[self._rows[parameter]].items()
        }

    def __setitem__(self, parameter: nn.Parameter, entry: Mapping[str, torch.Tensor]) -> None:
        """Takes this process's part of whole moments."""
        row = self._rows[parameter]
        state = self._states[row]
        for name, value in entry.items():
            if name == "step":
                state[name] = value
            else:
                state.setdefault(name, torch.zeros_like(row))
        for name, part in self[parameter].items():
            if isinstance(part, FlatPart):
                part.values.copy_(entry[name].flatten()[part.start : part.start + part.values.numel()])
