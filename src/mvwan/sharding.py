"""Whole tensors out of tensors that are spread over processes, and back, whatever spread them; a tensor that is not spread is whole.

A process holds only its part of a spread tensor. Functions that say so must be called by every process in the same order: they
exchange parts. Knows no model, no optimizer and no file.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass(frozen=True, kw_only=True)
class FlatPart:
    """A tensor whose elements, in a row, are spread over all processes, of which this one holds a range."""

    values: torch.Tensor
    """[n], maybe empty."""
    start: int
    """Place of the first of them in the row."""
    shape: torch.Size
    """Of the whole tensor."""


def is_spread(tensor: torch.Tensor | FlatPart) -> bool:
    """Whether this process holds only a part of it."""
    return isinstance(tensor, DTensor | FlatPart)


def full_tensor(tensor: torch.Tensor | FlatPart) -> torch.Tensor:
    """The whole tensor, on its device, without gradient; itself where it is not spread. Every process must call it."""
    with torch.no_grad():
        if isinstance(tensor, FlatPart):
            row = tensor.values.new_zeros(tensor.shape.numel())
            row[tensor.start : tensor.start + tensor.values.numel()] = tensor.values
            torch.distributed.all_reduce(row)
            return row.view(tensor.shape)
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def local_part(tensor: torch.Tensor | FlatPart) -> torch.Tensor:
    """What this process holds of it, without gradient, sharing its memory; it may be empty."""
    with torch.no_grad():
        if isinstance(tensor, FlatPart):
            return tensor.values
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def shard_like(parameter: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """A copy of `full` on the device of `parameter`, spread as that one is; the main process's values. Every process must call it.

    A copy, since what a file gives may be mapped to it.
    """
    full = full.to(parameter.device, copy=True)
    return distribute_tensor(full, parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else full


def gathered(tensors: Mapping[str, torch.Tensor | FlatPart], keep: bool, copy: bool) -> dict[str, torch.Tensor]:
    """All tensors whole on the CPU where `keep`, nothing elsewhere. Every process must call it.

    `copy`: they stay as they are now whatever happens to `tensors`; without it those that are whole on the CPU share their memory.
    One tensor at a time is whole on the device, so a process that keeps none needs memory for the largest alone.
    """
    kept: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor)
        if keep:
            kept[name] = full.to("cpu", copy=copy and not is_spread(tensor))
    return kept


def sum_of_parts(values: torch.Tensor, tensors: Iterable[torch.Tensor | FlatPart]) -> torch.Tensor:
    """`values`, numbers about the local parts of `tensors`, added up over the processes that hold the other parts.

    Unchanged where none of them is spread. Every process must call it.
    """
    spread = next((tensor for tensor in tensors if isinstance(tensor, DTensor | FlatPart)), None)
    if spread is None:
        return values
    total = values.to(local_part(spread).device, copy=True)
    torch.distributed.all_reduce(total, group=spread.device_mesh.get_group() if isinstance(spread, DTensor) else None)
    return total.to(values.device)


def release_full_parameters(module: nn.Module) -> None:
    """Nothing; every parameter is spread again. After a forward pass without a backward one, some would stay whole."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
