"""The work of an ablation in processes of their own, several at a time: encode, train and measure, predict.

A process that fails takes nothing else with it: its words are in `<kind>.log`, the last of them are its reason. Whoever starts jobs
may be stopped: they then save and stop as well, and so they do when nobody waits for them any more. A folder has one worker at a time.
Knows no grid.
"""

import fcntl
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from mvwan.config import Config
from mvwan.errors import MvwanError, PreemptedError
from mvwan.files import read_json, write_json
from mvwan.memory import peak_bytes
from mvwan.signals import on_sigterm

Kind = Literal["encode", "train", "predict"]
_PATIENCE_S = 120
"""A job that was asked to stop finishes its step and saves; after so long it is killed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """One piece of work."""

    name: str
    """For people."""
    kind: Kind
    folder: Path
    """Where its product goes."""
    product: Path
    """The file that is there when it is done, with `key` in it."""
    key: str
    """Of all that the product depends on."""
    config: Config
    options: dict[str, Any]
    """What else the kind needs; see `perform`."""

    @property
    def log(self) -> Path:
        """What its process says."""
        return self.folder / f"{self.kind}.log"

    @property
    def is_done(self) -> bool:
        """Whether the product is there and is of this key. A file that cannot be read is not."""
        try:
            return self.product.is_file() and read_json(self.product).get("key") == self.key
        except (MvwanError, AttributeError):
            return False


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A job that did not come to its end."""

    name: str
    reason: str
    """The last line it said, or how it ended."""
    log: Path


# ── those who start jobs ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def run_jobs(
    jobs: Sequence[Job], processes: int, said: Callable[[Job, str, Failure | None], None], gpus: Sequence[str] = ()
) -> list[Failure]:
    """The failures, after all jobs have run, `processes` of them at a time, the machine's threads and `gpus` divided among them.

    `said(job, "started" | "done" | "failed", failure)` is called as they go. SIGTERM and Ctrl-C stop the jobs, which save first; then
    `PreemptedError` or `KeyboardInterrupt` is raised.
    """
    waiting, running, failures = deque(jobs), dict[Job, BaseProcess](), list[Failure]()
    places, place_of = deque(range(processes)), dict[Job, int]()
    threads = max(1, len(os.sched_getaffinity(0)) // processes)  # however few jobs are left: sums over more threads round otherwise
    with on_sigterm(stop_by_sigterm):
        try:
            while waiting or running:
                while waiting and places:
                    job = waiting.popleft()
                    place_of[job] = places.popleft()
                    running[job] = _start(job, threads, gpus[place_of[job] % len(gpus)] if gpus else None)
                    said(job, "started", None)
                connection.wait([process.sentinel for process in running.values()])
                for job in [job for job, process in running.items() if process.exitcode is not None]:
                    failure = _failure_of(job, running.pop(job).exitcode or 0)
                    places.append(place_of.pop(job))
                    failures += [failure] if failure else []
                    said(job, "failed" if failure else "done", failure)
        except BaseException:
            _stop(list(running.values()))
            raise
    return failures


def visible_gpus() -> tuple[str, ...]:
    """The GPUs of this machine that this process may use, as `CUDA_VISIBLE_DEVICES` names them; found without touching one."""
    import torch

    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return tuple(named.split(",")[:count] if named else map(str, range(count)))


def _start(job: Job, threads: int, gpu: str | None) -> BaseProcess:
    """The job's process: a fork of one that has imported everything and computed nothing, which takes a second, not ten."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # else an import that asks for GPUs makes them unusable in forks
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mvwan.ablation.outcomes", "mvwan.train", "transformers.models.umt5.modeling_umt5"])
    job.folder.mkdir(parents=True, exist_ok=True)
    process = context.Process(target=_work, args=(job, threads, gpu), name=job.name)
    process.start()
    return process


def _failure_of(job: Job, code: int) -> Failure | None:
    if code == 0 and job.is_done:
        return None
    said = job.log.read_text(encoding="utf-8", errors="replace").splitlines() if job.log.exists() else []
    lines = [line.strip() for line in said if line.strip()]
    if code < 0:
        reason = f"ended by {signal.Signals(-code).name}" + (", perhaps for want of memory" if -code == signal.SIGKILL else "")
    else:
        reason = lines[-1].removeprefix("error: ") if lines else f"ended with code {code} and no word"
    return Failure(name=job.name, reason=reason, log=job.log)


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


def stop_by_sigterm() -> None:
    """For `on_sigterm`: raises `PreemptedError`."""
    raise PreemptedError("stopped by SIGTERM; what is finished is kept, and the same command goes on")


@contextmanager
def only_worker(folder: Path, *, wait: bool) -> Iterator[None]:
    """While the block lasts nobody else is in such a block for `folder`; with `wait` after whoever is there now, else `MvwanError`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MvwanError(f"{folder}: another ablation is at work in it. Wait for it, or choose another --output.") from None
        yield


# ── the job's own process ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def do(job: Job) -> None:
    """Nothing; the product is there, after whoever is at work in the folder has ended."""
    with only_worker(job.folder, wait=True):
        write_json(job.product, {"key": job.key, **perform(job)})


def perform(job: Job) -> dict[str, Any]:
    """What the product holds, beside its key.

    `encode` fills the latent cache of `config`. `train` trains and measures losses, movement and costs; `predict` measures what the
    trained run predicts and does. Options: `test_dataset`, `windows`; of `train` also `rgb_weight`, `accept_trainable_change`; of
    `predict` also `denoise_steps`, `trials`, `tasks`, `execute`, `with_controls`.
    """
    from mvwan.ablation.outcomes import measured_windows

    windows = measured_windows(job.config, job.options["test_dataset"])
    if job.kind == "encode":
        return _encode(job.config, windows)
    return _train(job, windows) if job.kind == "train" else _predict(job, windows)


def _encode(config: Config, measured: Any) -> dict[str, Any]:
    from mvwan.latent_cache import build_cache
    from mvwan.model.latents import LatentCodec
    from mvwan.train_check import check_windows

    assert config.data.cache is not None, "an ablation names the cache of its runs"
    found, folder = check_windows(config), Path(config.data.cache)
    codec = LatentCodec.load(config.base.codec or config.base.source, config.data.text_tokens)
    every = (found.training, *([found.validation] if len(found.validation) else []), measured["test"])
    built = [build_cache(each, codec, folder, config.data.heatmap_sigma_px, workers=config.train.num_workers) for each in every]
    return {"encoded": sum(cache.encoded for cache in built)}


def _train(job: Job, windows: Any) -> dict[str, Any]:
    from mvwan.ablation.outcomes import costs, movement, open_cache, velocity_losses
    from mvwan.precision import settle
    from mvwan.train import train

    assert job.config.data.cache is not None, "an ablation names the cache of its runs"
    accept = job.options["accept_trainable_change"]
    trained = job.folder / "trained.json"
    if not trained.is_file() or read_json(trained).get("key") != job.key:
        train(job.config, job.folder, resume=True, accept_trainable_change=accept)
        write_json(trained, {"key": job.key, "peak_memory_mb": _peak_memory_mb()})
    caches = {split: open_cache(job.config, job.config.data.cache, each) for split, each in windows.items()}
    config = settle(job.config)
    rows = velocity_losses(job.folder, config, caches, job.options["windows"], job.options["rgb_weight"])
    rows += costs(job.folder, read_json(trained)["peak_memory_mb"])
    return {"rows": [asdict(row) for row in rows], "movement": movement(job.folder, config, accept)}


def _predict(job: Job, windows: Any) -> dict[str, Any]:
    from mvwan.ablation.outcomes import prediction_errors, trial_outcomes
    from mvwan.sample import load_run

    options = job.options
    run = load_run(job.folder)
    rows = prediction_errors(run, windows["test"], options["windows"], options["denoise_steps"], job.folder / "prediction.npz")
    rates: dict[str, Any] = {}
    if options["trials"]:
        names = ("trials", "tasks", "execute", "denoise_steps", "with_controls")
        tried, rates = trial_outcomes(job.folder, **{name: options[name] for name in names})
        rows += tried
    return {"rows": [asdict(row) for row in rows], "success_rates": rates}


def _peak_memory_mb() -> float:
    """The most that this process ever held: on the accelerator where there is one, else in main memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_bytes() / 2**20


def _work(job: Job, threads: int, gpu: str | None) -> None:
    """Does the job in the process that was started for it, whose words go to the log; a mistake of the user is one line and code 2."""
    import torch

    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    if gpu is not None:
        print(f"GPU {gpu}", flush=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; who started this asks it to stop in order
    signal.signal(signal.SIGTERM, _leave)
    _stop_when_left_alone()
    torch.set_num_threads(threads)
    try:
        do(job)
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
