"""Works in processes of their own, several at a time, the machine's threads and GPUs divided among them.

A process that fails takes nothing else with it: its words are in its log, the last of them are its reason. Whoever starts works may be
stopped: they then save and stop as well, and so they do when nobody waits for them any more. Knows nothing of what a work does.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Protocol, TypeVar

from mvwan.errors import MvwanError, PreemptedError
from mvwan.signals import on_sigterm

TRAINING_MODULES = ("mvwan.train", "transformers.models.umt5.modeling_umt5")
"""What works that train import; importing it once, before they start, takes a second per work instead of ten."""
_PATIENCE_S = 120
"""A work that was asked to stop finishes its step and saves; after so long it is killed."""
_POLL_S = 1.0


class Work(Protocol):
    """What can be done in a process of its own; it is pickled on its way there."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    @property
    def log(self) -> Path:
        """What its process says."""
        ...

    @property
    def is_done(self) -> bool:
        """Whether what it makes is there."""
        ...

    def do(self) -> None:
        """Nothing; afterwards it is done. Raises `MvwanError` for a mistake of the user, `PreemptedError` when it was stopped and saved."""
        ...


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A work that did not come to its end."""

    name: str
    reason: str
    """The last line it said, or how it ended."""
    log: Path


W = TypeVar("W", bound=Work)


def run_works(
    works: Sequence[W],
    processes: int,
    said: Callable[[W, str, Failure | None], None],
    gpus: Sequence[str] = (),
    *,
    preload: Sequence[str],
    meanwhile: Callable[[], None] | None = None,
) -> list[Failure]:
    """The failures, after all works have run, `processes` of them at a time, the machine's threads and `gpus` divided among them.

    `said(work, "started" | "done" | "failed", failure)` is called as they go, `meanwhile` every second. `preload` are modules to import
    before. SIGTERM and Ctrl-C stop the works, which save first; then `PreemptedError` or `KeyboardInterrupt` is raised.
    """
    waiting, running, failures = deque(works), dict[W, BaseProcess](), list[Failure]()
    places, place_of = deque(range(processes)), dict[W, int]()
    threads = max(1, _num_cores() // processes)  # however few works are left: sums over more threads round otherwise
    with on_sigterm(stop_by_sigterm):
        try:
            while waiting or running:
                while waiting and places:
                    work = waiting.popleft()
                    place_of[work] = places.popleft()
                    running[work] = _start(work, threads, gpus[place_of[work] % len(gpus)] if gpus else None, preload)
                    said(work, "started", None)
                connection.wait([process.sentinel for process in running.values()], _POLL_S if meanwhile else None)
                for work in [work for work, process in running.items() if process.exitcode is not None]:
                    failure = _failure_of(work, running.pop(work).exitcode or 0)
                    places.append(place_of.pop(work))
                    failures += [failure] if failure else []
                    said(work, "failed" if failure else "done", failure)
                if meanwhile:
                    meanwhile()
        except BaseException:
            _stop(list(running.values()))
            raise
    return failures


def visible_gpus() -> tuple[str, ...]:
    """The GPUs of this machine that this process may use, as `CUDA_VISIBLE_DEVICES` names them; found without touching one."""
    import torch

    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return tuple(named.split(",")[:count] if named else map(str, range(count)))


def stop_by_sigterm() -> None:
    """For `on_sigterm`: raises `PreemptedError`."""
    raise PreemptedError("stopped by SIGTERM; what is finished is kept, and the same command goes on")


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(work: Work, threads: int, gpu: str | None, preload: Sequence[str]) -> BaseProcess:
    """The work's process: a fork of one that has imported everything and computed nothing."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # else an import that asks for GPUs makes them unusable in forks
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    work.log.parent.mkdir(parents=True, exist_ok=True)
    process = context.Process(target=_work, args=(work, threads, gpu), name=work.name)
    process.start()
    return process


def _failure_of(work: Work, code: int) -> Failure | None:
    if code == 0 and work.is_done:
        return None
    said = work.log.read_text(encoding="utf-8", errors="replace").splitlines() if work.log.exists() else []
    lines = [line.strip() for line in said if line.strip()]
    if code < 0:
        reason = f"ended by {signal.Signals(-code).name}" + (", perhaps for want of memory" if -code == signal.SIGKILL else "")
    else:
        reason = lines[-1].removeprefix("error: ") if lines else f"ended with code {code} and no word"
    return Failure(name=work.name, reason=reason, log=work.log)


def _stop(processes: Sequence[BaseProcess]) -> None:
    """Nothing; all have ended, having saved what they could."""
    for process in processes:
        process.terminate()
    end = time.monotonic() + _PATIENCE_S
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()


def _work(work: Work, threads: int, gpu: str | None) -> None:
    """Does the work in the process that was started for it, whose words go to the log; a mistake of the user is one line and code 2."""
    import torch

    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    log = os.open(work.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    if gpu is not None:
        print(f"GPU {gpu}", flush=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; who started this asks it to stop in order
    signal.signal(signal.SIGTERM, _leave)
    _stop_when_left_alone()
    torch.set_num_threads(threads)
    try:
        work.do()
    except MvwanError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except PreemptedError as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        sys.exit(PreemptedError.EXIT_CODE)


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(PreemptedError.EXIT_CODE)


def _stop_when_left_alone() -> None:
    """Nothing; when whoever started this process is gone, it gets SIGTERM, as if it had been stopped in order."""
    starter = multiprocessing.parent_process()
    assert starter is not None, "jobs are started by another process"

    def watch() -> None:
        starter.join()  # not the process that this one was forked from, which lives as long as its forks
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
