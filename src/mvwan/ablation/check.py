"""A grid before it runs: what every arm would train, which windows and episodes it would see, and a key of all that outcomes depend on.

Every run is checked as `mvwan train --dry-run` would check it. Writes nothing and runs nothing.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import mvwan
from mvwan.ablation.grid import GRID, Grid, Run, differences, read_grid
from mvwan.ablation.jobs import check_started
from mvwan.ablation.outcomes import measured_windows
from mvwan.checkpoint import checkpoint_digest
from mvwan.closed_loop import TrialSettings
from mvwan.compatibility import Compatibility
from mvwan.config import Config
from mvwan.errors import MvwanError
from mvwan.files import LOCK, sha256_json
from mvwan.model.latents import codec_digest
from mvwan.model.trainable_table import TrainableTable
from mvwan.model.wan import base_digest
from mvwan.sim.tasks import task_name
from mvwan.train_check import check_groups, check_start, check_windows

_FORMAT = 2
"""Raised when the code measures otherwise, so that earlier outcomes are not taken for new ones."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A grid of which every run could start."""

    grid: Grid
    output: Path
    runs: tuple[Run, ...]
    tables: Mapping[str, TrainableTable]
    """Arm -> what trains."""
    starts: Mapping[str, str]
    """Arm -> which checkpoint it starts from and what the compatibility rules say; without arms that start from the base."""
    windows: Mapping[int, Mapping[str, int]]
    """Seed -> numbers of windows: `train`, `validation` and `test`, the latter two before `grid.windows` limits them."""
    episodes: Mapping[int, Mapping[str, tuple[str, ...]]]
    """Seed -> split -> names of the episodes that are measured."""
    trained_from: Mapping[Path, str]
    """Folder of a run -> digest of all that its training starts from and reads."""
    keys: Mapping[Path, str]
    """Folder of a run -> digest of all that its outcomes depend on."""
    contents: Mapping[Path, str]
    """Folder of a run -> digest of the windows that it reads, whatever they are for."""

    def describe(self) -> str:
        """What would be run, as lines of text."""
        grid, first = self.grid, self.windows[0]
        rates = ", ".join(f"{rate:g}" for rate in grid.rates)
        lines = [f"{len(self.runs)} runs: {len(grid.all_arms)} arms x {len(grid.rates)} learning rates ({rates}) x {grid.seeds} seeds"]
        for arm in grid.all_arms:
            table = self.tables[arm.name]
            groups = ", ".join(f"{row.name} {row.parameters:,}" for row in table.trainable_rows)
            said = " (reference)" if arm.name == grid.reference else ""
            start = f"; {self.starts[arm.name]}" if arm.name in self.starts else ""
            lines.append(f"  {arm.name}{said}: {table.trainable_parameters:,} parameters trained: {groups}{start}")
        lines.append(", ".join(f"{count} {split} windows" for split, count in first.items()) + " (seed 0)")
        for split in ("validation", "test"):
            lines.append(f"  {split}: {len(self.episodes[0][split])} episodes, at most {grid.windows} windows measured per run")
        if grid.seeds > 1 and grid.test_dataset is None:
            lines.append("  each seed holds out episodes of its own; --test-dataset gives all seeds the same ones, which shows more")
        if grid.trials:
            lines.append(f"closed loop: {grid.trials} trials per task of each arm's best learning rate and every seed, on tuning layouts")
        return "\n".join(lines)


def _in_words(grid: Grid, starts: Mapping[tuple[str, str | None], Compatibility | None]) -> dict[str, str]:
    found: dict[str, str] = {}
    for arm in grid.all_arms:
        said = dict.fromkeys("; ".join((fit.outcome, *fit.describe())) for (name, _), fit in starts.items() if name == arm.name and fit)
        if said:
            found[arm.name] = f"from {grid.start(arm)}: {' or '.join(said)}"
    return found


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What runs of the same data settings and seed read."""

    digest: str
    trained: str
    """Digest of what a training reads."""
    contents: str
    windows: Mapping[str, int]
    episodes: Mapping[str, tuple[str, ...]]


def check_grid(grid: Grid, output: Path) -> Checked:
    """The grid with what its runs would train and read. Raises the `MvwanError` of the first run that could not start; writes nothing."""
    _check_place(output, grid)
    runs, tables, starts = grid.runs(output), dict[str, TrainableTable](), dict[tuple[str, str | None], Compatibility | None]()
    seen: dict[str, _Seen] = {}
    of_run: dict[Path, _Seen] = {}
    for run in runs:
        config = run.config
        try:
            if run.arm not in tables:
                tables[run.arm] = check_groups(config)
                if grid.trials:
                    TrialSettings(execute=grid.execute, denoise_steps=grid.denoise_steps).check(config)
            if (start := (run.arm, config.train.from_checkpoint)) not in starts:
                starts[start] = check_start(config, accept_trainable_change=grid.accept_trainable_change)
            # What is read of the data depends on these settings alone.
            same = sha256_json([config.to_dict()["data"], run.seed, config.model.views, config.model.action_head, config.model.view_code])
            if same not in seen:
                seen[same] = _look_at(config, grid)
        except MvwanError as error:
            raise MvwanError(f"{run.name}: {error}") from None
        of_run[run.folder] = seen[same]
    for task in grid.tasks:
        task_name(task)
    starts_of = {run.folder: _start_of(run, of_run[run.folder].trained) for run in runs}
    for run in runs:
        check_started(run.folder, starts_of[run.folder])
    return Checked(
        grid=grid,
        output=output,
        runs=tuple(runs),
        tables=tables,
        starts=_in_words(grid, starts),
        windows={run.seed: of_run[run.folder].windows for run in runs},
        episodes={run.seed: of_run[run.folder].episodes for run in runs},
        trained_from=starts_of,
        keys={run.folder: _key_of(starts_of[run.folder], grid, of_run[run.folder].digest) for run in runs},
        contents={folder: found.contents for folder, found in of_run.items()},
    )


def _look_at(config: Config, grid: Grid) -> _Seen:
    found, measured = check_windows(config), measured_windows(config, grid.test_dataset, grid.seeds)
    every = [found.training, found.validation, *measured.values()]
    rows = sorted({row.tobytes().hex() for each in every for row in each.sample_fingerprints})
    return _Seen(
        digest=sha256_json([each.fingerprint for each in every]),
        trained=sha256_json([found.training.fingerprint, found.validation.fingerprint]),
        contents=sha256_json(rows),
        windows={"train": len(found.training), **{split: len(each) for split, each in measured.items()}},
        episodes={split: tuple(one.name for one in each.windows.used_episodes()) for split, each in measured.items()},
    )


def _start_of(run: Run, fingerprint: str) -> str:
    config, base = run.config.to_dict(), run.config.base
    del config["data"]["root"], config["data"]["cache"]  # of the data it is the content that counts, not where it lies
    start = checkpoint_digest(run.config.train.from_checkpoint)
    stock = base_digest(base.source, base.random_weights, run.seed), codec_digest(base.codec or base.source, run.config.data.text_tokens)
    return sha256_json([config, stock, start, fingerprint])


def _key_of(start: str, grid: Grid, fingerprint: str) -> str:
    reference = reference_config(grid)
    measured = [grid.windows, reference.train.rgb_weight, asdict(reference.flow), grid.accept_trainable_change]
    return sha256_json([_FORMAT, mvwan.__version__, start, fingerprint, measured])


def reference_config(grid: Grid) -> Config:
    """The settings of the reference: its share of RGB and its noise are those that all arms are measured with."""
    return grid.config(grid.all_arms[0], grid.rates[0], 0)


def _check_place(output: Path, grid: Grid) -> None:
    """Nothing, or `MvwanError` when the folder holds something else, or another grid."""
    if output.exists() and not output.is_dir():
        raise MvwanError(f"--output {output}: a file, not a folder. Choose another --output.")
    if (output / GRID).is_file():
        if changed := differences(read_grid(output / GRID), grid):
            raise MvwanError(
                f"{output}: holds another grid; {'; '.join(changed)}. A comparison that grows until it shows something shows nothing: "
                "choose another --output, or go on with the same settings."
            )
    elif output.is_dir() and any(path.name != LOCK for path in output.iterdir()):
        raise MvwanError(f"--output {output}: holds something that is no ablation of mvwan. Choose another --output.")
