"""The work of an ablation in processes of their own, several at a time: encode, train and measure, predict. A folder has one worker
at a time; the words of a job are in its `<kind>.log`. Knows no grid.
"""

import fcntl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mvwan.config import Config
from mvwan.errors import MvwanError
from mvwan.files import read_json, write_json
from mvwan.memory import peak_memory_mb
from mvwan.processes import TRAINING_MODULES, Failure, run_works

Kind = Literal["encode", "train", "predict"]


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

    def do(self) -> None:
        """Nothing; the product is there, after whoever is at work in the folder has ended."""
        with only_worker(self.folder, wait=True):
            write_json(self.product, {"key": self.key, **perform(self)})

    @property
    def is_done(self) -> bool:
        """Whether the product is there and is of this key. A file that cannot be read is not."""
        try:
            return self.product.is_file() and read_json(self.product).get("key") == self.key
        except (MvwanError, AttributeError):
            return False


def run_jobs(
    jobs: Sequence[Job], processes: int, said: Callable[[Job, str, Failure | None], None], gpus: Sequence[str] = ()
) -> list[Failure]:
    """The failures, after all jobs have run; see `processes.run_works`."""
    return run_works(jobs, processes, said, gpus, preload=("mvwan.ablation.outcomes", *TRAINING_MODULES))


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
        write_json(trained, {"key": job.key, "peak_memory_mb": peak_memory_mb()})
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
