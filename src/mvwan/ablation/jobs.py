"""The work of an ablation in processes of their own, several at a time: encode, train and measure, predict. A folder has one worker
at a time; the words of a job are in its `<kind>.log`. Knows no grid.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mvwan.config import Config
from mvwan.errors import MvwanError
from mvwan.files import only_worker, read_json, write_json
from mvwan.memory import peak_memory_mb
from mvwan.processes import TRAINING_MODULES, Failure, run_works

Kind = Literal["encode", "train", "predict"]
TRAINING_FILE = "training.json"
"""In the folder of a run: what its training started from, and what it needed."""


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


def check_started(folder: Path, trained_from: str) -> dict[str, Any]:
    """What is known of the training in the folder of a run: nothing, or that it began, or also `peak_memory_mb`, when it has ended.

    Raises `MvwanError` when it began from something else than `trained_from`: going on with it would show old weights as new ones.
    """
    mark = folder / TRAINING_FILE
    known = read_json(mark) if mark.is_file() else {}
    is_there = bool(known) or (folder / "checkpoints").is_dir()
    if is_there and known.get("trained_from") != trained_from:
        raise MvwanError(
            f"{folder}: holds a run that was trained from another base, checkpoint or data set under the same names. Choose another "
            "--output, or remove that folder to train it anew."
        )
    return known


# ── the job's own process ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def perform(job: Job) -> dict[str, Any]:
    """What the product holds, beside its key.

    `encode` fills the latent cache of `config`. `train` trains and measures losses, movement and costs; `predict` measures what the
    trained run predicts and does. Options: `test_dataset`, `seeds`, `windows`; of `train` also `trained_from`, `rgb_weight`, `noise`,
    `accept_trainable_change`; of `predict` also `denoise_steps`, `trials`, `tasks`, `execute`, `with_controls`.
    """
    from mvwan.ablation.outcomes import measured_windows

    windows = measured_windows(job.config, job.options["test_dataset"], job.options["seeds"])
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
    mark, start = job.folder / TRAINING_FILE, {"trained_from": job.options["trained_from"]}
    known = check_started(job.folder, start["trained_from"])
    if "peak_memory_mb" not in known:
        write_json(mark, start)
        train(job.config, job.folder, resume=True, accept_trainable_change=accept)
        known = {**start, "peak_memory_mb": peak_memory_mb()}
        write_json(mark, known)
    caches = {split: open_cache(job.config, job.config.data.cache, each) for split, each in windows.items()}
    config = settle(job.config)
    rows = velocity_losses(job.folder, config, caches, *(job.options[name] for name in ("windows", "rgb_weight", "noise")))
    rows += costs(job.folder, known["peak_memory_mb"])
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
