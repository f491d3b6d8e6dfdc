"""Options that several verbs share, and the settings they resolve to. Knows no verb.

Later wins: preset, YAML file, environment, `--set`, flag.
"""

import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mvwan.config import Config, config_from_dict, merge, parse_overrides, read_yaml
from mvwan.errors import MvwanError
from mvwan.presets import PRESETS, preset

SWITCH_VARIABLE = "UNFREEZE_MODULATION_AND_NORMS"
_SWITCH_VALUES = {"true": True, "1": True, "false": False, "0": False}


class Layouts(StrEnum):
    """Where the objects of a Meta-World task may stand."""

    stock = "stock"
    widened = "widened"


class Kernel(StrEnum):
    """What attention is computed by."""

    auto = "auto"
    math = "math"
    native = "native"
    cudnn = "cudnn"
    flash = "flash"
    flash3 = "flash3"
    sage = "sage"
    flex = "flex"
    xformers = "xformers"


class HeatFrom(StrEnum):
    """What makes heat of latents."""

    auto = "auto"
    vae = "vae"


class Fusion(StrEnum):
    """How RGB and heatmap share the network."""

    channel = "channel"
    view = "view"


class ViewCode(StrEnum):
    """How view attention tells views apart."""

    slot = "slot"
    camera = "camera"
    both = "both"


class ActionHead(StrEnum):
    """What is predicted per frame beside the pictures."""

    none = "none"
    gripper = "gripper"
    gripper_rotation = "gripper_rotation"


Switch = Annotated[
    bool | None,
    typer.Option(
        "--unfreeze_modulation_and_norms/--no-unfreeze_modulation_and_norms",
        "--unfreeze-modulation-and-norms/--no-unfreeze-modulation-and-norms",
        help=f"Train the AdaLN modulation and view attention's norms as well. Not given: ${SWITCH_VARIABLE}, or the settings.",
        show_default=False,
    ),
]
HeatSource = Annotated[
    HeatFrom, typer.Option("--heat-from", help="What makes heat of latents: the run's heat reader where it has one (auto), or the VAE.")
]
Preset = Annotated[str, typer.Option("--preset", help=f"Named settings to start from: {', '.join(PRESETS)}.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file laid over the preset.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="One setting laid over both, e.g. train.steps=100; repeatable.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout and nothing else there.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]
DenoiseSteps = Annotated[int, typer.Option("--denoise-steps", min=1, help="Euler steps from noise to video.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or of one of its checkpoints.", show_default=False)]
Dataset = Annotated[
    Path | None, typer.Option("--dataset", help="Folder of demonstrations; not given: the one the run was trained on.", show_default=False)
]


def switch_from_environment(environ: Mapping[str, str]) -> bool | None:
    """The switch as `$UNFREEZE_MODULATION_AND_NORMS` sets it, None when it is unset. `MvwanError` for anything but true, false, 1, 0."""
    text = environ.get(SWITCH_VARIABLE)
    if text is None:
        return None
    if text.lower() not in _SWITCH_VALUES:
        raise MvwanError(f"{SWITCH_VARIABLE}={text!r}: must be true, false, 1 or 0. Set it to one of them or unset it.")
    return _SWITCH_VALUES[text.lower()]


def resolve_config(
    preset_name: str, config_file: Path | None, settings: list[str] | None, switch: bool | None, environ: Mapping[str, str]
) -> tuple[Config, str]:
    """(checked config, note on where the switch comes from, empty when nobody set it).

    Later wins: preset, YAML file, environment, `--set`, flag. `MvwanError` names the field at fault.
    """
    overrides = parse_overrides(settings or [])
    values = merge(preset(preset_name), read_yaml(config_file) if config_file else {})
    variable = switch_from_environment(environ)
    said = ""
    if switch is not None:
        overrides = merge(overrides, {"unfreeze_modulation_and_norms": switch})
    elif variable is not None and "unfreeze_modulation_and_norms" not in overrides:
        values = merge(values, {"unfreeze_modulation_and_norms": variable})
        said = environment_note(variable)
    where = "settings" if overrides else str(config_file or f"preset {preset_name}")
    return config_from_dict(merge(values, overrides), where), said


def parse_rates(text: str) -> tuple[float, ...]:
    """`1e-3,3e-3`, as `--learning-rates` takes it, as numbers. `MvwanError` for anything else."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise MvwanError(f"--learning-rates {text}: numbers with commas between them are needed, for example 1e-3,3e-3") from None


def environment_note(value: bool) -> str:
    """Says that the switch comes from the environment."""
    return f"unfreeze_modulation_and_norms={str(value).lower()}, from the environment variable {SWITCH_VARIABLE}"


def note(text: str) -> None:
    """Nothing; `text` stands on stderr, unless it is empty."""
    if text:
        typer.echo(f"note: {text}", err=True)


def console() -> Console:
    """Tables keep their columns when the output is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)
