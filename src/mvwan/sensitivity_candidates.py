"""What a sensitivity analysis ranks: every group that can train, with exact counts; and a list of groups chosen under a budget.

LoRA is cut into the parts that `trainable.lora` can switch. Built-in groups are candidates whether or not they train in the given
settings; but `all` (every weight that LoRA adapts, whole) only where the settings train it. Blocks cannot be chosen: settings name whole
groups. Knows no batch, no loss and no file.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from mvwan.config import Config, GroupConfig, TrainableConfig
from mvwan.errors import MvwanError
from mvwan.model.trainable import ACTION_GROUP, CAMERA_GROUP, GROUPS, SWITCH_GROUPS, build_table, resolve_groups
from mvwan.model.trainable_table import Mode
from mvwan.training_module import HeatmapWanTrainingModule

BYTES_PER_PARAMETER = {"adamw": 16, "adafactor": 8}
"""By `train.optimizer`: a float32 value and its gradient, and AdamW's two moments; Adafactor's few are not counted."""
PROJECTOR = "projector"
"""Starts at zero, and lets nothing through to view attention before it has moved."""
_LORA_GROUPS = ("lora", "lora_mvs")
_LORA_PARTS = (
    ("lora_self_attention", "self_attention", re.compile(r"blocks\.\d+\.attn1\..+")),
    ("lora_cross_attention", "cross_attention", re.compile(r"blocks\.\d+\.attn2\..+")),
    ("lora_ffn", "ffn", re.compile(r"blocks\.\d+\.ffn\..+")),
    ("lora_view_attention", "view_attention", re.compile(r"blocks\.\d+\.mvs_attn\..+")),
)
_BLOCK = re.compile(r"blocks\.(\d+)\..+")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A set of parameters that can train while everything else is frozen."""

    name: str
    group: str
    """Of the settings."""
    mode: Mode
    names: tuple[str, ...]
    """Full parameter names in the order of the model."""
    parameters: int
    """Numbers, not tensors; in mode `lora` those of adapters of this `rank`."""
    lora_flag: str | None = None
    """Field of `trainable.lora` that switches it."""
    rank: int | None = None
    """Directions of each adapter that train, the first ones; None: all, or no adapters."""
    needs_acceptance: bool = False
    """Not in the checkpoint to start from: `mvwan train` takes it by --accept-trainable-change alone."""
    obstacle: str = ""
    """Why `mvwan train` could not train it from these settings; empty when it could."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """What a candidate was measured to be worth."""

    decrease: float
    """Of the held-out loss; beside the projector where `needs` says so."""
    needs: str | None = None
    """Name of the candidate without which no gradient reaches this one."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much may train."""

    parameters: int
    given: str
    """In words, for tables and messages."""


def superset(config: Config) -> TrainableConfig:
    """Settings under which every candidate trains, as a table to count by.

    A run that starts from a checkpoint keeps the adapters that this has, so the flags of `trainable.lora` stay; else all are on.
    """
    given, resumed = config.trainable.groups, config.train.from_checkpoint is not None
    lora = config.trainable.lora
    if not resumed:
        lora = replace(lora, self_attention=True, cross_attention=True, ffn=True, view_attention=True)
    absent = {ACTION_GROUP} if config.model.action_head == "none" else set[str]()
    absent |= {CAMERA_GROUP} if config.model.view_code == "slot" else set()
    groups = {name: one for name, one in given.items() if one.pattern is not None}
    for group in GROUPS:
        override = given[group.name].mode if group.name in given else None
        if group.name in absent:
            continue
        if group.name in _LORA_GROUPS or group.name == "all":
            keep = override if resumed or group.name == "all" else None
            groups |= {group.name: GroupConfig(mode=keep)} if keep else {}
        else:
            groups[group.name] = GroupConfig(mode="lora" if override == "lora" else "full")
    return TrainableConfig(lora=lora, groups=groups)


def load_module(config: Config, device: str | object = "cpu") -> HeatmapWanTrainingModule:
    """The module with the adapters of every candidate, from `train.from_checkpoint` where that is set. On "meta" it is only counted."""
    start = config.train.from_checkpoint
    settings = config
    if start is None:
        settings = replace(config, trainable=superset(config), unfreeze_modulation_and_norms=False)
    return HeatmapWanTrainingModule(
        config=settings,
        checkpoint=start,
        accept_trainable_change=start is not None,
        device=device,  # pyright: ignore[reportArgumentType]
        print_banners=False,
    )


def candidates_of(module: HeatmapWanTrainingModule, config: Config) -> tuple[Candidate, ...]:
    """The candidates in the order of the rules, of a module that `load_module` made of `config`."""
    groups = resolve_groups(superset(config), False, config.train, config.model.action_head, config.model.view_code)
    held = _in_checkpoint(module)
    found: list[Candidate] = []
    for row in build_table(module.model, groups).trainable_rows:
        if row.name in _LORA_GROUPS and row.mode == "lora":
            parts = [(name, flag, tuple(one for one in row.names if pattern.fullmatch(one))) for name, flag, pattern in _LORA_PARTS]
        else:
            parts = [(row.name, None, row.names)]
        for name, flag, names in parts:
            if not names:
                continue
            lacking = held is not None and not set(names) <= held
            may_lack = row.name in (*SWITCH_GROUPS, CAMERA_GROUP)
            found.append(
                Candidate(
                    name=name,
                    group=row.name,
                    mode=row.mode,
                    names=names,
                    parameters=count(module.model, names),
                    lora_flag=flag,
                    needs_acceptance=lacking and may_lack,
                    obstacle="the checkpoint to start from does not hold it" if lacking and not may_lack else "",
                )
            )
    return tuple(found)


def _in_checkpoint(module: HeatmapWanTrainingModule) -> set[str] | None:
    """The tensors that the checkpoint brought, None without one."""
    if module.fit is None:
        return None
    missing = {name for names in module.fit.missing.values() for name in names}
    return {name for group in module.saved_groups().values() for name in group["names"]} - missing


def count(model: nn.Module, names: Sequence[str]) -> int:
    """How many numbers the parameters of these names hold."""
    wanted = set(names)
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name in wanted)


def block_of(name: str) -> int | None:
    """The block that a parameter is in, None for one outside all blocks."""
    match = _BLOCK.fullmatch(name)
    return int(match[1]) if match else None


def equal_count_rank(candidates: Sequence[Candidate], config: Config) -> int | None:
    """The one rank at which adapters of a part come nearest, on average, to the count of the switch (`modulation` and `mvs_norms`).

    None when the settings have no lower rank than theirs to compare at: with rank 1, or where a checkpoint has its own.
    """
    switch = sum(candidate.parameters for candidate in candidates if candidate.group in SWITCH_GROUPS)
    parts = [candidate for candidate in candidates if candidate.lora_flag]
    if not parts or not switch or config.train.from_checkpoint is not None:
        return None
    rank = config.trainable.lora.rank
    per_rank = sum(part.parameters for part in parts) / len(parts) / rank
    lower = max(1, round(switch / per_rank))
    return lower if lower < rank else None


def reduced(candidate: Candidate, rank: int, full_rank: int) -> Candidate:
    """The same adapters with only their first `rank` directions in training: the count and the function of adapters of that rank."""
    return replace(candidate, rank=rank, parameters=candidate.parameters * rank // full_rank)


def budget_of(config: Config, parameters: int | None, megabytes: float | None) -> Budget:
    """The budget as given, else what `config` trains. `MvwanError` for both at once or for none at all."""
    if parameters is not None and megabytes is not None:
        raise MvwanError(f"--budget {parameters} and --budget-mb {megabytes:g}: give one of them")
    if megabytes is not None:
        size, optimizer = BYTES_PER_PARAMETER[config.train.optimizer], config.train.optimizer
        given = f"{megabytes:g} MB at {size} bytes per parameter that {optimizer} trains"
        return Budget(parameters=int(megabytes * 1e6 / size), given=given)
    if parameters is not None:
        return Budget(parameters=parameters, given="as given")
    return Budget(parameters=trained_by(config)[1], given="what the given settings train")


def trained_by(config: Config) -> tuple[tuple[str, ...], int]:
    """(names, count) of what `mvwan train` would train with `config`, by its own table; no weights are read."""
    table = HeatmapWanTrainingModule(config=config, device="meta", print_banners=False).table
    return table.trainable_names, table.trainable_parameters


def compulsory(candidates: Sequence[Candidate], config: Config) -> tuple[Candidate, ...]:
    """The candidates that a run from `train.from_checkpoint` trains in any case: settings cannot freeze the adapters of a checkpoint."""
    return tuple(one for one in candidates if one.lora_flag) if config.train.from_checkpoint is not None else ()


def check_budget(candidates: Sequence[Candidate], config: Config, budget: Budget) -> None:
    """Nothing, or `MvwanError` when nothing could be chosen under `budget`."""
    forced = sum(one.parameters for one in compulsory(candidates, config))
    if forced > budget.parameters:
        raise MvwanError(
            f"budget of {budget.parameters:,} parameters ({budget.given}): train.from_checkpoint={config.train.from_checkpoint} has "
            f"adapters of {forced:,}, which a run that starts from it trains; settings cannot freeze them. Give a budget of at least "
            f"{forced:,} (--budget), or start from the base with --set train.from_checkpoint=null."
        )
    smallest = min((one for one in candidates if not one.obstacle), key=lambda one: one.parameters)
    if not forced and smallest.parameters > budget.parameters:
        raise MvwanError(
            f"budget of {budget.parameters:,} parameters ({budget.given}): even the smallest group, {smallest.name}, has "
            f"{smallest.parameters:,}. Give a larger --budget."
        )


def choose(candidates: Sequence[Candidate], gains: Mapping[str, Gain], budget: Budget, forced: Sequence[Candidate] = ()) -> list[Candidate]:
    """Candidates in the order chosen: always the one of the largest decrease per parameter that is still affordable.

    What decreases nothing is never chosen, and what needs another candidate only after that one. `forced` are in from the start.
    """
    chosen = list(forced)
    while True:
        left = budget.parameters - sum(one.parameters for one in chosen)
        names = {one.name for one in chosen}
        open_to = [
            one
            for one in candidates
            if one.name not in names
            and not one.obstacle
            and one.parameters <= left
            and gains[one.name].decrease > 0
            and gains[one.name].needs in (None, *names)
        ]
        if not open_to:
            return chosen
        chosen.append(max(open_to, key=lambda one: gains[one.name].decrease / one.parameters))


def suggested(config: Config, chosen: Sequence[Candidate], candidates: Sequence[Candidate]) -> Config:
    """`config` with exactly the chosen candidates training. A lower rank keeps the scale that it was measured at."""
    names = {one.name for one in chosen}
    lora = config.trainable.lora
    if config.train.from_checkpoint is None:
        lora = replace(lora, **{flag: name in names for name, flag, _ in _LORA_PARTS})
    if rank := next((one.rank for one in chosen if one.rank is not None), None):
        lora = replace(lora, rank=rank, alpha=None if lora.alpha is None else lora.alpha * rank / lora.rank)
    built_in: dict[str, Mode] = {group.name: group.mode for group in GROUPS}
    groups: dict[str, GroupConfig] = {}
    for one in candidates:
        given = config.trainable.groups.get(one.group, GroupConfig())
        if one.lora_flag is not None:
            if one.name in names and given != GroupConfig():
                groups[one.group] = replace(given, mode=None)
            continue
        mode: Mode = one.mode if one.name in names else "frozen"
        if given.pattern is not None or mode != built_in[one.group]:
            groups[one.group] = replace(given, mode=mode) if mode != "frozen" else GroupConfig(pattern=given.pattern, mode=mode)
        elif mode != "frozen" and given != GroupConfig():
            groups[one.group] = replace(given, mode=None)
    own = {name: groups.get(name, one) for name, one in config.trainable.groups.items() if one.pattern is not None}  # their order counts
    return replace(config, unfreeze_modulation_and_norms=False, trainable=TrainableConfig(lora=lora, groups=own | groups))
