"""What this process holds of main memory, and what is left of it, as Linux counts it; or of the accelerator. Knows nothing else."""

import resource
from pathlib import Path


def resident_bytes() -> int:
    """What this program holds now."""
    return _counted("VmRSS")


def peak_bytes(*, children: bool = False) -> int:
    """The most that this program ever held; with `children`, or a finished process that it started, whichever held more.

    Of this program alone: the largest size that `getrusage` gives for the process itself includes, after a fork, that of the parent.
    """
    of_children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return max(_counted("VmHWM"), of_children) if children else _counted("VmHWM")


def peak_memory_mb() -> float:
    """The most that this process ever held: on the accelerator where there is one, else in main memory."""
    import torch

    return (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_bytes()) / 2**20


def available_bytes() -> int:
    """What a new process can take before others have to be swapped out."""
    return _counted("MemAvailable", "/proc/meminfo")


def _counted(what: str, where: str = "/proc/self/status") -> int:
    lines = Path(where).read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))
