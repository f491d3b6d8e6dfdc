"""What this process holds of main memory, as Linux counts it. Knows nothing else."""

from pathlib import Path
from typing import Literal


def memory_bytes(what: Literal["VmRSS", "VmHWM"]) -> int:
    """`VmRSS`: resident now; `VmHWM`: the most that ever was. Of this program alone: the largest size that `getrusage` gives includes,
    after a fork, that of the parent."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))
