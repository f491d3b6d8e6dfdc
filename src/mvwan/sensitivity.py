"""Which groups are worth training: squared gradients and short trainings of each group alone, before a real training.

    <output>/
        sensitivity.json, table.md, sensitivity.html     what was found
        suggestion.yaml                                  settings under which the suggested groups train: `mvwan train --config`
        probes.jsonl                                     a line per finished measurement, by the hash of all that it depends on
        latents/                                         the latent cache, unless data.cache names another place

The loss of a window is w * rgb + (1 - w) * heat + action_weight * action, each a mean over the window's own elements; a step and an
evaluation take the mean over windows. Two views:

Fisher, the expected squared gradient: per parameter, the mean over windows of the square of the gradient of one window's loss, summed
over a group or a block of it (the empirical Fisher information; Kunstner et al., arXiv 1905.12558, eq. 3, who also say what it is not).
It sees the first step alone. LoRA's B starts at zero, so A has no gradient then and what is found is B's; and while the projector is zero
nothing behind it has any. "Live" counts the parameters in tensors that had a gradient at all; per parameter means per live one.

Probe: a few steps with one group training, the same windows, sigma and noise for each, then the held-out loss at fixed sigma and noise. It
decides. A group that no gradient reaches is probed together with the projector, and counts by what it adds to the projector alone.
Probes have a constant learning rate, no warm-up and no weight decay; clipping and Adam's betas are those of the settings. Blocks are
told apart by putting each back to its start after the probe, one at a time: what the held-out loss then loses is that block's part.

One training seed; intervals are over held-out windows, which resemble each other within an episode; and the learning rate is the best on
the windows that are reported: differences of a few per cent between groups are no ranking.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mvwan.config import Config, dump_yaml
from mvwan.data.dataset import WindowDataset
from mvwan.errors import MvwanError
from mvwan.files import write_file, write_json
from mvwan.model.trainable import SWITCH_GROUPS
from mvwan.sensitivity_candidates import (
    PROJECTOR,
    Budget,
    Candidate,
    Gain,
    block_of,
    budget_of,
    candidates_of,
    check_budget,
    choose,
    compulsory,
    equal_count_rank,
    load_module,
    reduced,
    suggested,
    trained_by,
)
from mvwan.sensitivity_probes import LINES, Measurements, Options
from mvwan.train_check import check_windows

_RESAMPLES = 2000
SUGGESTION, DEFAULT, SWITCH = "suggestion", "default", "switch"
_UNREACHED: dict[str, Any] = {
    "learning_rate": None,
    "losses_by_rate": {},
    "decrease": 0.0,
    "interval": [0.0, 0.0],
    "needs": None,
    "block_decrease": {},
    "note": "no gradient reaches it from this start",
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be measured."""

    candidates: tuple[Candidate, ...]
    lower_rank: int | None
    """At which parts of LoRA are probed once more, to compare at equal count."""
    budget: Budget
    probes: int
    """Trainings of `probe_steps` steps, at most."""
    steps: int
    """Optimizer steps of all probes."""
    gradients: int
    """Windows whose gradient is squared."""
    beside: Mapping[str, tuple[tuple[str, ...], int]]
    """List that the suggestion is compared with -> what it trains: names, count."""

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for `json.dumps`."""
        fields = ("name", "group", "mode", "parameters", "needs_acceptance", "obstacle")
        rows = [{**{field: getattr(one, field) for field in fields}, "tensors": len(one.names)} for one in self.candidates]
        numbers = {name: getattr(self, name) for name in ("lower_rank", "probes", "steps", "gradients")}
        return {"candidates": rows, "budget": {"parameters": self.budget.parameters, "given": self.budget.given}, **numbers}


def _datasets(config: Config) -> tuple[WindowDataset, WindowDataset]:
    """The windows of both splits. `MvwanError` when nothing is held out to measure on."""
    if config.train.evaluate_windows < 2:
        raise MvwanError(f"train.evaluate_windows={config.train.evaluate_windows}: probes need at least 2 held-out windows. Set it higher.")
    found = check_windows(config)
    held_out = found.validation
    if len(held_out) < 2:
        raise MvwanError(
            f"data.validation_share={config.data.validation_share:g} of {len(found.episodes)} episodes holds out {len(held_out)} windows; "
            "probes are compared on held-out windows. Set data.validation_share, for example to 0.2."
        )
    return found.training, held_out


def make_plan(config: Config, options: Options) -> Plan:
    """What `analyse` will measure, counted without weights. Raises `MvwanError` for settings, checkpoint and budget that do not fit."""
    module = load_module(config, "meta")
    found = candidates_of(module, config)
    budget = budget_of(config, options.budget, options.budget_mb)
    check_budget(found, config, budget)
    lower = equal_count_rank(found, config)
    probes = (len(found) + (sum(1 for one in found if one.lora_flag) if lower else 0) + 3) * len(options.learning_rates)
    return Plan(
        candidates=found,
        lower_rank=lower,
        budget=budget,
        probes=probes,
        steps=probes * options.probe_steps,
        gradients=options.batches * config.train.batch_size,
        beside={DEFAULT: _trained_with_switch(config, False), SWITCH: _trained_with_switch(config, True)},
    )


def analyse(config: Config, output: Path, options: Options | None = None, progress: bool = True) -> dict[str, Any]:
    """What `sensitivity.json` holds, after measuring what is missing; writes that file and `suggestion.yaml`.

    Raises `MvwanError` before anything is measured when settings, data, checkpoint, budget or folder do not fit.
    """
    options = options or Options()
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not (output / LINES).is_file()):
        raise MvwanError(f"--output {output}: holds something that is no sensitivity analysis. Choose another folder, or remove it.")
    datasets = _datasets(config)
    plan = make_plan(config, options)
    if not (output / LINES).exists():  # the mark of such a folder, before anything else is in it
        write_file(output / LINES, "")
    analysis = Measurements(config, output, options, *datasets)
    with tqdm(total=plan.gradients + plan.steps, unit="step", desc="sensitivity", disable=not progress) as bar:
        analysis.bar = bar
        result, chosen = _measure(analysis, plan, config)
    write_json(output / "sensitivity.json", result)
    if chosen:
        write_file(output / "suggestion.yaml", _yaml(config, result, chosen, plan))
    else:
        (output / "suggestion.yaml").unlink(missing_ok=True)
    return result


def _probed(analysis: Measurements, plan: Plan, config: Config, squares: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Candidate's name -> what its probes found."""
    dead = {one.name for one in plan.candidates if not any(squares[name] for name in one.names)}
    projector = next((one for one in plan.candidates if one.name == PROJECTOR and one.name not in dead), None)
    ordered = sorted(plan.candidates, key=lambda one: one is not projector)  # the projector first: others are measured beside it
    beside: np.ndarray | None = None
    rows: dict[str, dict[str, Any]] = {}
    for one in ordered:
        if one.name in dead and projector is None:
            rows[one.name] = dict(_UNREACHED)
            continue
        needs = projector if one.name in dead else None
        line = analysis.probe(one.name, [one, *([needs] if needs else [])], blocks=needs is None)
        rows[one.name] = _gain(analysis, line, beside if needs else analysis.start)
        rows[one.name] |= {"needs": needs.name if needs else None, "block_decrease": line["blocks"]}
        if one is projector:
            beside = None if line["losses"] is None else np.array(line["losses"])
        if plan.lower_rank and one.lora_flag:
            small = reduced(one, plan.lower_rank, config.trainable.lora.rank)
            line = analysis.probe(f"{one.name}, rank {plan.lower_rank}", [small, *([needs] if needs else [])])
            found = _gain(analysis, line, beside if needs else analysis.start)
            rows[one.name]["equal_count"] = {"rank": plan.lower_rank, "parameters": small.parameters, **found}
    return rows


def _measure(analysis: Measurements, plan: Plan, config: Config) -> tuple[dict[str, Any], list[Candidate]]:
    """(what `sensitivity.json` holds, the suggested candidates)."""
    squares = analysis.fisher()
    rows = _probed(analysis, plan, config, squares)
    chosen = _choose(plan, rows, config)
    candidates = [_described(one, squares, analysis.sizes, rows[one.name]) for one in plan.candidates]
    candidates.sort(key=lambda row: -(row["decrease_per_million"] if row["decrease_per_million"] is not None else -math.inf))
    predicted = sum(_row_of(one, rows)["decrease"] or 0.0 for one in chosen)
    result = {
        "base": config.base.source,
        "from_checkpoint": config.train.from_checkpoint,
        "seed": config.seed,
        "probe_steps": analysis.options.probe_steps,
        "windows_per_step": config.train.batch_size * config.train.gradient_accumulation,
        "learning_rates": sorted(analysis.options.learning_rates),
        "gradients": plan.gradients,
        "held_out_windows": len(analysis.start),
        "held_out_loss_at_start": float(analysis.start.mean()),
        "lower_rank": plan.lower_rank,
        "candidates": candidates,
        "budget": {"parameters": plan.budget.parameters, "given": plan.budget.given},
        "suggestion": {
            "groups": [one.name for one in chosen],
            "rank": next((one.rank for one in chosen if one.rank is not None), None),
            "parameters": sum(one.parameters for one in chosen),
            "sum_of_decreases": predicted,
            "needs_acceptance": any(one.needs_acceptance for one in chosen),
        },
        **_sets(analysis, chosen, plan),
    }
    return result, chosen


def _gain(analysis: Measurements, line: Mapping[str, Any], before: np.ndarray | None) -> dict[str, Any]:
    """Mean decrease of the held-out loss from `before`, with a 95 % bootstrap interval over windows."""
    found: dict[str, Any] = {"learning_rate": line["rate"], "losses_by_rate": line["rates"]}
    if line["losses"] is None or before is None:
        return {**found, "decrease": None, "interval": None, "note": "every learning rate ended in NaN"}
    low, mean, high = interval(before - np.array(line["losses"]), analysis.config.seed)
    return {**found, "decrease": mean, "interval": [low, high], "note": ""}


def interval(values: np.ndarray, seed: int) -> tuple[float, float, float]:
    """(low, mean, high) of `values` [windows]: their mean, and its 95 % percentile bootstrap (Efron and Tibshirani 1993, ch. 13)."""
    drawn = np.random.default_rng(seed).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
    return float(low), float(values.mean()), float(high)


def _row_of(one: Candidate, rows: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    return rows[one.name].get("equal_count", rows[one.name]) if one.rank is not None else rows[one.name]


def _choose(plan: Plan, rows: Mapping[str, dict[str, Any]], config: Config) -> list[Candidate]:
    """The better, by the sum of what its members were worth alone, of a list with adapters of full and one of lower rank."""
    lists: list[list[Candidate]] = []
    for rank in (None, plan.lower_rank) if plan.lower_rank else (None,):
        options = [reduced(one, rank, config.trainable.lora.rank) if rank and one.lora_flag else one for one in plan.candidates]
        gains = {one.name: Gain(decrease=_row_of(one, rows)["decrease"] or 0.0, needs=rows[one.name].get("needs")) for one in options}
        lists.append(choose(options, gains, plan.budget, compulsory(options, config)))
    return max(lists, key=lambda chosen: sum(_row_of(one, rows)["decrease"] or 0.0 for one in chosen))


def _described(one: Candidate, squares: Mapping[str, float], sizes: Mapping[str, int], row: Mapping[str, Any]) -> dict[str, Any]:
    """A candidate as plain numbers. Blocks are counted from 0; `outside` is what is in none."""
    by_block: dict[str, dict[str, Any]] = {}
    for name in one.names:
        block = block_of(name)
        held = by_block.setdefault("outside" if block is None else str(block), {"sum": 0.0, "parameters": 0, "live": 0})
        held["sum"] += squares[name]
        held["parameters"] += sizes[name]
        held["live"] += sizes[name] if squares[name] else 0
    for held in by_block.values():
        held["per_parameter"] = held["sum"] / held["live"] if held["live"] else 0.0
    total, live = sum(held["sum"] for held in by_block.values()), sum(held["live"] for held in by_block.values())
    decrease = row["decrease"]
    return {
        "name": one.name,
        "group": one.group,
        "mode": one.mode,
        "parameters": one.parameters,
        "tensors": len(one.names),
        "live_parameters": live,
        "fisher": total,
        "fisher_per_parameter": total / live if live else 0.0,
        "fisher_by_block": by_block,
        "decrease_per_million": None if decrease is None else decrease / one.parameters * 1e6,
        "obstacle": one.obstacle,
        **row,
    }


def _sets(analysis: Measurements, chosen: Sequence[Candidate], plan: Plan) -> dict[str, Any]:
    """Probes of whole lists side by side: `sets`, and `comparisons` of the suggestion with the two others, window by window."""
    lists: dict[str, list[Candidate]] = {SUGGESTION: list(chosen)} if chosen else {}
    for name, (names, parameters) in plan.beside.items():
        lists[name] = [Candidate(name=name, group=name, mode="full", names=names, parameters=parameters)]
    lines = {name: analysis.probe(name, parts) for name, parts in lists.items()}
    sets = [
        {"name": name, "parameters": sum(one.parameters for one in lists[name]), **_gain(analysis, line, analysis.start)}
        for name, line in lines.items()
    ]
    comparisons = []
    for name in (DEFAULT, SWITCH) if chosen else ():
        ours, theirs = lines[SUGGESTION]["losses"], lines[name]["losses"]
        if ours is not None and theirs is not None:
            low, mean, high = interval(np.array(theirs) - np.array(ours), analysis.config.seed)
            verdict = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
            comparisons.append({"beside": name, "lower_by": mean, "interval": [low, high], "verdict": verdict})
    return {"sets": sets, "comparisons": comparisons}


def _trained_with_switch(config: Config, switch: bool) -> tuple[tuple[str, ...], int]:
    """What trains with the switch set so, whatever the settings say of its groups, which might contradict it."""
    groups = {name: group for name, group in config.trainable.groups.items() if name not in SWITCH_GROUPS}
    return trained_by(replace(config, unfreeze_modulation_and_norms=switch, trainable=replace(config.trainable, groups=groups)))


def _yaml(config: Config, result: Mapping[str, Any], chosen: Sequence[Candidate], plan: Plan) -> str:
    """Settings of a training with the suggested groups, with a heading that says where they come from."""
    suggestion = result["suggestion"]
    names, rank = ", ".join(suggestion["groups"]), suggestion["rank"]
    lines = [
        f"# Suggested by mvwan sensitivity: {names}" + (f"; adapters of rank {rank}" if rank else ""),
        f"# {suggestion['parameters']:,} trained parameters; budget {plan.budget.parameters:,} ({plan.budget.given}).",
        *(["# mvwan train needs --accept-trainable-change with it."] if suggestion["needs_acceptance"] else []),
    ]
    return "\n".join(lines) + "\n" + dump_yaml(suggested(config, chosen, plan.candidates))
