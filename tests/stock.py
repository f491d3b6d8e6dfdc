"""A stock Wan of two narrow blocks, for the tests that adapt one: the real class at tiny size, its weights a function of seed 0."""

import torch

from mvwan.model.wan import WanTransformer3DModel, in_float32_island

_SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 48,
    "out_channels": 48,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 2,
}


def make_stock(dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    """The model, frozen and in eval mode; products in `dtype`, the float32 islands in float32."""
    torch.manual_seed(0)
    stock = WanTransformer3DModel(**_SIZES).eval().requires_grad_(False)
    for name, parameter in stock.named_parameters():
        if not in_float32_island(name):
            parameter.data = parameter.data.to(dtype)
    return stock
