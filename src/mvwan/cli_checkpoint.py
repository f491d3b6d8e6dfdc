"""The verbs of `mvwan checkpoint`: each parses, calls one function and prints what it returns.

Knows no tensor. Everything heavy is imported inside the verb that needs it; `cli` turns a user's mistake into one sentence.
"""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from mvwan.cli_settings import AsJson, console
from mvwan.files import json_text

checkpoints = typer.Typer(help="Look into checkpoints, check, compare and export them.", no_args_is_help=True, rich_markup_mode=None)

_WHAT = "Run, checkpoint folder or .safetensors file."
Checkpoint = Annotated[Path, typer.Argument(metavar="PATH", help=_WHAT, show_default=False)]


class Form(StrEnum):
    """What `export` writes."""

    mvwan = "mvwan"
    wan_native = "wan-native"
    diffusers_lora = "diffusers-lora"
    merged = "merged"
    multiview = "multiview"


class Dtype(StrEnum):
    """Types of merged weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@checkpoints.command(epilog="Example: mvwan checkpoint inspect runs/first")
def inspect(path: Checkpoint, as_json: AsJson = False) -> None:
    """What a checkpoint holds, after checking every digest."""
    from mvwan.checkpoint import find_checkpoint, load_trained

    found = find_checkpoint(path)
    tensors, manifest = load_trained(found)
    if as_json:
        typer.echo(json_text({"path": str(found), "manifest": manifest}), nl=False)
        return
    console().print(_manifest_table(manifest, len(tensors)))
    typer.echo(
        f"{found}: {len(tensors)} tensors, all digests match"
        if manifest["groups"]
        else f"{found}: {len(tensors)} tensors, no digests to check"
    )


def _manifest_table(manifest: Mapping[str, Any], num_tensors: int) -> Table:
    """What is in a checkpoint, group by group; one line for a file of the older system, which names no groups."""
    base, lora = manifest["base"]["id"] or "unknown (older format)", manifest["lora"]["rank"]
    switch = "on" if manifest["unfreeze_modulation_and_norms"] else "off"
    step, views = manifest["step"] or "unknown", manifest["views"] or "?"
    title = f"step {step}, base {base}, {views} views, fusion {manifest['fusion']}, LoRA rank {lora}, switch {switch}"
    table = Table(title=title, title_justify="left")
    for column in ("group", "mode", "parameters", "tensors", "dtype"):
        table.add_column(column, justify="right" if column in ("parameters", "tensors") else "left")
    for name, group in manifest["groups"].items():
        table.add_row(name, group["mode"], f"{group['parameters']:,}", f"{group['tensors']:,}", group["dtype"])
    if not manifest["groups"]:
        table.add_row("all", "", "", f"{num_tensors:,}", "")
    return table


@checkpoints.command(epilog="Example: mvwan checkpoint verify runs/first --against wan2.2-ti2v-5b")
def verify(
    path: Checkpoint,
    against: Annotated[
        str | None, typer.Option("--against", help="Also show how far each group is from this base.", show_default=False)
    ] = None,
) -> None:
    """Check every digest, name and number of a checkpoint; exit code 2 when anything is not as it was saved."""
    from mvwan.checkpoint_compare import distance_table, distances, verify_checkpoint

    found, sentence = verify_checkpoint(path)
    if against is not None:
        console().print(distance_table(distances(found, against), against))
    typer.echo(f"{found}: {sentence}")


@checkpoints.command(epilog="Example: mvwan checkpoint diff runs/off runs/on")
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help=_WHAT, show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help=_WHAT, show_default=False)],
    as_json: AsJson = False,
) -> None:
    """What differs between two checkpoints, group by group."""
    from mvwan.checkpoint_compare import diff_checkpoints

    found = diff_checkpoints(a, b)
    if as_json:
        typer.echo(json_text(found.to_json()), nl=False)
        return
    for table in found.render():
        console().print(table)
    typer.echo("same tensors to the bit" if found.same else "the tensors differ")


@checkpoints.command(epilog="Example: mvwan checkpoint export runs/first --format wan-native --output first.safetensors")
def export(
    path: Checkpoint,
    form: Annotated[
        Form,
        typer.Option(
            "--format",
            help="mvwan: a checkpoint without optimizer state, to pass on. wan-native: one file of the older system. "
            "diffusers-lora: LoRA for stock diffusers, the rest beside it. "
            "merged: a stock transformer equal to the RGB half. multiview: the whole model as a diffusers folder.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="File or folder to write; must not exist yet.", show_default=False)],
    base: Annotated[
        str | None,
        typer.Option("--base", help="merged, multiview: the base; not given: the one the checkpoint names.", show_default=False),
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="The moving average in place of the trained tensors.")] = False,
    dtype: Annotated[
        Dtype | None,
        typer.Option("--dtype", help="merged, multiview: type of merged weights; not given: float32.", show_default=False),
    ] = None,
    rgb_only: Annotated[bool, typer.Option("--rgb-only", help="merged: leave out what only the heatmap and view attention need.")] = False,
) -> None:
    """Write a checkpoint in a form that others read."""
    from mvwan.checkpoint_export import export_checkpoint

    written = export_checkpoint(
        path, output, form.value, base=base, ema=ema, dtype=None if dtype is None else dtype.value, rgb_only=rgb_only
    )
    typer.echo(written.path)
    for note in written.notes:
        typer.echo(f"  {note}")
