"""The verb `mvwan bench`: parses, calls one function. Everything heavy is imported inside; `cli` explains a user's mistake."""

import json
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Size(StrEnum):
    """Networks that can be measured."""

    tiny = "tiny"
    middle = "middle"
    block_5b = "block-5b"


class Part(StrEnum):
    """Parts of the measurement."""

    steps = "steps"
    costs = "costs"
    pipeline = "pipeline"
    growth = "growth"


def bench(
    size: Annotated[
        Size,
        typer.Option("--size", help="tiny: the Wan that ships. middle: dim 768, 6 blocks. block-5b: one block of the 5B."),
    ] = Size.tiny,
    part: Annotated[
        list[Part] | None,
        typer.Option("--part", help="Only this part; repeatable. Not given: all.", show_default=False),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Times that each step is measured; medians count.")] = 7,
    compiled: Annotated[bool, typer.Option("--compile", help="Add the model as train.compile makes it.")] = False,
    batch: Annotated[int | None, typer.Option("--batch", help="Windows per step. Not given: the size's own.", show_default=False)] = None,
    views: Annotated[int | None, typer.Option("--views", help="Cameras.", show_default=False)] = None,
    latent_frames: Annotated[int | None, typer.Option("--latent-frames", help="Frames after the VAE.", show_default=False)] = None,
    latent_side: Annotated[
        int | None, typer.Option("--latent-side", help="Side of a latent frame: a sixteenth of the picture's.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder for bench.md, bench.json and growth.png.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of batches and weights.")] = 0,
) -> None:
    """Measure steps beside peers and the floor, what features cost, the way of the data, and growth: minutes, no download."""
    from rich.console import Console

    from mvwan.bench import SECTIONS, Section, run_bench
    from mvwan.bench_networks import DEFAULT_SIZES
    from mvwan.bench_report import check_can_draw, draw_growth, markdown, rendered
    from mvwan.files import write_file, write_json

    parts: list[Section] = [one.value for one in part] if part else list(SECTIONS)  # pyright: ignore[reportAssignmentType]
    if output is not None and Part.growth in parts:
        check_can_draw()
    given = {"batch": batch, "views": views, "latent_frames": latent_frames, "latent_height": latent_side, "latent_width": latent_side}
    sizes = replace(DEFAULT_SIZES[size.value], **{name: value for name, value in given.items() if value is not None})
    told = Console(stderr=True, highlight=False)
    report = run_bench(
        size.value,
        sizes,
        parts,
        repeats,
        seed,
        compiled,
        say=lambda what: told.print(f"[dim]measuring {what}"),
    )
    if output is not None:
        write_json(output / "bench.json", report.to_json())
        write_file(output / "bench.md", markdown(report, "growth.png"))
        if report.growth:
            draw_growth(report, output / "growth.png")
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
    else:
        Console(highlight=False).print(rendered(report))
