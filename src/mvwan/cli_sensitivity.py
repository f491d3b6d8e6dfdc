"""The verb `mvwan sensitivity`: parses, calls one function, prints what it returns. Everything heavy is imported inside."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from mvwan.cli_settings import AsJson, ConfigFile, Preset, Settings, console, note, parse_rates, resolve_config
from mvwan.files import json_text, write_file

if TYPE_CHECKING:
    from mvwan.sensitivity import Plan


def sensitivity(
    output: Annotated[Path, typer.Option("--output", help="Folder to write to; measurements in it are not repeated.", show_default=False)],
    preset_name: Preset = "tiny-finetune",
    config_file: ConfigFile = None,
    settings: Settings = None,
    batches: Annotated[int, typer.Option("--batches", help="Batches whose gradients are squared, window by window.")] = 8,
    probe_steps: Annotated[int, typer.Option("--probe-steps", help="Steps of the short training of each group.")] = 30,
    learning_rates: Annotated[
        str, typer.Option("--learning-rates", help="Learning rates of each probe, with commas; the best counts.")
    ] = "3e-4,3e-3",
    budget: Annotated[
        int | None,
        typer.Option("--budget", help="Parameters that may train. Not given: as many as the settings train.", show_default=False),
    ] = None,
    budget_mb: Annotated[
        float | None,
        typer.Option(
            "--budget-mb",
            help="The same in MB of memory: value, gradient and AdamW's two moments per parameter, 16 bytes; with adafactor 8.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print groups, counts and steps; measure nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Before a training: which parameter groups, and which of their blocks, are worth training; and a list of groups for a budget."""
    config, said = resolve_config(preset_name, config_file, settings, None, os.environ)
    note(said)
    rates = parse_rates(learning_rates)
    from mvwan.sensitivity import analyse, make_plan
    from mvwan.sensitivity_probes import Options

    options = Options(batches=batches, probe_steps=probe_steps, learning_rates=rates, budget=budget, budget_mb=budget_mb)
    if dry_run:
        plan = make_plan(config, options)
        if as_json:
            typer.echo(json_text(plan.to_json()), nl=False)
        else:
            _show(plan, options.probe_steps)
        return
    result = analyse(config, output, options)
    from mvwan.sensitivity_report import markdown, rendered, write_page

    write_file(output / "table.md", markdown(result))
    write_page(result, output / "sensitivity.html")
    if as_json:
        typer.echo(json_text(result), nl=False)
        return
    console().print(rendered(result))
    typer.echo(output / "sensitivity.html")
    if result["suggestion"]["groups"]:
        words = ["mvwan", "train", "--config", str(output / "suggestion.yaml"), "--output", "RUN", "--no-unfreeze_modulation_and_norms"]
        typer.echo(shlex.join([*words, "--accept-trainable-change"] if result["suggestion"]["needs_acceptance"] else words))


def _show(plan: "Plan", probe_steps: int) -> None:
    lower = f"also at rank {plan.lower_rank}" if plan.lower_rank else ""
    table = Table(title="Candidates", title_justify="left")
    for head in ("group", "mode", "parameters", "tensors", ""):
        table.add_column(head, justify="right" if head in ("parameters", "tensors") else "left", no_wrap=True)
    for one in plan.candidates:
        table.add_row(one.name, one.mode, f"{one.parameters:,}", f"{len(one.names):,}", one.obstacle or (lower if one.lora_flag else ""))
    console().print(table)
    typer.echo(f"budget: {plan.budget.parameters:,} parameters ({plan.budget.given})")
    typer.echo(
        f"at most {plan.probes} probes of {probe_steps} steps: {plan.steps:,} steps; and the gradients of {plan.gradients:,} single windows"
    )
