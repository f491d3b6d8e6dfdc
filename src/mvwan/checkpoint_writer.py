"""Saves the checkpoints of a run one after the other: at once, or in the background while training goes on. One process's view.

Knows no optimizer and no loop: it gets tensors and writes folders.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mvwan.checkpoint import save_checkpoint


class CheckpointWriter:
    """Writes checkpoints into `output`. What is saved in the background must not change any more: give copies."""

    def __init__(self, output: Path, keep_last: int, keep_best: bool, in_background: bool) -> None:
        self._write: Callable[..., Path] = lambda **content: save_checkpoint(output, keep_last=keep_last, keep_best=keep_best, **content)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint") if in_background else None
        self._pending: Future[Path] | None = None

    def save(
        self,
        step: int,
        tensors: Mapping[str, torch.Tensor],
        manifest: Mapping[str, Any],
        optimizer_state: Mapping[str, torch.Tensor],
        state: Mapping[str, Any],
        ema: Mapping[str, torch.Tensor] | None,
        reader: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Nothing; the checkpoint is on the disk, or will be: `wait` tells. An earlier save is finished first; what it raised comes."""
        self.wait()
        content: dict[str, Any] = {"step": step, "manifest": manifest, "state": state, "reader": reader}
        named = {"tensors": tensors, "optimizer_state": optimizer_state, "ema": ema}
        if self._pool is None:
            self._write(**content, **named)
            return
        self._pending = self._pool.submit(self._write, **content, **named)

    def wait(self) -> None:
        """Nothing, once the last save is whole on the disk. Raises what it raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
