"""A grid of trainings, run, measured and compared: does what is varied help?

    <output>/grid.yaml                       what is compared; the same file goes on, another one is refused
    <output>/runs/<arm>/lr-<rate>/seed-<n>/  each run, as `train` leaves it, with `outcomes.json`; `predictions.json` at the best rate
    <output>/latents/                        the latents of all runs, each window encoded once
    <output>/results.parquet                 every number that was measured, one a row
    <output>/table.md, comparison.json       what holds the same whenever the grid is run again
    <output>/report.html                     that, with costs, curves, movement and pictures

Every setting is checked before the first run starts. A run is a process of its own: one that fails is named in the end, the others go
on, and the next call repeats it alone. Learning rates are chosen on validation episodes, arms compared on test episodes. Knows no
model, no formula of statistics and no HTML.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import mvwan
from mvwan import pictures
from mvwan.ablation.check import Checked, reference_config
from mvwan.ablation.cluster import Cluster, check_cluster, run_on_cluster
from mvwan.ablation.grid import GRID, Grid, Run
from mvwan.ablation.jobs import Job, run_jobs
from mvwan.ablation.rates import choose
from mvwan.ablation.report import AblationResult, report_html, table_markdown
from mvwan.ablation.statistics import Comparison, Measurement, Outcome, compare
from mvwan.errors import MvwanError
from mvwan.evaluate import load_prediction
from mvwan.files import only_worker, read_json, read_json_lines, sha256_json, whole_file, write_file, write_json
from mvwan.model.latents import codec_digest
from mvwan.processes import Failure, visible_gpus
from mvwan.trainings import as_many_as_fit

TABLE, COMPARISON, REPORT, RESULTS = "table.md", "comparison.json", "report.html", "results.parquet"
OUTCOMES_FILE, PREDICTIONS_FILE = "outcomes.json", "predictions.json"

OUTCOMES: Mapping[str, Outcome] = {
    "velocity_loss": Outcome(primary=True, label="Velocity loss"),
    "heat_loss": Outcome(label="Heatmap velocity loss"),
    "rgb_loss": Outcome(label="RGB velocity loss"),
    "peak_error_px": Outcome(primary=True, unit="px", label="Heatmap peak error"),
    "error_3d_mm": Outcome(primary=True, unit="mm", label="3-D error"),
    "rgb_psnr_db": Outcome(primary=True, better="higher", unit="dB", label="RGB PSNR"),
    "success": Outcome(primary=True, better="higher", label="Closed-loop success"),
    "seconds_per_step": Outcome(unit="s", label="Time per step"),
    "peak_memory_mb": Outcome(unit="MB", label="Peak memory"),
    "checkpoint_mb": Outcome(unit="MB", label="Checkpoint"),
}
SELECT_BY = "velocity_loss"
COSTS = ("seconds_per_step", "peak_memory_mb", "checkpoint_mb")
"""They are those of the machine and of the day, so `table.md` does not have them."""


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """What `run_ablation` left behind."""

    table: str
    """The text of `table.md`."""
    report: Path
    failures: tuple[Failure, ...]


# ── run ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def run_ablation(
    checked: Checked,
    processes: int = 1,
    *,
    cluster: Cluster | None = None,
    cluster_options: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> Ablation:
    """What was compared, after everything that is not finished has run, `processes` runs at a time, here or on a `cluster`.

    Raises `MvwanError` when another ablation is at work in the folder, or when no run at all came to its end; `PreemptedError` after
    SIGTERM, with what is running saved.
    """
    grid, output = checked.grid, checked.output
    console = console or Console(stderr=True, highlight=False)
    run_all: _Runner = partial(run_jobs, gpus=visible_gpus())
    if cluster is not None:
        check_cluster(cluster)
        run_all = partial(run_on_cluster, cluster=cluster, options=cluster_options or {}, folder=output / "submitit")
    with only_worker(output, wait=False):
        if not (output / GRID).is_file():
            write_file(output / GRID, grid.to_yaml())
        _run("encode", _encode_jobs(checked), 1, console, run_all)  # what could not be encoded fails the runs that need it
        trainings = _training_jobs(checked)
        if cluster is None and processes > 1 and not all(job.is_done for job in trainings):
            processes = as_many_as_fit([job.config for job in trainings if not job.is_done], processes, console)
        failures = _run("train and measure", trainings, processes, console, run_all)
        done = {job.folder for job in trainings if job.is_done}
        if not done:
            raise MvwanError(
                f"{output}: no run came to its end, so nothing can be compared. The first, {failures[0].name}: {failures[0].reason}"
            )
        chosen = _best_rates(checked, done)
        predictions = _prediction_jobs(checked, chosen, done)
        failures += _run("predict", predictions, processes, console, run_all)
        return _compare(checked, chosen, done, [job for job in predictions if job.is_done], failures)


_Runner = Callable[[Sequence[Job], int, Callable[[Job, str, Failure | None], None]], list[Failure]]


def _run(title: str, jobs: Sequence[Job], processes: int, console: Console, run_all: _Runner) -> list[Failure]:
    missing = [job for job in jobs if not job.is_done]
    with _Progress(title, len(jobs), len(jobs) - len(missing), console) as progress:
        return run_all(missing, processes, progress.said) if missing else []


def _encode_jobs(checked: Checked) -> list[Job]:
    """One for each set of windows: that of every seed, unless windows are augmented. Its mark lies with the latents and goes with them."""
    jobs: dict[str, Job] = {}
    for run in checked.runs:
        config = run.config
        assert config.data.cache is not None, "a grid names the cache of its runs"
        codec = codec_digest(config.base.codec or config.base.source, config.data.text_tokens)
        key = sha256_json([checked.contents[run.folder], codec, config.data.heatmap_sigma_px])
        folder = Path(config.data.cache) / "encoded" / key[:16]
        jobs.setdefault(
            key,
            Job(
                name=f"windows of seed {run.seed}",
                kind="encode",
                folder=folder,
                product=folder / "encoded.json",
                key=key,
                config=config,
                options={"test_dataset": checked.grid.test_dataset, "seeds": checked.grid.seeds},
            ),
        )
    return list(jobs.values())


def _training_jobs(checked: Checked) -> list[Job]:
    grid, reference = checked.grid, reference_config(checked.grid)
    options = {
        "test_dataset": grid.test_dataset,
        "seeds": grid.seeds,
        "windows": grid.windows,
        "rgb_weight": reference.train.rgb_weight,
        "noise": reference.flow,
        "accept_trainable_change": grid.accept_trainable_change,
    }
    return [
        Job(
            name=run.name,
            kind="train",
            folder=run.folder,
            product=run.folder / OUTCOMES_FILE,
            key=checked.keys[run.folder],
            config=run.config,
            options={**options, "trained_from": checked.trained_from[run.folder]},
        )
        for run in checked.runs
    ]


def _prediction_jobs(checked: Checked, chosen: Mapping[str, float], done: set[Path]) -> list[Job]:
    """Of each arm's best learning rate alone. Controls do not depend on a run: they are tried beside the first one."""
    grid, jobs = checked.grid, list[Job]()
    for run in (run for run in checked.runs if run.folder in done and chosen.get(run.arm) == run.learning_rate):
        options = {
            "test_dataset": grid.test_dataset,
            "seeds": grid.seeds,
            "windows": grid.windows,
            "denoise_steps": grid.denoise_steps,
            "trials": grid.trials,
            "tasks": list(grid.tasks),
            "execute": grid.execute,
            "with_controls": run.arm == grid.reference and run.seed == 0,
        }
        jobs.append(
            Job(
                name=f"{run.name}, predictions",
                kind="predict",
                folder=run.folder,
                product=run.folder / PREDICTIONS_FILE,
                key=sha256_json([checked.keys[run.folder], options]),
                config=run.config,
                options=options,
            )
        )
    return jobs


class _Progress:
    """What is done, running and failed, and when it may be over; a line for each run that ends."""

    def __init__(self, title: str, total: int, done: int, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[failed]} failed"))
        times = (TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
        # Runs take minutes or days: the rate is that of all so far.
        shown = {"console": console, "transient": True, "disable": not console.is_terminal}
        self._bar = Progress(*columns, *times, speed_estimate_period=1e9, **shown)
        self._title, self._failed, self._running = title, 0, list[str]()
        self._line = self._bar.add_task(title, total=total, completed=done, failed=0)
        if done:
            console.print(f"{title}: {done} of {total} finished earlier", soft_wrap=True)

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def said(self, job: Job, event: str, failure: Failure | None) -> None:
        """Nothing; shows it."""
        if event == "started":
            self._running.append(job.name)
        else:
            self._running.remove(job.name)
            self._failed += failure is not None
            self._bar.advance(self._line, 0 if failure else 1)
            told = f"failed: {job.name}: {failure.reason} ({failure.log})" if failure else f"{self._title}: {job.name}"
            self._bar.console.print(told, soft_wrap=True, markup=False)
        shown = f"{self._title}: {'; '.join(self._running)}"
        self._bar.update(self._line, description=shown if len(shown) < 80 else f"{shown[:79]}…", failed=self._failed)


# ── collect and compare ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _best_rates(checked: Checked, done: set[Path]) -> dict[str, float]:
    """Arm -> the learning rate with the lowest validation loss; without arms of which no run is done."""
    finished = [run for run in checked.runs if run.folder in done]
    seeds, best = {run.seed for run in finished}, dict[str, float]()
    for arm in checked.grid.all_arms:
        by_rate = {rate: dict[tuple[int, str], float]() for rate in checked.grid.rates}
        for run in (run for run in finished if run.arm == arm.name):
            for row in _rows_of(run.folder / OUTCOMES_FILE):
                if (row["split"], row["outcome"]) == ("validation", SELECT_BY):
                    by_rate[run.learning_rate][run.seed, row["episode"]] = row["value"]
        found = choose(arm.name, by_rate, seeds, OUTCOMES[SELECT_BY].better).best
        if found is not None:
            best[arm.name] = found
    return best


def _rows_of(path: Path) -> list[dict[str, Any]]:
    return read_json(path)["rows"]


def _compare(
    checked: Checked, chosen: Mapping[str, float], done: set[Path], predicted: Sequence[Job], failures: Sequence[Failure]
) -> Ablation:
    """Writes the results, the table and the report."""
    grid, output = checked.grid, checked.output
    products = [run.folder / OUTCOMES_FILE for run in checked.runs if run.folder in done] + [job.product for job in predicted]
    run_of = {run.folder: run for run in checked.runs}
    measurements = [
        Measurement(arm=run.arm, learning_rate=run.learning_rate, seed=run.seed, **row)
        for path in products
        for run in [run_of[path.parent]]
        for row in _rows_of(path)
    ]
    _write_parquet(output / RESULTS, measurements)
    comparison = comparison_of(grid, measurements)
    at_best = [run for run in checked.runs if run.folder in done and run.learning_rate == chosen.get(run.arm)]
    best = [run for arm in grid.all_arms for run in at_best if run.arm == arm.name]
    result = AblationResult(
        comparison=comparison,
        curves=[line for run in checked.runs if run.folder in done for line in _curve(run)],
        movement=_mean_movement(best),
        failed=[(failure.name, failure.reason) for failure in failures],
        pictures=_pictures(best),
        command=f"mvwan ablate --grid {GRID} --output again",
        grid=grid.to_dict(),
        version=mvwan.__version__,
        controls=_controls(predicted),
        starts=checked.starts,
    )
    table = table_markdown(result)
    write_file(output / TABLE, table)
    write_json(output / COMPARISON, comparison.to_json())
    write_file(output / REPORT, report_html(replace(result, comparison=comparison_of(grid, measurements, with_costs=True))))
    return Ablation(table=table, report=output / REPORT, failures=tuple(failures))


def comparison_of(grid: Grid, measurements: Sequence[Measurement], *, with_costs: bool = False) -> Comparison:
    """The arms of a grid compared by rows of its `results.parquet`; costs, which are those of a day, only where asked for."""
    outcomes = {name: outcome for name, outcome in _outcomes_of(measurements).items() if with_costs or name not in COSTS}
    arms = [arm.name for arm in grid.all_arms]
    return compare(measurements, arms, grid.reference, outcomes, SELECT_BY, swept=grid.rates)


def _outcomes_of(measurements: Iterable[Measurement]) -> dict[str, Outcome]:
    """What was measured, in the order of `OUTCOMES`, each followed by its parts (`name@part`)."""
    names = dict.fromkeys(row.outcome for row in measurements)
    return {
        name: known if name == whole else replace(known, primary=False, label=f"{known.label} ({name.partition('@')[2]})")
        for whole, known in OUTCOMES.items()
        for name in (whole, *sorted(name for name in names if name.startswith(f"{whole}@")))
        if name in names
    }


def _write_parquet(path: Path, measurements: Sequence[Measurement]) -> None:
    with whole_file(path) as partial:
        pq.write_table(pa.Table.from_pylist([asdict(row) for row in measurements]), partial)


def _curve(run: Run) -> list[dict[str, Any]]:
    """Held-out losses while the run trained, at the steps of `train.evaluate_every`."""
    of_run = {"arm": run.arm, "learning_rate": run.learning_rate, "seed": run.seed}
    lines = (line for line in read_json_lines(run.folder / "metrics.jsonl") if line["kind"] == "held_out")
    return [of_run | {name: line[name] for name in ("step", "heat_loss", "rgb_loss")} for line in lines]


def _mean_movement(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """How far each group of each block went at the arm's best rate, the mean over seeds."""
    found: dict[tuple[str, str, int | None], list[float]] = {}
    for run in runs:
        for row in read_json(run.folder / OUTCOMES_FILE)["movement"]:
            found.setdefault((run.arm, row["group"], row["block"]), []).append(row["relative_movement"])
    return [
        {"arm": arm, "group": group, "block": block, "relative_movement": fmean(values)} for (arm, group, block), values in found.items()
    ]


def _pictures(runs: Iterable[Run]) -> list[tuple[str, bytes]]:
    """(title, WebP) of one test window: the truth, then what every arm predicts with the first seed that has one, RGB and heatmap."""
    stored: dict[str, dict[str, Any]] = {}
    seed = None
    for run in runs:
        if run.seed == (run.seed if seed is None else seed) and (run.folder / "prediction.npz").is_file():
            seed, stored[run.arm] = run.seed, load_prediction(run.folder / "prediction.npz")
    if not stored:
        return []
    first = next(iter(stored.values()))
    columns = list(pictures.columns_shown(first["true_rgb"].shape[1]))
    of_all = {"truth": (first["true_rgb"], first["true_heat"])} | {
        arm: (each["predicted_rgb"], each["predicted_heat"]) for arm, each in stored.items()
    }
    window, names = str(first["sample_id"]), "; ".join(of_all)
    return [
        (
            f"{window}, camera {camera}, {stream}; rows from the top: {names}",
            pictures.webp(pictures.grid(np.stack([videos[place][view][columns] for videos in of_all.values()]))),
        )
        for view, camera in enumerate(first["views"])
        for place, stream in enumerate(("RGB", "heatmap"))
    ]


def _controls(predicted: Iterable[Job]) -> dict[str, Any]:
    """Policy -> its success rate, of those that do not depend on a run: what a success rate is worth."""
    rates = {policy: rate for job in predicted for policy, rate in read_json(job.product)["success_rates"].items()}
    return {policy: rate for policy, rate in rates.items() if policy != "predicted"}
