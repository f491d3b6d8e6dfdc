"""The verb `mvwan reproduce`: parses, calls one function. Everything heavy is imported inside; `cli` explains a user's mistake."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mvwan.cli_settings import Settings


class Table(StrEnum):
    """Tables of results."""

    metaworld7 = "metaworld7"
    metaworld7_wide = "metaworld7-wide"


class Arms(StrEnum):
    """Runs with the switch off, on, or one of each."""

    off = "off"
    on = "on"
    both = "both"


def reproduce(
    table: Annotated[
        Table,
        typer.Argument(help="metaworld7: beside published numbers. metaworld7-wide: layouts on which replay mostly fails, and a baseline."),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder; finished stages in it are not repeated. Not given: runs/TABLE.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=2, help="Optimizer steps of each run.")] = 2000,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Closed-loop trials per task, run and control.")] = 25,
    demonstrations: Annotated[
        list[int] | None,
        typer.Option(
            "--demonstrations", min=1, help="Per task; repeatable, each a model of its own. Not given: the table's.", show_default=False
        ),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", help="Only this task; repeatable. Not given: the table's seven.", show_default=False)
    ] = None,
    switch: Annotated[Arms, typer.Option("--switch", help="Train with unfreeze_modulation_and_norms off, on, or both.")] = Arms.both,
    settings: Settings = None,
    start_from: Annotated[
        Path | None,
        typer.Option(
            "--start-from",
            help="Folder of another reproduction: each run goes on from its run of the same demonstrations and switch.",
            show_default=False,
        ),
    ] = None,
    execute: Annotated[int, typer.Option("--execute", min=1, help="Waypoints to follow before a run looks again.")] = 8,
    denoise_steps: Annotated[int, typer.Option("--denoise-steps", min=1, help="Euler steps from noise to video.")] = 5,
    test_demonstrations: Annotated[
        int,
        typer.Option("--test-demonstrations", min=0, help="Per task, from layouts of their own, to measure predicted paths on; 0: none."),
    ] = 3,
    control_steps: Annotated[
        int, typer.Option("--control-steps", min=1, help="After which a trial is given up; Meta-World's own limit is 500.")
    ] = 500,
    videos: Annotated[int, typer.Option("--videos", min=0, help="Filmed trials per task, run and control.")] = 1,
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything random, and the first layout that is recorded.")] = 0,
    processes: Annotated[int, typer.Option("--processes", min=1, help="Trainings, then trials, at a time; one training per GPU.")] = 2,
    baseline: Annotated[Path, typer.Option("--baseline", help="Script of the baseline, for metaworld7-wide.")] = Path(
        "benchmarks/conv_baseline.py"
    ),
    baseline_steps: Annotated[int, typer.Option("--baseline-steps", min=1, help="Updates of the baseline.")] = 1500,
    tuning: Annotated[
        bool, typer.Option("--tuning", help="Use layouts for tuning (from 800000), not those kept for the final measurement.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove what an earlier reproduction left in the folder first.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print settings and stages; do nothing.")] = False,
) -> None:
    """Record several tasks, train one model for all, try it in closed loop beside its controls, write results.md: hours on two cores."""
    from mvwan.reproduce import describe, run_reproduction
    from mvwan.suites import Reproduction

    wanted = Reproduction(
        suite=table.value,
        output=output or Path("runs") / table.value,
        tasks=task,
        demonstrations=demonstrations,
        switches=("off", "on") if switch == "both" else ("off",) if switch == "off" else ("on",),
        steps=steps,
        trials=trials,
        execute=execute,
        denoise_steps=denoise_steps,
        test_demonstrations=test_demonstrations,
        control_steps=control_steps,
        videos=videos,
        seed=seed,
        tuning=tuning,
        processes=processes,
        baseline=baseline,
        baseline_steps=baseline_steps,
        overrides=settings or (),
        start_from=start_from,
    )
    if dry_run:
        typer.echo(describe(wanted))
    else:
        run_reproduction(wanted, fresh=fresh)
