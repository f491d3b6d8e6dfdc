"""The verb `mvwan ablate`: parses, calls one function. Everything heavy is imported inside; `cli` explains a user's mistake."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from mvwan.cli_settings import ConfigFile, Settings, parse_rates
from mvwan.config import merge, parse_overrides, read_yaml
from mvwan.errors import MvwanError
from mvwan.presets import PRESETS


class Cluster(StrEnum):
    """Where runs go that this machine does not run itself."""

    slurm = "slurm"
    local = "local"


def ablate(
    output: Annotated[Path, typer.Option("--output", help="Folder; what is finished in it is not run again.", show_default=False)],
    grid_file: Annotated[
        Path | None,
        typer.Option(
            "--grid",
            help="YAML file of the whole grid, as every ablation writes one, in place of the options that describe one. It may also name "
            "arms of their own: `arms: {modulation only: {trainable: {groups: {lora: {mode: frozen}, ...}}}}`.",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help=f"Named settings: {', '.join(PRESETS)}. Not given: tiny-finetune.", show_default=False)
    ] = None,
    config_file: ConfigFile = None,
    settings: Settings = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            "--vary",
            metavar="FIELD=VALUE,VALUE",
            help="A factor: any setting and its values, a YAML list without its brackets, e.g. trainable.lora.ffn=true,false or "
            "'trainable.groups={},{modulation: {mode: full}}'; null is a value too. Repeatable: every combination is an arm, that of the "
            "first values the reference.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="Runs per arm and learning rate. Not given: 3.", show_default=False)
    ] = None,
    learning_rates: Annotated[
        str | None,
        typer.Option(
            "--learning-rates",
            metavar="RATE,RATE",
            help="Tried with every arm; the best on validation episodes is compared. Not given: that of the settings alone.",
            show_default=False,
        ),
    ] = None,
    test_dataset: Annotated[
        Path | None,
        typer.Option(
            "--test-dataset",
            help="Further demonstrations to compare arms on, the same for every seed. Not given: half of the held-out episodes.",
            show_default=False,
        ),
    ] = None,
    windows: Annotated[
        int | None, typer.Option("--windows", min=1, help="Windows measured per split, at most. Not given: 32.", show_default=False)
    ] = None,
    denoise_steps: Annotated[
        int | None,
        typer.Option("--denoise-steps", min=1, help="Euler steps from noise to video. Not given: 5.", show_default=False),
    ] = None,
    trials: Annotated[
        int | None, typer.Option("--trials", min=0, help="Closed-loop trials per task and run. Not given: none.", show_default=False)
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help="Task of the trials; repeatable. Not given: those of the demonstrations.", show_default=False),
    ] = None,
    execute: Annotated[
        int | None, typer.Option("--execute", min=1, help="Waypoints before a trial looks again. Not given: 8.", show_default=False)
    ] = None,
    accept_trainable_change: Annotated[
        bool | None,
        typer.Option(
            "--accept-trainable-change",
            help="Arms may train groups that the checkpoint they start from was trained without.",
            show_default=False,
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes",
            min=1,
            help="Runs at the same time, as far as memory holds them; they divide the machine's threads and GPUs. Not given: 1, on "
            "Slurm all.",
            show_default=False,
        ),
    ] = None,
    cluster: Annotated[
        Cluster | None,
        typer.Option(
            "--cluster",
            help="Where runs go instead of processes of this machine: Slurm by submitit, or submitit's local processes, to try it out.",
            show_default=False,
        ),
    ] = None,
    cluster_option: Annotated[
        list[str] | None,
        typer.Option(
            "--cluster-option",
            metavar="NAME=VALUE",
            help="Of submitit, e.g. timeout_min=600, slurm_partition=gpu, gpus_per_node=1; repeatable.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every run; print how many there are and what each arm trains.")] = False,
) -> None:
    """Does it help? Trains every arm at every learning rate and seed, in pairs, and compares them with intervals and verdicts."""
    if cluster_option and cluster is None:
        raise MvwanError("--cluster-option belongs to --cluster: give that as well")
    from mvwan.ablate import run_ablation
    from mvwan.ablation.check import check_grid
    from mvwan.ablation.grid import grid_from_dict, parse_factors, read_grid

    given: dict[str, Any] = {
        "preset": preset,
        "settings": merge(read_yaml(config_file) if config_file else {}, parse_overrides(settings or [])) or None,
        "vary": parse_factors(vary) if vary else None,
        "seeds": seeds,
        "learning_rates": None if learning_rates is None else parse_rates(learning_rates),
        "test_dataset": None if test_dataset is None else str(test_dataset),
        "windows": windows,
        "denoise_steps": denoise_steps,
        "trials": trials,
        "tasks": tuple(task) if task else None,
        "execute": execute,
        "accept_trainable_change": accept_trainable_change,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if grid_file is not None and given:
        raise MvwanError(f"--grid {grid_file} says it all: leave {', '.join(given)} out, or write it into the file")
    checked = check_grid(read_grid(grid_file) if grid_file else grid_from_dict(given, "ablate"), output)
    typer.echo(checked.describe())
    if dry_run:
        return
    options = parse_overrides(cluster_option or [], "--cluster-option")
    processes = processes or (len(checked.runs) if cluster == "slurm" else 1)
    made = run_ablation(checked, processes, cluster=None if cluster is None else cluster.value, cluster_options=options)
    typer.echo(f"\n{made.table}\nreport: {made.report}")
    for failure in made.failures:
        typer.echo(f"failed: {failure.name}: {failure.reason}; see {failure.log}", err=True)
    if made.failures:
        typer.echo("the same command repeats what failed, and nothing else", err=True)
        raise typer.Exit(1)
