"""Several trainings of one command side by side, each in a process of its own with its share of the machine, and a bar for each.

Two small trainings on one thread each take little more than half as long as one after the other on two. Knows no stage and no table.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mvwan.checkpoint import latest_checkpoint, read_manifest
from mvwan.config import Config
from mvwan.errors import MvwanError
from mvwan.files import read_json, sha256_json, write_json
from mvwan.memory import available_bytes, peak_memory_mb, resident_bytes
from mvwan.plan import GB, memory_of
from mvwan.processes import TRAINING_MODULES, Failure, run_works, visible_gpus
from mvwan.step_trace import trace
from mvwan.train import train

_TAIL_BYTES = 2**15
"""Of a log of steps: a few lines of every kind."""
_LINES = 10
"""That a training writes where no bar can be shown."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Training:
    """A training that has its settings; what it says goes to `train.log` in its folder."""

    name: str
    config: Config
    folder: Path

    @property
    def log(self) -> Path:
        """What its process says."""
        return self.folder / "train.log"

    @property
    def last_step(self) -> dict[str, Any]:
        """What was logged of the newest optimizer step; step 0 before the first."""
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return {"step": 0}
        with path.open("rb") as file:  # the end alone: it is asked every second, and a long run has written megabytes
            start = max(0, path.stat().st_size - _TAIL_BYTES)
            file.seek(start)
            whole = file.read().split(b"\n")[bool(start) : -1]
        lines = [line for line in map(json.loads, whole) if line["kind"] == "train"]
        return lines[-1] if lines else {"step": 0}

    @property
    def is_done(self) -> bool:
        """Whether its last checkpoint is there."""
        found = latest_checkpoint(self.folder)
        return found is not None and read_manifest(found)["step"] == self.config.train.steps

    @property
    def cost(self) -> dict[str, float]:
        """`seconds` of the attempt that finished it, and `peak_memory_mb` of its process. Raises `MvwanError` before."""
        return read_json(self._cost)

    @property
    def _cost(self) -> Path:
        return self.folder / "cost.json"

    def do(self) -> None:
        """Nothing; it is trained, going on from its newest checkpoint. Raises what `train` raises."""
        start = time.monotonic()
        train(self.config, self.folder, resume=True)
        write_json(self._cost, {"seconds": round(time.monotonic() - start, 1), "peak_memory_mb": round(peak_memory_mb())})


def train_side_by_side(
    trainings: Sequence[Training], at_a_time: int, console: Console, done: Callable[[Training], None] = lambda training: None
) -> None:
    """Nothing; all are trained, `at_a_time` of them at most: one per GPU where there are any, else as many as main memory holds.

    `done` is called with each that has come to its end. A failure stops no other; after all it raises `MvwanError`. Stopped, it saves.
    """
    if not trainings:
        return
    gpus = visible_gpus()
    at_a_time = min(at_a_time, len(gpus)) if gpus else as_many_as_fit([training.config for training in trainings], at_a_time, console)
    with _Bars(trainings, console) as bars:

        def said(training: Training, event: str, failure: Failure | None) -> None:
            bars.show()
            if event == "done":
                done(training)

        failures = run_works(trainings, at_a_time, said, gpus, preload=TRAINING_MODULES, meanwhile=bars.show)
    if failures:
        raise MvwanError("; ".join(f"{failure.name}: {failure.reason} (all of it: {failure.log})" for failure in failures))


def as_many_as_fit(configs: Sequence[Config], processes: int, console: Console) -> int:
    """How many of `processes` trainings main memory holds at a time, at least one; says so where that is fewer. On GPUs all of them."""
    if processes == 1 or visible_gpus():
        return processes
    alike = [replace(config, seed=0, train=replace(config.train, learning_rate=1.0)) for config in configs]
    different = {sha256_json(config.to_dict()): config for config in alike}.values()
    steps = [memory_of(trace(config, "cpu"), "one process", 1, config.train.ema_decay > 0).total for config in different]
    needed, available = max(steps) + resident_bytes(), available_bytes()
    fit = max(1, min(processes, int(available / needed)))
    if fit < processes:
        told = f"a run takes some {needed / GB:.1f} GB, {available / GB:.1f} GB are free"
        console.print(f"{fit} at a time instead of {processes}: {told}", soft_wrap=True)
    return fit


class _Bars:
    """How far each training is; a few lines where the console is no terminal."""

    def __init__(self, trainings: Sequence[Training], console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps{task.fields[loss]}"))
        times = (TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
        self._bars = Progress(*columns, *times, console=console, speed_estimate_period=600, disable=not console.is_terminal)
        self._console = console
        self._told = {training: training.last_step["step"] for training in trainings}
        self._line_of: dict[Training, TaskID] = {
            training: self._bars.add_task(training.name, total=training.config.train.steps, completed=self._told[training], loss="")
            for training in trainings
        }

    def __enter__(self) -> "_Bars":
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def show(self) -> None:
        """Nothing; the bars, or a line, say how far each is."""
        for training, line in self._line_of.items():
            last, steps = training.last_step, training.config.train.steps
            loss = f", loss {last['loss']:.3f}" if last["step"] else ""
            self._bars.update(line, completed=last["step"], loss=loss)
            if not self._console.is_terminal and last["step"] * _LINES // steps > self._told[training] * _LINES // steps:
                self._told[training] = last["step"]
                self._console.print(f"{training.name}: {last['step']:,} of {steps:,} steps{loss}", soft_wrap=True)
