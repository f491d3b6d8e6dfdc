"""Stock transformer -> `MultiViewWan` + a report of what was added, widened and left alone; and the loader that everybody calls.

`load_model` is base + surgery + trainable groups + checkpoint, in this order, for training, sampling and tests alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mvwan.errors import MvwanError
from mvwan.model.multiview_wan import Fusion, MultiViewWan, initial_values, stock_arguments
from mvwan.model.wan import WanTransformer3DModel, describe, in_float32_island, load_transformer


@dataclass(frozen=True, kw_only=True)
class SurgeryReport:
    """What `adapt` did to each tensor of the state."""

    kept: tuple[str, ...]
    """Stock tensors under their own name."""
    widened: dict[str, str]
    """Name -> how it was widened."""
    added: dict[str, str]
    """Name -> where its initial value comes from."""
    stock_parameters: int
    adapted_parameters: int

    def render(self) -> str:
        """A few lines for a person."""
        origins: dict[str, int] = {}
        for origin in self.added.values():
            origins[origin] = origins.get(origin, 0) + 1
        lines = [
            f"{self.stock_parameters:,} parameters -> {self.adapted_parameters:,}",
            f"  left alone: {len(self.kept)} tensors",
            *(f"  widened:    {name} ({how})" for name, how in self.widened.items()),
            *(f"  added:      {count} tensors ({origin})" for origin, count in origins.items()),
        ]
        return "\n".join(lines)


def adapt(stock: WanTransformer3DModel, views: int = 3, fusion: Fusion = "channel") -> tuple[MultiViewWan, SurgeryReport]:
    """`MultiViewWan` that equals `stock` on every view's RGB stream, and the report.

    Takes over the tensors of `stock` (which must not be used afterwards). Works on the meta device. Raises `MvwanError` for a
    base that has no multi-view form.
    """
    before = {name: tensor for name, tensor in stock.named_parameters()}
    new = initial_values(before, fusion)
    with torch.device("meta"):
        model = MultiViewWan(**stock_arguments(stock.config), views=views, fusion=fusion)
    expected = dict(model.named_parameters())
    state: dict[str, torch.Tensor] = {}
    kept: list[str] = []
    for name in expected:
        if name in new:
            state[name] = new[name][0].to(torch.float32) if in_float32_island(name, MultiViewWan) else new[name][0]
        else:
            state[name] = before[name]
            kept.append(name)
    model.load_state_dict({name: tensor.data for name, tensor in state.items()}, strict=True, assign=True)
    model.rope = stock.rope
    widened = {name: how for name, (_, how) in new.items() if name in before}
    added = {name: how for name, (_, how) in new.items() if name not in before}
    report = SurgeryReport(
        kept=tuple(kept),
        widened=widened,
        added=added,
        stock_parameters=sum(tensor.numel() for tensor in before.values()),
        adapted_parameters=sum(tensor.numel() for tensor in state.values()),
    )
    return model.eval().requires_grad_(False), report
