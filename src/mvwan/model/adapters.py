"""PEFT's LoRA layer with fewer and faster products: the same sum, from the same tensors, to rounding.

Knows one layer; which layers have adapters is said in `model/trainable`.
"""

from typing import Any

import peft
import torch
from torch import nn


class _LowRank(torch.autograd.Function):
    """y + x A^T B^T, without a pass of its own over anything as large as y.

    Products whose answer is a few numbers wide are several times slower on CPUs than those whose answer is a few numbers high, so all
    that is of the rank's size is kept as [rank, rows].
    """

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        inner = a @ rows.T
        ctx.save_for_backward(rows, inner, a, b)
        ctx.shape = x.shape
        return torch.addmm(y.flatten(0, -2), inner.T, b.T).view(y.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        rows, inner, a, b = ctx.saved_tensors
        of_rows = gradients[0].flatten(0, -2)
        of_inner = b.T @ of_rows.T
        return gradients[0], (of_inner.T @ a).view(ctx.shape), of_inner @ rows, (inner @ of_rows).T


def exchange_layers(model: nn.Module, ours: bool = True) -> None:
    """Nothing; LoRA layers that PEFT made are then `AdaptedLinear`, or with `ours` false PEFT's own again."""
    for layer in model.modules():
        if type(layer) in (AdaptedLinear, peft.tuners.lora.Linear):
            layer.__class__ = AdaptedLinear if ours else peft.tuners.lora.Linear


class AdaptedLinear(peft.tuners.lora.Linear):
    """A linear layer with one adapter. Takes the place of PEFT's own class on a layer that PEFT made."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What PEFT's layer gives."""
        is_plain = list(self.lora_A) == self.active_adapters == ["default"] and isinstance(self.lora_dropout["default"], nn.Identity)
        if args or kwargs or self.disable_adapters or self.merged or not is_plain:
            return super().forward(x, *args, **kwargs)
        y = self.base_layer(x)
        down: Any = self.lora_A["default"]
        up: Any = self.lora_B["default"]
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else down.weight.dtype
        if y.dtype != dtype:
            return super().forward(x)
        scaling = self.scaling["default"]
        scaled = up.weight if scaling == 1 else scaling * up.weight
        answer: torch.Tensor = _LowRank.apply(y, x.to(dtype), down.weight.to(dtype), scaled.to(dtype))
        return answer
