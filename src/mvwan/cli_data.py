"""The verbs of `mvwan data`: each parses, calls one function and prints what it returns.

Everything heavy is imported inside the verb that needs it; `cli` turns a user's mistake into one sentence.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mvwan.cli_settings import AsJson, Preset, Settings, console
from mvwan.config import Config, parse_overrides
from mvwan.errors import MvwanError, nearest, some
from mvwan.files import json_text, write_file
from mvwan.presets import config_from_preset

datasets = typer.Typer(help="Look at datasets before training on them.", no_args_is_help=True, rich_markup_mode=None)


@datasets.command(epilog="Example: mvwan data inspect data/drawer --sheet sheet.png")
def inspect(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of a dataset: LeRobot v3, trail, RLBench or MVTrack.", show_default=False)
    ],
    sheet: Annotated[
        Path | None, typer.Option("--sheet", help="PNG to write: windows with their heatmaps over the pictures.", show_default=False)
    ] = None,
    preset_name: Preset = "tiny",
    settings: Settings = None,
    check: Annotated[bool, typer.Option("--check", help="Decode every picture, and name those that cannot be.")] = False,
    as_json: AsJson = False,
) -> None:
    """What is there, what is missing, and how many windows a training would have."""
    from mvwan import pictures
    from mvwan.data_report import check_pictures, contact_sheet, inspect

    config = _config(settings, preset_name, root=folder)
    report, splits = inspect(config)
    damaged = check_pictures(config) if check else []
    if sheet is not None:
        write_file(sheet, pictures.png(contact_sheet(splits)))
    if as_json:
        checked = {"damaged": [asdict(frame) for frame in damaged]} if check else {}
        typer.echo(json_text(report.to_json() | checked), nl=False)
        return
    console().print(report.render())
    lines = report.lines() + [f"damaged: {frame.episode}, frame {frame.frame}: {frame.reason}" for frame in damaged]
    lines += [f"every picture was decoded, {len(damaged) or 'none'} of them damaged"] if check else []
    for line in [*lines, *([f"sheet: {sheet}"] if sheet else [])]:
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

    done = convert(source, output, _config(settings).data)
    typer.echo(f"{output}: {done.episodes} episodes, {done.frames} frames in the views {', '.join(done.views)}, from {done.source_format}")


@datasets.command(epilog="Example: mvwan data view data/drawer --episode drawer-open-v3/000000 --rerun drawer.rrd")
def view(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a dataset in any format that is read.", show_default=False)],
    rerun: Annotated[Path, typer.Option("--rerun", metavar="OUT.rrd", help="Recording to write; `rerun OUT.rrd` plays it.")],
    name: Annotated[str | None, typer.Option("--episode", help="Name of the episode; the first one where none is given.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="data.cameras, data.heatmap_sigma_px, data.trail.*; repeatable."),
    ] = None,
) -> None:
    """Write one episode as a Rerun recording: cameras, pictures, heatmaps, the path in space, the gripper."""
    from mvwan.data.dataset import episodes_of
    from mvwan.rerun_export import write_recording

    data = _config(settings).data
    episodes = {episode.name: episode for episode in episodes_of(data, folder)}
    if name is not None and name not in episodes:
        raise MvwanError(f"--episode {name}: no such episode in {folder}; there are {some(episodes)}.{nearest(name, episodes)}")
    episode = episodes[next(iter(episodes)) if name is None else name]
    sigma_px = data.heatmap_sigma_px * episode.cameras[0].height_px / data.height_px
    size = write_recording(episode, rerun, sigma_px)
    typer.echo(f"{rerun}: {episode.name}, {episode.num_frames} frames in {len(episode.cameras)} views, {size / 2**20:.1f} MB")


def _config(settings: list[str] | None, preset_name: str = "tiny", root: Path | None = None) -> Config:
    """The preset's with the settings laid over it, for as many views as these name cameras."""
    overrides = parse_overrides(settings or [])
    cameras = overrides.get("data", {}).get("cameras")
    views = {"model": {"views": len(cameras)}} if isinstance(cameras, list) and cameras else {}
    folder = {"data": {"root": str(root)}} if root is not None else {}
    return config_from_preset(preset_name, views, overrides, folder, where="settings")
