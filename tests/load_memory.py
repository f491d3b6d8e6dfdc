"""Peak memory of building a base of random weights, or of loading one from shards, in a process of its own. Knows no test."""

import ctypes
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mvwan.model.wan import WanTransformer3DModel, load_transformer

SIZES: dict[str, Any] = {
    "num_attention_heads": 12,
    "attention_head_dim": 64,
    "ffn_dim": 3072,
    "num_layers": 8,
    "text_dim": 128,
    "freq_dim": 32,
}


@dataclass(frozen=True)
class Growth:
    """What was measured."""

    model_bytes: int
    """Of the parameters, as the model holds them."""
    peak_bytes: int
    """By how much the process grew at most."""

    @property
    def copies(self) -> float:
        """Models of that size in what the process grew by."""
        return self.peak_bytes / self.model_bytes


def write_base(folder: Path, dtype: str, shard_mb: int = 40) -> Path:
    """`folder`, a base of random weights in shards of that size; in a process of its own, so that nothing of it stays in this one."""
    _python(f"write({str(folder)!r}, {dtype!r}, {shard_mb})")
    return folder


def load_growth(folder: Path, dtype: str, random_weights: bool = False) -> Growth:
    """The growth of a process that gets the transformer of the base in `folder` in `dtype`."""
    *_, answer = _python(f"load({str(folder)!r}, {dtype!r}, {random_weights})").splitlines()
    return Growth(*map(int, answer.split()))


def _python(call: str) -> str:
    code = f"import tests.load_memory as one; one.{call}"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    return done.stdout


def write(folder: str, dtype: str, shard_mb: int) -> None:
    """Nothing; the base is written."""
    torch.set_num_threads(1)
    model = WanTransformer3DModel(in_channels=48, out_channels=48, **SIZES).to(getattr(torch, dtype))
    model.save_pretrained(f"{folder}/transformer", max_shard_size=f"{shard_mb}MB")


def load(folder: str, dtype: str, random_weights: bool) -> None:
    """Nothing; prints the bytes of the model and those by which this process grew at most."""
    torch.set_num_threads(1)
    for drawn in (False, True):  # everything that is imported on the way, and the pages of its code, are there
        _bytes_of(load_transformer("tiny", torch.bfloat16, random_weights=drawn))
    ctypes.CDLL(None).malloc_trim(0)  # what imports left to the allocator would be filled first, and not count
    start = _status("VmRSS")
    model = load_transformer(folder, getattr(torch, dtype), random_weights=random_weights)
    print(_bytes_of(model), _status("VmHWM") - start)


def _bytes_of(model: Any) -> int:
    """Bytes of the parameters, after reading every page of them."""
    return sum(parameter.nbytes for parameter in model.parameters() if int(parameter.view(torch.uint8).count_nonzero()) >= 0)


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])
