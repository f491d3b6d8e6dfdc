"""What products are computed in: what `auto` stands for in `base.dtype` and `train.precision`, and float32 products of bfloat16 weights.

A processor without instructions for bfloat16 multiplies it a hundred times slower than float32, and says nothing of it. There, frozen
weights may still be held in bfloat16: each is widened for its product alone. Trained tensors are float32 either way. Knows no model
and no file.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mvwan.config import Config

_ROWS_AT_A_TIME = 1024
"""Of a weight that is widened. Parts of that size reuse memory; a whole weight would get new pages from the system, at seven times the
cost of widening it."""


def default_device() -> torch.device:
    """The machine's accelerator, or its processor where there is none."""
    return (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None) or torch.device("cpu")


def has_fast_bfloat16(device: str | torch.device | None = None) -> bool:
    """Whether `device` (None: the default one) has instructions for products in bfloat16."""
    device = torch.device(device or default_device())
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # With AVX-512 oneDNN has kernels for it; below it, and on other architectures, it may have none.
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def settle(config: Config, device: str | torch.device | None = None, saved: Mapping[str, Any] | None = None) -> Config:
    """`config` without `auto`: as `device` computes best, or as in `saved`, the settings of a run that it continues."""
    fast = has_fast_bfloat16(device)
    dtype, precision = config.base.dtype, config.train.precision
    if dtype == "auto":
        dtype = saved["base"]["dtype"] if saved else "bfloat16" if fast else "float32"
    if precision == "auto":
        precision = saved["train"]["precision"] if saved else "bf16" if fast else "no"
    return replace(config, base=replace(config.base, dtype=dtype), train=replace(config.train, precision=precision))


def in_words(config: Config) -> str:
    """What a settled config computes in, for a person; with a warning where that is slow on this machine."""
    if config.train.precision == "no" and config.base.dtype == "float32":
        return "products in float32"
    if config.train.precision == "no" and not has_fast_bfloat16():
        return "products in float32, of frozen weights held in bfloat16"
    advice = "; this machine has no instructions for them: with train.precision=auto it is far faster"
    return "products in bfloat16" + ("" if has_fast_bfloat16() else advice)


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x weight^T + bias in the type of `x`, or of autocast; a narrower `weight` is widened for this product and again for its gradient."""
    if weight.element_size() >= x.element_size() or torch.is_autocast_enabled(x.device.type):
        return nn.functional.linear(x, weight, bias)
    wide_bias = None if bias is None else bias.to(x.dtype)
    if weight.requires_grad:
        return nn.functional.linear(x, weight.to(x.dtype), wide_bias)
    widened: torch.Tensor = _WidenedProduct.apply(x, weight)
    return widened if wide_bias is None else widened + wide_bias


class _WidenedProduct(torch.autograd.Function):
    """x weight^T. What waits for the backward pass is the weight as it is held, so nothing wide lives longer than a part's product."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        rows = x.flatten(0, -2)
        answer = rows.new_empty(len(rows), len(weight))
        for part, wide in _widened_parts(weight, x.dtype):
            answer[:, part] = rows @ wide.T
        return answer.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        rows = gradients[0].flatten(0, -2)
        answer = rows.new_zeros(len(rows), weight.shape[1])
        for part, wide in _widened_parts(weight, rows.dtype):
            answer.addmm_(rows[:, part], wide)
        return answer.unflatten(0, gradients[0].shape[:-1]), None


def _widened_parts(weight: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    for start in range(0, len(weight), _ROWS_AT_A_TIME):
        part = slice(start, start + _ROWS_AT_A_TIME)
        yield part, weight[part].to(dtype)


class WideningLinear(nn.Linear):
    """A linear layer that takes inputs wider than its frozen weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return product(x, self.weight, self.bias)
