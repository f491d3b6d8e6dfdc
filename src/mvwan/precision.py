"""What `auto` stands for in `base.dtype` and `train.precision`: bfloat16 where a device multiplies it fast, else float32.

A processor without such instructions multiplies bfloat16 a hundred times slower than float32, and says nothing of it. Trained tensors
are float32 either way. Knows no model and no file.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from mvwan.config import Config


def has_fast_bfloat16(device: str | torch.device | None = None) -> bool:
    """Whether `device` (None: the accelerator, or the processor where there is none) has instructions for products in bfloat16."""
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = torch.device(device or "cpu")
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
    advice = "; this machine has no instructions for them: with train.precision=auto and base.dtype=auto it is far faster"
    return "products in bfloat16" + ("" if has_fast_bfloat16() else advice)
