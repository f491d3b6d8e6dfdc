"""The verbs of `mvwan data`: each parses, calls one function and prints what it returns.

Everything heavy is imported inside the verb that needs it; `cli` turns a user's mistake into one sentence.
"""

from pathlib import Path
from typing import Annotated

import typer

from mvwan.cli_checkpoint import AsJson, console
from mvwan.config import parse_overrides
from mvwan.files import json_text, write_file
from mvwan.presets import PRESETS, config_from_preset

datasets = typer.Typer(help="Look at datasets before training on them.", no_args_is_help=True, rich_markup_mode=None)


@datasets.command(epilog="Example: mvwan data inspect data/drawer --sheet sheet.png")
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a dataset: LeRobot v3, trail or MVTrack.", show_default=False)],
    sheet: Annotated[
        Path | None, typer.Option("--sheet", help="PNG to write: windows with their heatmaps over the pictures.", show_default=False)
    ] = None,
    preset_name: Annotated[str, typer.Option("--preset", help=f"Settings of windows and pictures: {', '.join(PRESETS)}.")] = "tiny",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="One setting laid over the preset, e.g. data.num_frames=5; repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What is there, what is missing, and how many windows a training would have."""
    from mvwan import pictures
    from mvwan.data_report import contact_sheet, inspect

    config = config_from_preset(preset_name, parse_overrides(settings or []), {"data": {"root": str(folder)}}, where="settings")
    report, splits = inspect(config)
    if sheet is not None:
        write_file(sheet, pictures.png(contact_sheet(splits)))
    if as_json:
        typer.echo(json_text(report.to_json()), nl=False)
        return
    console().print(report.render())
    for line in [*report.lines(), *([f"sheet: {sheet}"] if sheet else [])]:
        typer.echo(line)


@datasets.command(epilog="Example: mvwan data convert data/trails data/lerobot --set data.trail.size_px=128")
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of a dataset in any format that is read.", show_default=False)],
    output: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write to; must not exist yet.", show_default=False)],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="data.cameras, data.trail.*; repeatable.", show_default=False),
    ] = None,
) -> None:
    """Write a dataset as LeRobot v3 with calibration."""
    from mvwan.data.convert import convert

    config = config_from_preset("tiny", parse_overrides(settings or []), where="settings")
    done = convert(source, output, config.data)
    typer.echo(f"{output}: {done.episodes} episodes, {done.frames} frames in the views {', '.join(done.views)}, from {done.source_format}")
