"""Frozen weights of the blocks in 8 or 4 bits, by torchao: a half or a quarter of bfloat16's memory, widened for each product alone.

Shapes, names and types stay what they were, so tables and checkpoints do not notice; what trains stays float32. Knows no LoRA, no loop.
"""

import importlib.util
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from mvwan.config import Quantize
from mvwan.errors import MvwanError
from mvwan.precision import WideningLinear

STORED_BITS = {"int8": 8.0, "fp8": 8.0, "nf4": 4.125}
"""Per weight: nf4 has 8 bits of scale for every 64 weights. The scales of rows, and those of nf4's scales, are not counted."""
_NF4_BLOCK = 64


def check_quantize(kind: Quantize) -> None:
    """Nothing, or `MvwanError` when frozen weights cannot be held as `kind` on this machine."""
    if kind != "none" and importlib.util.find_spec("torchao") is None:
        raise MvwanError(f"base.quantize={kind}: needs torchao, which is not installed. pip install 'mvwan[quantize]', or set none.")


def is_quantizable(name: str, layer: nn.Module, kind: Quantize) -> bool:
    """Whether the weight of `layer`, called `name` in the model, is held as `kind`: a frozen matrix of a linear layer in a block."""
    if kind == "none" or not name.startswith("blocks.") or not isinstance(layer, WideningLinear) or layer.weight.requires_grad:
        return False
    return layer.weight.ndim == 2 and (kind != "nf4" or layer.weight.numel() % _NF4_BLOCK == 0)


def stored_bytes(weight: torch.Tensor, kind: Quantize) -> int:
    """What a weight takes when it is held as `kind`."""
    return int(weight.numel() * STORED_BITS[kind] / 8) if kind != "none" else weight.nbytes


@torch.no_grad()
def quantize_frozen(model: nn.Module, kind: Quantize, keep: Collection[str] = ()) -> tuple[str, ...]:
    """Names of the weights that now are held as `kind`; those in `keep` stay as they are. One weight at a time is there in both forms.

    For a model that computes and trains from here on: nothing can be loaded into, merged into or cast from what was rounded. Raises
    `MvwanError` when torchao is missing or nothing is frozen.
    """
    if kind == "none":
        return ()
    check_quantize(kind)
    found = {
        f"{name}.weight": layer
        for name, layer in model.named_modules()
        if isinstance(layer, WideningLinear) and is_quantizable(name, layer, kind) and f"{name}.weight" not in keep
    }
    if not found:
        raise MvwanError(f"base.quantize={kind}: no weight of a block is frozen, so nothing can be held narrower. Set base.quantize=none.")
    for layer in found.values():
        layer.weight = nn.Parameter(_narrow(layer.weight.detach(), kind), requires_grad=False)
        layer.__class__ = QuantizedLinear
    return tuple(found)


def stored_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a quantised weight consists of; the tensor itself where it is plain."""
    return [part for name in _inner_names(tensor) for part in stored_parts(getattr(tensor, name))] or [tensor]


def share_parts(copy: torch.Tensor, original: torch.Tensor) -> None:
    """Nothing; the quantised weight `copy` then consists of the tensors of `original`, which equals it."""
    for name in _inner_names(copy):
        if _inner_names(getattr(copy, name)):
            share_parts(getattr(copy, name), getattr(original, name))
        else:
            setattr(copy, name, getattr(original, name))


def _inner_names(tensor: Any) -> list[str]:
    """Of the tensors in a quantised weight; none of a plain tensor."""
    return tensor.__tensor_flatten__()[0] if type(tensor).__module__.startswith("torchao.") else []


def _narrow(weight: torch.Tensor, kind: Quantize) -> torch.Tensor:
    from torchao import quantization

    if kind == "nf4":
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

        blocks = weight.numel() // _NF4_BLOCK
        return to_nf4(weight, _NF4_BLOCK, next(size for size in (256, 128, 64, 32, 16, 8, 4, 2, 1) if blocks % size == 0))
    holder = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    holder.weight = nn.Parameter(weight, requires_grad=False)
    config = quantization.Int8WeightOnlyConfig() if kind == "int8" else quantization.Float8WeightOnlyConfig()
    quantization.quantize_(holder, config)
    if kind == "fp8":  # the scale of a row of zeros is 0, and its numbers came out as 0 / 0
        for part in stored_parts(holder.weight.data):
            if part.dtype == torch.float8_e4m3fn:
                part.view(torch.uint8)[(weight == 0).all(dim=1)] = 0
    return holder.weight.data


def _widened(weight: Any, dtype: torch.dtype) -> torch.Tensor:
    widen: Callable[[], torch.Tensor] = getattr(weight, "get_original_weight", None) or weight.dequantize
    return widen().to(dtype)


class _QuantizedProduct(torch.autograd.Function):
    """x weight^T + bias, rounded once. What waits for the backward pass is the weight as it is stored."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return nn.functional.linear(x, _widened(weight, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor | None]:
        (gradient,) = gradients
        of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return gradient @ _widened(ctx.weight, gradient.dtype), None, of_bias


class QuantizedLinear(WideningLinear):
    """A linear layer whose frozen weight is stored in fewer bits; its products are in the type of its input, or of autocast."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        device = x.device.type
        x = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
        answer: torch.Tensor = _QuantizedProduct.apply(x, self.weight, None if self.bias is None else self.bias.to(x.dtype))
        return answer
