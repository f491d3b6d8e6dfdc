"""Which kernel attends: back ends by name, called through diffusers' dispatcher, refused with the reason where they cannot run.

A back end changes speed, memory and the last bits; never what is computed. Knows no block and no run.
"""

from typing import Any, get_args

import torch

from mvwan.config import Attention
from mvwan.errors import MvwanError
from mvwan.model.context_parallel import TokenSplit
from mvwan.model.wan import AttentionBackendName, WanAttnProcessor, attention_backend
from mvwan.precision import default_device

_DISPATCHED: dict[Attention, AttentionBackendName] = {
    "auto": AttentionBackendName.NATIVE,
    "math": AttentionBackendName.NATIVE,
    "native": AttentionBackendName.NATIVE,
    "cudnn": AttentionBackendName._NATIVE_CUDNN,
    "flash": AttentionBackendName.FLASH,
    "flash3": AttentionBackendName._FLASH_3,
    "sage": AttentionBackendName.SAGE,
    "flex": AttentionBackendName.FLEX,
    "xformers": AttentionBackendName.XFORMERS,
}
_PACKAGES = {"flash": "flash-attn", "flash3": "flash-attn-3", "sage": "sageattention", "xformers": "xformers"}
_ANYWHERE = ("auto", "math", "native")
_HALF_ONLY = ("cudnn", "flash", "flash3", "sage")
_NO_GRADIENT = ("sage",)
_EXCHANGING = ("auto", "native", "cudnn", "flash", "sage")
"""Those around which diffusers exchanges tokens between processes."""
_LARGEST_MATRIX = 2**30
"""Bytes of attention weights up to which `auto` multiplies them out on a CPU. Beyond, torch's fused kernel, whose memory does not grow
with the square of the tokens."""


def check_attention(name: Attention, device: str | torch.device | None = None, *, half: bool, trains: bool, is_split: bool = False) -> None:
    """Nothing, or `MvwanError` saying why back end `name` cannot attend on `device` (None: the default one).

    half: whether products are in bfloat16 or float16; trains: whether gradients are needed; is_split: whether several processes share
    the tokens.
    """
    kind = torch.device(device or default_device()).type
    problem = None
    if name not in _ANYWHERE and kind != "cuda":
        problem = f"it needs a CUDA device, this one is {kind!r}"
    elif name in _NO_GRADIENT and trains:
        problem = "it has no gradient; it is for predictions alone"
    elif name not in _EXCHANGING and is_split:
        problem = "diffusers cannot exchange tokens around it"
    elif name in _HALF_ONLY and not half:
        problem = "it computes in bfloat16 or float16 alone, and products are in float32 (train.precision=no)"
    else:
        try:
            with attention_backend(_DISPATCHED[name]):
                pass
        except (RuntimeError, ImportError) as error:
            package = f", and the package {_PACKAGES[name]} is missing or too old" if name in _PACKAGES else ""
            problem = f"diffusers cannot use it{package} ({error})"
    if problem:
        raise MvwanError(f"attention {name!r}: {problem}. Choose another of {', '.join(get_args(Attention))}; auto always works.")


class NamedAttention(WanAttnProcessor):
    """Stock Wan's attention by the kernel of a name.

    `math`, and `auto` on a CPU as long as the matrix of weights is small, multiply it out themselves, for which torch's fused kernel takes
    longer; every other name goes through diffusers' dispatcher.
    """

    def __init__(self, name: Attention = "auto", split: TokenSplit | None = None) -> None:
        super().__init__()
        self.name: Attention = name
        self._parallel_config = None if split is None else split.parallel
        # Never None: diffusers would then ask an environment variable.
        self._attention_backend = _DISPATCHED[name]

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """[B N D], what diffusers' processor of the same arguments gives."""
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        matrix_bytes = 4 * len(hidden_states) * attn.heads * hidden_states.shape[1] * seen.shape[1]
        by_itself = self.name == "math" or (self.name == "auto" and hidden_states.device.type == "cpu" and matrix_bytes <= _LARGEST_MATRIX)
        if not by_itself or self._parallel_config is not None or attention_mask is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        query, key, value = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(seen)), attn.to_v(seen)
        query, key, value = (part.unflatten(2, (attn.heads, -1)) for part in (query, key, value))
        if rotary_emb is not None:
            query, key = _rotated(query, *rotary_emb), _rotated(key, *rotary_emb)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        weights = torch.softmax((query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2), dim=-1)
        answer = (weights.type_as(value) @ value).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](answer.type_as(query)))


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [B N heads D], each pair of neighbours turned by its angle; cos and sin [1 N 1 D] name each angle twice."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)
