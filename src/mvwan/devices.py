"""GPUs by name, and what their makers say of them; a user's own ones, read from words. Knows no model and measures nothing."""

import re
from dataclasses import dataclass

from mvwan.errors import MvwanError, nearest


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU."""

    name: str
    memory_gb: float
    """Units of 10^9 bytes. A maker's number is read so, although cards hold up to 7 % more: that is left to what an allocator wastes."""
    tflops: float
    """Dense bfloat16 products summed in float32, 10^12 floating-point operations per second, as the maker states them."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """GPUs of a kind that train together."""

    device: Device
    count: int

    @property
    def name(self) -> str:
        return self.device.name if self.count == 1 else f"{self.count} x {self.device.name}"


_TABLE = (
    ("rtx-3090", 24, 71.0),
    ("rtx-4090", 24, 165.2),
    ("rtx-5090", 32, 209.5),
    ("rtx-a6000", 48, 154.8),
    ("rtx-6000-ada", 48, 364.2),
    ("l4", 24, 121.0),
    ("l40s", 48, 362.0),
    ("a100-40gb", 40, 312.0),
    ("a100-80gb", 80, 312.0),
    ("h100-80gb", 80, 989.4),
    ("h200-141gb", 141, 989.4),
    ("b200-180gb", 180, 2250.0),
)
"""Name, memory in GB, dense bfloat16 TFLOP/s. h100-80gb is the SXM5 form, b200-180gb as in HGX.

Source: NVIDIA's data sheets and architecture white papers: Ampere GA102 (rtx-3090, rtx-a6000), Ada (rtx-4090, rtx-6000-ada, l4, l40s),
Blackwell RTX (rtx-5090), A100, H100, H200 and HGX B200. What they state with sparsity is halved here.
"""
DEVICES: dict[str, Device] = {name: Device(name=name, memory_gb=memory_gb, tflops=tflops) for name, memory_gb, tflops in _TABLE}
COMMON: tuple[str, ...] = ("rtx-4090", "rtx-5090", "l40s", "a100-80gb", "8 x rtx-4090", "8 x h100-80gb")
"""What is planned for when nobody names a device."""
DEFAULT_EFFICIENCY = 0.4
"""Assumed share of the stated rate that training sustains, where nobody gives another."""
_COUNT = re.compile(r"(\d{1,6})\s*x\s*(.+)", re.IGNORECASE)
_OWN = re.compile(r"([^:]+):(\d+(?:\.\d+)?)GB:(\d+(?:\.\d+)?)TFLOPS", re.IGNORECASE)


def read_machine(words: str) -> Machine:
    """The machine that `words` name: `h100-80gb`, `8 x h100-80gb`, `mygpu:48GB:200TFLOPS`. Raises `MvwanError` for anything else."""
    counted = _COUNT.fullmatch(words.strip())
    count, name = (int(counted[1]), counted[2].strip()) if counted else (1, words.strip())
    if count < 1:
        raise MvwanError(f"--device {words!r}: {count} devices; at least 1 is needed, for example --device '8 x h100-80gb'")
    if own := _OWN.fullmatch(name):
        memory_gb, tflops = float(own[2]), float(own[3])
        if not (memory_gb and tflops):
            raise MvwanError(f"--device {words!r}: memory and TFLOPS must be more than 0, for example --device mygpu:48GB:200TFLOPS")
        return Machine(device=Device(name=own[1].strip(), memory_gb=memory_gb, tflops=tflops), count=count)
    if name.lower() not in DEVICES:
        raise MvwanError(
            f"--device {words!r}: no such device; there are {', '.join(DEVICES)}.{nearest(name.lower(), DEVICES)} Give one of them, or "
            "your own as NAME:48GB:200TFLOPS (memory, dense bfloat16), with '8 x ' in front for several."
        )
    return Machine(device=DEVICES[name.lower()], count=count)
