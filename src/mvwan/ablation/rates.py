"""One arm's runs at several learning rates -> the rate that does best on validation data, and what to doubt about it.

Knows no test data and no other arm.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Values = Mapping[tuple[int, str], float]
"""(seed, episode) -> value."""


@dataclass(frozen=True, kw_only=True)
class SweptRate:
    """What one learning rate of an arm gave on validation data."""

    learning_rate: float
    mean: float | None
    """Of the outcome that selects: mean over seeds of each seed's mean over episodes. None when no seed finished."""
    num_seeds: int
    """How many seeds finished."""
    every_seed: bool
    """Whether all seeds of the comparison did."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The learning rate at which an arm is compared."""

    arm: str
    best: float | None
    """The best on validation data among the rates at which every seed finished, if there is one; of equals the smallest."""
    swept: tuple[SweptRate, ...]
    """From the smallest rate to the largest."""
    at_edge: Literal["", "smallest", "largest"]
    """Where the best rate ends the sweep, beyond which better ones may lie."""
    warnings: tuple[str, ...]
    """Sentences."""


def choose(arm: str, by_rate: Mapping[float, Values], seeds: set[int], better: Literal["lower", "higher"]) -> Choice:
    """The best of the rates in `by_rate`, of which every one was tried; one at which nothing finished has no values there.

    A seed with a value that is not finite has not finished: it diverged. `seeds` are those that should be there.
    """
    rates, swept = sorted(by_rate), []
    for rate in rates:
        diverged = {seed for (seed, _), value in by_rate[rate].items() if not math.isfinite(value)}
        values = {(seed, episode): value for (seed, episode), value in by_rate[rate].items() if seed not in diverged}
        finished = {seed for seed, _ in values}
        swept.append(
            SweptRate(
                learning_rate=rate,
                mean=mean_over_seeds(values),
                num_seeds=len(finished),
                every_seed=bool(finished) and finished >= seeds,
            )
        )
    best = _best(swept, better)
    edge: Literal["", "smallest", "largest"] = ""
    if best is not None and len(rates) > 1:
        edge = "smallest" if best == rates[0] else "largest" if best == rates[-1] else ""
    return Choice(arm=arm, best=best, swept=tuple(swept), at_edge=edge, warnings=tuple(_warnings(arm, swept, best, edge, len(seeds))))


def mean_over_seeds(values: Values) -> float | None:
    """The mean of `seed_means`; None of nothing."""
    means = seed_means(values)
    return math.fsum(means) / len(means) if means else None


def seed_means(values: Values) -> list[float]:
    """Each seed's mean over its episodes, seeds in order."""
    by_seed: dict[int, list[float]] = {}
    for (seed, _), value in sorted(values.items()):
        by_seed.setdefault(seed, []).append(value)
    return [math.fsum(found) / len(found) for found in by_seed.values()]


def _best(swept: Sequence[SweptRate], better: str) -> float | None:
    known = [(one, one.mean) for one in swept if one.mean is not None]
    most = max((one.num_seeds for one, _ in known), default=0)
    eligible = [(one, mean) for one, mean in known if one.every_seed] or [(one, mean) for one, mean in known if one.num_seeds == most]
    sign = 1 if better == "lower" else -1
    return min(eligible, key=lambda pair: (sign * pair[1], pair[0].learning_rate))[0].learning_rate if eligible else None


def _warnings(arm: str, swept: Sequence[SweptRate], best: float | None, edge: str, num_seeds: int) -> list[str]:
    if best is None:
        return [f"{arm}: no run finished, so there is nothing to compare."]
    found = []
    if edge:
        beyond = "smaller" if edge == "smallest" else "larger"
        found.append(f"{arm}: the best learning rate, {best:g}, is the {edge} of the sweep; widen it by {beyond} rates.")
    if len(swept) == 1:
        found.append(f"{arm}: one learning rate only, {best:g}: it was not tuned.")
    if lacking := [one for one in swept if not one.every_seed]:
        told = ", ".join(f"{one.learning_rate:g} ({one.num_seeds} of {num_seeds})" for one in lacking)
        chosen = "" if len(lacking) < len(swept) else "; it was chosen among those of which most did"
        found.append(f"{arm}: not every seed finished at learning rate {told}{chosen}.")
    return found
