"""The verb `mvwan plan`: parses, calls one function, prints what it returns. Everything heavy is imported inside."""

import os
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from mvwan.cli_settings import AsJson, ConfigFile, Preset, Settings, console, note, resolve_config
from mvwan.devices import COMMON, DEFAULT_EFFICIENCY, DEVICES, read_machine
from mvwan.files import json_text

if TYPE_CHECKING:
    from mvwan.plan import MachinePlan, Plan, Trial

_GB, _MB = 1e9, 1e6
_COLUMNS = ("", "strategy", "recompute", "frozen", "trained", "grads", "moments", "kept", "passing", "sum", "spare", "s/step", "hours")
_LEGEND = "GB per GPU at the peak of a step. kept: activations; passing: what comes and goes; spare: left beside CUDA; >: advised"


def plan(
    preset_name: Preset = "wan2.2-ti2v-5b",
    config_file: ConfigFile = None,
    settings: Settings = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            "--device",
            help=f"GPU, or several as '8 x h100-80gb'; repeatable. Known: {', '.join(DEVICES)}; or your own: mygpu:48GB:200TFLOPS. Not "
            "given: some common ones, or with --measure none.",
            show_default=False,
        ),
    ] = None,
    efficiency: Annotated[
        float, typer.Option("--efficiency", help="Share of its stated rate that a device is assumed to sustain; not measured.")
    ] = DEFAULT_EFFICIENCY,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also run steps on this machine's processor, and show them beside their prediction.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Before a machine is rented: memory per GPU, seconds per step, hours in all, bytes on the disk; what fits, and how to launch it."""
    config, said = resolve_config(preset_name, config_file, settings, None, os.environ)
    note(said)
    machines = [read_machine(words) for words in device or ([] if measure else COMMON)]
    given = ["--preset", preset_name]
    given += ["--config", str(config_file)] if config_file else []
    for setting in settings or []:
        given += ["--set", setting]
    typer.echo("counting a step of the real network on tensors without numbers: a minute for the 5B", err=True)
    from mvwan.plan import make_plan

    made = make_plan(config, machines, given, efficiency, measure)
    if as_json:
        typer.echo(json_text(made.to_json()), nl=False)
        return
    for found in made.machines:
        _show_machine(made, found)
    if made.machines:
        typer.echo(f"{_LEGEND}\n")
    if made.trial is not None:
        _show_trial(made.trial, efficiency)
    for line in _disk(made):
        typer.echo(line)
    typer.echo("\nAssumed:")
    for sentence in made.assumptions():
        typer.echo(f"- {sentence}")


def _show_machine(made: "Plan", found: "MachinePlan") -> None:
    device, train = found.machine.device, made.config.train
    windows = train.batch_size * train.gradient_accumulation * found.machine.count
    table = Table(
        title=f"{found.machine.name}: {device.memory_gb:g} GB, {device.tflops:g} TFLOP/s each; {train.steps:,} steps of {windows} windows",
        title_justify="left",
        box=None,  # its lines would take the width that the columns need
    )
    for header in _COLUMNS:
        table.add_column(header, justify="left" if header in _COLUMNS[:3] else "right", no_wrap=True)
    for option in found.options:
        sizes = [f"{size / _GB:.2f}" for size in vars(option.memory).values()]
        table.add_row(
            ">" if option is found.advised else "",
            option.strategy + ("" if option.quantize == "none" else f", {option.quantize} base"),
            "yes" if option.gradient_checkpointing else "no",
            *sizes,
            f"{option.memory.total / _GB:.1f}",
            f"{option.spare_gb:.1f}" if option.fits else f"no, {option.spare_gb:.1f}",
            _amount(option.step_s),
            _amount(option.step_s * train.steps / 3600),
            style=None if option.fits else "dim",
        )
    console().print(table)
    typer.echo(f"{found.advised.command if found.advised else found.remedy}\n")


def _show_trial(trial: "Trial", efficiency: float) -> None:
    measured = trial.measured
    table = Table(title=f"This machine's processor, {measured.threads} threads", title_justify="left")
    for header in ("", "predicted", "measured", "predicted / measured"):
        table.add_column(header, justify="right" if header else "left", no_wrap=True)
    peak, seconds = trial.memory.total, trial.step_s
    table.add_row("peak MB", f"{peak / _MB:.0f}", f"{measured.peak_bytes / _MB:.0f}", f"{peak / measured.peak_bytes:.2f}")
    table.add_row("s/step", f"{seconds:.2f}", f"{measured.step_s:.2f}", f"{seconds / measured.step_s:.2f}")
    console().print(table)
    typer.echo(
        "Peak: of tensors alive, beside what the process grew by from an empty module on, with dropped memory given back at once. Seconds: "
        f"a product of two large matrices ran at {measured.product_flop_per_s / _GB:.1f} GFLOP/s here (measured), of which efficiency "
        f"{efficiency:g} is assumed; the steps came to {trial.efficiency:.2f}.\n"
    )


def _disk(made: "Plan") -> list[str]:
    kept = f"at most {made.num_checkpoints} at a time" if made.num_checkpoints else "all are kept"
    return [
        f"checkpoint: {_size(made.checkpoint_bytes)}, {kept}",
        f"latent cache: {_size(made.window_bytes)} per window, {_size(made.instruction_bytes)} per instruction",
    ]


def _amount(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def _size(count: int) -> str:
    return f"{count / _GB:.2f} GB" if count >= _GB else f"{count / _MB:.2f} MB"
