"""What an ablation varies: factors, arms, learning rates and seeds as one file, `grid.yaml`, checked before anything runs.

    preset: tiny-finetune
    settings: {data: {root: data/drawer}, train: {steps: 200}}
    vary:                               # every combination is an arm; the first values are the reference
      unfreeze_modulation_and_norms: [false, true]
    arms:                               # arms of their own beside them
      modulation alone: {trainable: {groups: {modulation: {mode: full}}}}
    learning_rates: [0.001, 0.003]      # each arm is trained with all of them
    seeds: 3                            # 0, 1, 2

`{seed}` in `train.from_checkpoint` stands for the seed of the run, which so goes on from a pretraining of its own seed, for example
from the runs of an earlier grid.

Runs of one seed are paired: the same base, held-out episodes, data order, sigma and noise. So a setting that decides which windows are
measured, or of which base, is no factor. Knows no result and no process.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from mvwan.config import Config, config_from_dict, merge, parse_overrides, read_yaml
from mvwan.errors import MvwanError, nearest
from mvwan.files import flatten, sha256_json
from mvwan.presets import preset

GRID = "grid.yaml"
"""The file of a grid in the folder of its ablation."""
_PAIRED = "runs would not be measured on the windows of the reference, so there would be no pairs to compare"
_BASE = "arms are compared on one base"
_OWNED: Mapping[str, str] = {
    "seed": "--seeds decides it here",
    "train.learning_rate": "it is swept for every arm, with --learning-rates",
}
"""Settings that an option decides, in factors, arms and settings alike."""
_NO_FACTORS: Mapping[str, str] = {
    **_OWNED,
    **dict.fromkeys(("base.source", "base.codec", "base.random_weights"), _BASE),
    "data.root": "arms are compared on the same demonstrations; set it with --set",
    "data.cache": "it changes no result; set it with --set",
    "train.ema_decay": "what is measured are the last weights, not their average, so arms would not differ",
    **dict.fromkeys(
        (
            *("data.cameras", "data.num_frames", "data.frame_interval", "data.window_stride", "data.past_end", "data.height_px"),
            *("data.width_px", "data.heatmap_sigma_px", "data.validation_share", "data.text_tokens", "data.on_corrupt", "data.trail"),
            *("model.views", "train.condition_frames"),
        ),
        _PAIRED,
    ),
}
_DEFAULTS: Mapping[str, Any] = {"train": {"tracker": "none", "keep_last": 1, "keep_best": False}}
"""Over the preset and under all else: what is measured is the last checkpoint of a run, and its own log is enough."""
_LONGEST_FOLDER_NAME = 80
_SEED = "{seed}"
"""In the place of a checkpoint: the seed of the run."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train, among those that are compared."""

    name: str
    settings: Mapping[str, Any]
    """Nested, laid over those of the grid."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training: an arm at a learning rate and a seed."""

    arm: str
    learning_rate: float
    seed: int
    config: Config
    folder: Path

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.arm}, learning rate {self.learning_rate:g}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Grid:
    """What is compared and how it is measured. Raises `MvwanError` for what cannot be."""

    preset: str = "tiny-finetune"
    """Named settings that all runs start from."""
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    """Nested settings of all runs, laid over the preset."""
    vary: dict[str, list[Any]] = field(default_factory=dict[str, list[Any]])
    """Dotted field -> its values. Every combination is an arm; that of the first values is the reference."""
    arms: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """Name -> nested settings of further arms; the first is the reference where nothing is varied."""
    learning_rates: tuple[float, ...] = ()
    """Tried with every arm; the best on validation data is the arm's. Empty: that of the settings alone."""
    seeds: int = 3
    """Runs per arm and learning rate: seeds 0, 1, ..."""
    test_dataset: str | None = None
    """Folder of demonstrations that nothing trains on, to compare arms on; None: half of the held-out episodes."""
    windows: int = 32
    """Windows measured per split, at most, spread evenly."""
    denoise_steps: int = 5
    """Euler steps of the predictions, which are made by each arm's best learning rate alone."""
    trials: int = 0
    """Closed-loop trials per task, of the same runs; 0: none."""
    tasks: tuple[str, ...] = ()
    """Tasks of the trials; empty: those of the demonstrations."""
    execute: int = 8
    """Waypoints that a trial follows before it looks again."""
    accept_trainable_change: bool = False
    """Arms may train groups that the checkpoint they start from was trained without."""

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("windows", 1), ("denoise_steps", 1), ("trials", 0), ("execute", 1)):
            if getattr(self, name) < least:
                raise MvwanError(f"{_option(name)} {getattr(self, name)}: must be at least {least}")
        if not self.trials and (self.tasks or self.execute != Grid.execute):
            raise MvwanError("--task and --execute are of closed-loop trials, and there are none. Give --trials, or leave them out.")
        _refuse(flatten(self.settings, "."), _OWNED, "--set")
        for name, values in self.vary.items():
            if not values:
                raise MvwanError(f"--vary {name}: no value. Give two or more, for example --vary {name}=false,true")
            for value in values:
                _refuse(_fields_of(name, value), _NO_FACTORS, "--vary")
        for name, settings in self.arms.items():
            _refuse(flatten(settings, "."), _NO_FACTORS, f"arms: {name}:")
        rates = self.rates
        if min(rates) <= 0 or len(set(rates)) < len(rates):
            raise MvwanError(f"--learning-rates {','.join(map(str, rates))}: each must be above 0 and given once")
        self._check_arms()

    def _check_arms(self) -> None:
        """Nothing, or `MvwanError` when there are not two arms, or two are the same; each arm's settings are checked on the way."""
        arms = self.all_arms
        if len(arms) < 2:
            raise MvwanError(
                f"{len(arms)} arm: nothing to compare. Give --vary FIELD=VALUE,VALUE, for example "
                "--vary unfreeze_modulation_and_norms=false,true; or `arms:` in a grid file."
            )
        known: dict[str, str] = {}
        for arm in arms:
            if arm.name in list(known.values()):
                raise MvwanError(f"arm {arm.name!r} is there twice. Give it another name in `arms:`.")
            key = sha256_json(self.config(arm, self.rates[0], 0).to_dict())
            if key in known:
                raise MvwanError(f"arms {known[key]!r} and {arm.name!r} have the same settings. Remove one of them.")
            known[key] = arm.name

    @cached_property
    def all_arms(self) -> tuple[Arm, ...]:
        """The reference first, then the other combinations of factors, then the arms of their own."""
        words = [factor.rpartition(".")[2] for factor in self.vary]
        shown = {factor: word if words.count(word) == 1 else factor for factor, word in zip(self.vary, words, strict=True)}
        found: list[Arm] = []
        for values in itertools.product(*self.vary.values()) if self.vary else ():
            chosen = dict(zip(self.vary, values, strict=True))
            name = ", ".join(f"{shown[factor]}={in_words(value)}" for factor, value in chosen.items())
            found.append(Arm(name=name, settings=merge({}, *(nested(factor, value) for factor, value in chosen.items()))))
        return (*found, *(Arm(name=name, settings=settings) for name, settings in self.arms.items()))

    @property
    def reference(self) -> str:
        """The arm that the others are compared with."""
        return self.all_arms[0].name

    @cached_property
    def rates(self) -> tuple[float, ...]:
        """The learning rates that every arm is trained with."""
        return self.learning_rates or (config_from_dict(self._values(), "settings").train.learning_rate,)

    def _values(self, *more: Mapping[str, Any]) -> dict[str, Any]:
        return merge(preset(self.preset), _DEFAULTS, self.settings, *more)

    def config(self, arm: Arm, learning_rate: float, seed: int, output: Path | None = None) -> Config:
        """The settings of one run; its latents lie in `output`, shared by all, unless `data.cache` names a place. Errors name the arm."""
        owned: dict[str, Any] = {"seed": seed, "train": {"learning_rate": learning_rate}}
        values = self._values(arm.settings, owned)
        if isinstance(start := self.start(arm), str):
            values = merge(values, nested("train.from_checkpoint", start.replace(_SEED, str(seed))))
        if output is not None and values.get("data", {}).get("cache") is None:
            values = merge(values, {"data": {"cache": str(output / "latents")}})
        return config_from_dict(values, f"arm {arm.name!r}")

    def start(self, arm: Arm) -> str | None:
        """The checkpoint that the runs of an arm start from, as written: with `{seed}` where each seed has its own."""
        return self._values(arm.settings, {"train": {}})["train"].get("from_checkpoint")

    def runs(self, output: Path) -> list[Run]:
        """All runs in the order in which they are started: seed by seed, so that a grid that is cut off has whole pairs."""
        folders = _folder_names(self.all_arms)
        return [
            Run(
                arm=arm.name,
                learning_rate=rate,
                seed=seed,
                config=self.config(arm, rate, seed, output),
                folder=output / "runs" / folders[arm.name] / f"lr-{rate:g}" / f"seed-{seed}",
            )
            for seed in range(self.seeds)
            for rate in self.rates
            for arm in self.all_arms
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `grid_from_dict` reads them back equal."""
        return TypeAdapter(Grid).dump_python(self, mode="json")

    def to_yaml(self) -> str:
        """The text of a grid file."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def grid_from_dict(values: Mapping[str, Any], where: str) -> Grid:
    """A checked grid; `where` starts the message of the `MvwanError` for a bad field."""
    try:
        return TypeAdapter(Grid).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, MvwanError):
            raise MvwanError(f"{where}: {cause}") from None
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            fields = list(Grid.__dataclass_fields__)
            raise MvwanError(f"{where}: no field {name!r} in a grid; there are {', '.join(fields)}.{nearest(name, fields)}") from None
        raise MvwanError(f"{where}: {name}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}. Set {name}.") from None


def read_grid(path: str | Path) -> Grid:
    """The grid in a file. `MvwanError` when it is missing or holds something else."""
    return grid_from_dict(read_yaml(path), str(path))


def parse_factors(given: Iterable[str]) -> dict[str, list[Any]]:
    """`["trainable.lora.ffn=true,false", ...]` as factor -> values: what stands behind `=` is a YAML list without its brackets."""
    factors: dict[str, list[Any]] = {}
    for words in given:
        factor, equals, text = words.partition("=")
        if not equals or not factor:
            raise MvwanError(f"--vary {words}: needs the form FIELD=VALUE,VALUE, for example --vary trainable.lora.ffn=true,false")
        if factor in factors:
            raise MvwanError(f"--vary {factor}: given twice. Give all its values at once.")
        value: Any = parse_overrides([f"{factor}=[{text}]"], "--vary")
        for part in factor.split("."):
            value = value[part]
        factors[factor] = value
    return factors


def differences(before: Grid, now: Grid) -> list[str]:
    """What two grids say differently, a few words each."""
    old, new = before.to_dict(), now.to_dict()
    old, new = (
        {**{name: value for name, value in grid.items() if name != "settings"}, **flatten(grid["settings"], ".")} for grid in (old, new)
    )
    return [f"{name}: {old.get(name)!r} before, {new.get(name)!r} now" for name in {**old, **new} if old.get(name) != new.get(name)]


def nested(name: str, value: Any) -> dict[str, Any]:
    """`value` at its dotted place."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def in_words(value: Any) -> str:
    """A value on one line, as YAML writes it."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False).removesuffix("...\n").strip()


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _fields_of(factor: str, value: Any) -> list[str]:
    return list(flatten({factor: value}, ".")) or [factor]


def _refuse(given: Iterable[str], owned: Mapping[str, str], where: str) -> None:
    """Nothing, or `MvwanError` for a field that is not open to choice, or a section that holds one."""
    for name in given:
        for own, reason in owned.items():
            if name == own or name.startswith(f"{own}.") or own.startswith(f"{name}."):
                raise MvwanError(f"{where} {name}: {reason}. Remove it.")


def _folder_names(arms: Sequence[Arm]) -> dict[str, str]:
    """Arm -> a folder name of plain characters; long and equal ones get a part of their digest."""
    plain = {arm.name: re.sub(r"[^\w=.-]+", "-", arm.name, flags=re.ASCII).strip("-.") or "arm" for arm in arms}
    names = list(plain.values())
    return {
        arm: name
        if names.count(name) == 1 and len(name) <= _LONGEST_FOLDER_NAME
        else f"{name[:_LONGEST_FOLDER_NAME]}-{sha256_json(arm)[:8]}"
        for arm, name in plain.items()
    }
