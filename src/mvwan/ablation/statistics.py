"""Measurements of many runs -> which learning rate each arm is compared at, paired differences from a reference arm, and verdicts.

An arm is a setting of every factor but the learning rate. Each arm gets its best rate on validation data; test data then decide once.
Knows no run, no file and no page.
"""

import itertools
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from mvwan.ablation.intervals import bootstrap_interval, holm, paired
from mvwan.ablation.rates import Choice, Values, choose, mean_over_seeds, seed_means
from mvwan.errors import MvwanError, nearest, some

LEVEL = 0.95
"""Of every interval; what is left of it is the chance that any verdict of a comparison is wrong where nothing differs."""

Verdict = Literal["better", "worse", "no difference shown", "not measured"]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One outcome of one run on one episode."""

    arm: str
    """Its name, the same for all its rates and seeds."""
    learning_rate: float
    seed: int
    split: Literal["validation", "test"]
    episode: str
    """The held-out episode; empty for what is measured of a run as a whole, such as seconds per step."""
    outcome: str
    """A name of the comparison's outcomes, with `@low-high` behind it for a band of sigma: `heat_loss@0.8-1.0`."""
    value: float
    """Mean over the episode's windows, in the outcome's unit. NaN and infinity mean that there is none."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What is measured, and what of it is good."""

    better: Literal["lower", "higher"] = "lower"
    unit: str = ""
    primary: bool = False
    """Gets a verdict, and counts when verdicts are corrected for being several. Few of them show more. Others are described only."""
    label: str = ""
    """For people; empty: the outcome's name."""


@dataclass(frozen=True, kw_only=True)
class ArmMean:
    """An outcome of an arm at its best rate, on test data."""

    arm: str
    outcome: str
    mean: float
    """Mean over seeds of each seed's mean over episodes."""
    deviation: float | None
    """Standard deviation of those over seeds; None with one seed."""
    num_seeds: int
    num_episodes: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """An arm less the reference, each at its best rate, over the pairs of one seed and one episode that both measured.

    Numbers are None where the pairs do not allow them. Bounds are those of `Paired.interval`, but for `bootstrap_*`.
    """

    arm: str
    outcome: str
    verdict: Verdict | None
    """None of an outcome that is described only. `better` or `worse` needs `p_corrected` up to 0.05 and a bootstrap interval without 0."""
    mean: float | None
    reference_mean: float | None
    """Of the reference, over the same pairs."""
    low: float | None
    high: float | None
    together_low: float | None
    """Bounds at the level at which those of all verdicts hold their true means together (Bonferroni); Holm decides a little more."""
    together_high: float | None
    bootstrap_low: float | None
    bootstrap_high: float | None
    effect_size: float | None
    """Mean difference in standard deviations over seeds (`ablation.intervals.effect_size`), signed as the difference."""
    share_better: float | None
    """In 0..1: the share of pairs in which the arm is better; of equals half."""
    p: float | None
    p_corrected: float | None
    """By Holm, over all arms and primary outcomes."""
    num_seeds: int
    num_episodes: int
    num_pairs: int
    num_dropped: int
    """Pairs that only one of the two arms measured."""
    notes: tuple[str, ...]
    """Sentences on what the numbers do not say."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare` found."""

    reference: str
    arms: tuple[str, ...]
    outcomes: Mapping[str, Outcome]
    of_runs: tuple[str, ...]
    """Outcomes of runs as wholes: what an arm costs."""
    select_by: str
    num_seeds: int
    """Of the comparison: seeds of any of its measurements."""
    num_verdicts: int
    """For how many p is corrected: primary outcomes times arms beside the reference."""
    bootstrap_samples: int
    seed: int
    choices: tuple[Choice, ...]
    means: tuple[ArmMean, ...]
    differences: tuple[Difference, ...]

    @property
    def others(self) -> tuple[str, ...]:
        """The arms beside the reference."""
        return tuple(arm for arm in self.arms if arm != self.reference)

    @property
    def primary(self) -> tuple[str, ...]:
        """Names of the outcomes with verdicts."""
        return tuple(name for name, outcome in self.outcomes.items() if outcome.primary)

    def choice(self, arm: str) -> Choice:
        return next(choice for choice in self.choices if choice.arm == arm)

    def mean(self, arm: str, outcome: str) -> ArmMean | None:
        """None where the arm was not measured."""
        return next((mean for mean in self.means if (mean.arm, mean.outcome) == (arm, outcome)), None)

    def difference(self, arm: str, outcome: str) -> Difference | None:
        """None for the reference."""
        return next((found for found in self.differences if (found.arm, found.outcome) == (arm, outcome)), None)

    def label(self, outcome: str) -> str:
        """The outcome for people, with its unit: `Peak error, px`."""
        told = self.outcomes[outcome]
        return f"{told.label or outcome}, {told.unit}" if told.unit else told.label or outcome

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, none of them NaN."""
        plain = asdict(self) | {"outcomes": {name: asdict(outcome) for name, outcome in self.outcomes.items()}}
        return {name: [*value] if isinstance(value, tuple) else value for name, value in plain.items()}


def compare(
    measurements: Sequence[Measurement],
    arms: Sequence[str],
    reference: str,
    outcomes: Mapping[str, Outcome],
    select_by: str,
    bootstrap_samples: int = 10_000,
    seed: int = 0,
    swept: Sequence[float] = (),
) -> Comparison:
    """What the measurements say of each arm against `reference`, each at its best learning rate; their order does not matter.

    `select_by` is the outcome by which, on validation data, an arm's rate is chosen; `swept` are the rates that were asked for, so that one
    at which every run failed still counts as tried. Measurements of outcomes that are not in `outcomes` are not looked at. Raises
    `MvwanError` for names that are unknown or twice, and for one thing measured twice.
    """
    _check(measurements, arms, reference, outcomes, select_by, bootstrap_samples)
    table = _table(measurements)
    seeds = {row.seed for row in measurements}
    choices = {}
    for arm in arms:
        rates = {row.learning_rate for row in measurements if row.arm == arm} | set(swept)
        by_rate = {rate: table.get((arm, rate, "validation", select_by), {}) for rate in rates}
        choices[arm] = choose(arm, by_rate, seeds, outcomes[select_by].better)
    tested: dict[tuple[str, str], Values] = {}
    for arm, name in itertools.product(arms, outcomes):
        best = choices[arm].best
        tested[arm, name] = {} if best is None else _finite(table.get((arm, best, "test", name), {}))
    others = [arm for arm in arms if arm != reference]
    num_verdicts = len(others) * sum(outcome.primary for outcome in outcomes.values())
    differences = [
        _difference(
            arm,
            name,
            outcome,
            tested[arm, name],
            tested[reference, name],
            num_verdicts,
            bootstrap_samples,
            np.random.default_rng([seed, zlib.crc32(f"{arm}\n{name}".encode())]),
        )
        for name, outcome in outcomes.items()
        for arm in others
    ]
    return Comparison(
        reference=reference,
        arms=tuple(arms),
        outcomes=dict(outcomes),
        of_runs=_of_runs(measurements, outcomes),
        select_by=select_by,
        num_seeds=len(seeds),
        num_verdicts=num_verdicts,
        bootstrap_samples=bootstrap_samples,
        seed=seed,
        choices=tuple(choices.values()),
        means=tuple(_arm_mean(*names, values) for names, values in tested.items() if values),
        differences=tuple(_with_verdicts(differences, outcomes)),
    )


def _check(
    measurements: Sequence[Measurement],
    arms: Sequence[str],
    reference: str,
    outcomes: Mapping[str, Outcome],
    select_by: str,
    bootstrap_samples: int,
) -> None:
    if len(set(arms)) < len(arms):
        raise MvwanError(
            f"compare: arms {some(sorted({arm for arm in arms if list(arms).count(arm) > 1}))} are given twice; name each once"
        )
    if reference not in arms:
        raise MvwanError(f"compare: the reference {reference!r} is none of the arms {some(arms, 8)}.{nearest(reference, arms)}")
    if select_by not in outcomes:
        raise MvwanError(f"compare: select_by={select_by!r} is none of the outcomes {some(outcomes, 8)}.{nearest(select_by, outcomes)}")
    if bootstrap_samples < 100:
        raise MvwanError(f"compare: bootstrap_samples={bootstrap_samples}; 95 % intervals need 100 or more, 10000 is usual")
    if strangers := sorted({row.arm for row in measurements} - set(arms)):
        raise MvwanError(f"compare: measurements of {some(strangers)}, which is none of the arms {some(arms, 8)}; give its name among arms")


def _table(measurements: Sequence[Measurement]) -> dict[tuple[str, float, str, str], dict[tuple[int, str], float]]:
    """(arm, rate, split, outcome) -> (seed, episode) -> value."""
    table: dict[tuple[str, float, str, str], dict[tuple[int, str], float]] = {}
    for row in measurements:
        values = table.setdefault((row.arm, row.learning_rate, row.split, row.outcome), {})
        if (row.seed, row.episode) in values:
            where = f"arm {row.arm}, learning rate {row.learning_rate:g}, seed {row.seed}, {row.split} episode {row.episode!r}"
            raise MvwanError(f"compare: {row.outcome} is there twice for {where}; keep one of the two")
        values[row.seed, row.episode] = row.value
    return table


def _finite(values: Values) -> Values:
    return {pair: value for pair, value in values.items() if math.isfinite(value)}


def _of_runs(measurements: Sequence[Measurement], outcomes: Mapping[str, Outcome]) -> tuple[str, ...]:
    of_episodes = {row.outcome for row in measurements if row.episode}
    return tuple(name for name in outcomes if name not in of_episodes and any(row.outcome == name for row in measurements))


# ── differences ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _arm_mean(arm: str, outcome: str, values: Values) -> ArmMean:
    by_seed = seed_means(values)
    return ArmMean(
        arm=arm,
        outcome=outcome,
        mean=math.fsum(by_seed) / len(by_seed),
        deviation=float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None,
        num_seeds=len(by_seed),
        num_episodes=len({episode for _, episode in values}),
    )


def _difference(
    arm: str,
    name: str,
    outcome: Outcome,
    values: Values,
    against: Values,
    num_verdicts: int,
    samples: int,
    rng: np.random.Generator,
) -> Difference:
    pairs = sorted(set(values) & set(against))
    seeds, episodes = sorted({seed for seed, _ in pairs}), sorted({episode for _, episode in pairs})
    table = np.full((len(seeds), len(episodes)), np.nan)
    for seed, episode in pairs:
        table[seeds.index(seed), episodes.index(episode)] = values[seed, episode] - against[seed, episode]
    found = paired(table)
    low, high = found.interval(LEVEL)
    together = found.interval(1 - (1 - LEVEL) / num_verdicts) if outcome.primary else (math.nan, math.nan)
    drawn = bootstrap_interval(table, samples, rng, LEVEL)
    gains = np.array([values[pair] - against[pair] for pair in pairs]) * (-1 if outcome.better == "lower" else 1)
    dropped = len(set(values) | set(against)) - len(pairs)
    return Difference(
        arm=arm,
        outcome=name,
        verdict=None,
        mean=_known(found.mean),
        reference_mean=mean_over_seeds({pair: against[pair] for pair in pairs}),
        low=_known(low),
        high=_known(high),
        together_low=_known(together[0]),
        together_high=_known(together[1]),
        bootstrap_low=_known(drawn[0]),
        bootstrap_high=_known(drawn[1]),
        effect_size=_known(found.effect_size),
        share_better=float(np.mean((gains > 0) + 0.5 * (gains == 0))) if pairs else None,
        p=_known(found.p) if outcome.primary else None,
        p_corrected=None,
        num_seeds=found.num_seeds,
        num_episodes=found.num_episodes,
        num_pairs=found.num_pairs,
        num_dropped=dropped,
        notes=tuple(_notes(found.num_seeds, found.num_episodes, dropped, outcome.primary and found.same_everywhere, episodes == [""])),
    )


def _notes(num_seeds: int, num_episodes: int, dropped: int, same: bool, of_runs: bool) -> list[str]:
    if not num_seeds:
        return ["No seed and episode were measured in both arms."]
    notes = []
    if num_seeds == 1:
        notes.append("One seed: the interval speaks of other episodes, not of other seeds, so there is no verdict.")
    elif num_episodes == 1 and not of_runs:
        notes.append("One episode: the interval speaks of other seeds, not of other episodes.")
    if same and num_seeds > 1:
        notes.append("All pairs differ by the same: there is no spread to make an interval of, and p is that of sign flips over seeds.")
    if dropped:
        pairs = "pair of seed and episode was" if dropped == 1 else "pairs of seed and episode were"
        notes.append(f"{dropped} {pairs} measured in one of the arms only, and left out.")
    return notes


def _with_verdicts(differences: Sequence[Difference], outcomes: Mapping[str, Outcome]) -> list[Difference]:
    """The same with corrected p and verdicts; what could not be tested counts as p = 1."""
    tested = [found for found in differences if outcomes[found.outcome].primary]
    corrected = holm([1.0 if found.p is None else found.p for found in tested])
    by_place = {(found.arm, found.outcome): p for found, p in zip(tested, corrected, strict=True)}
    return [_judged(found, outcomes[found.outcome], by_place.get((found.arm, found.outcome))) for found in differences]


def _judged(found: Difference, outcome: Outcome, p: float | None) -> Difference:
    if p is None:
        return found
    verdict: Verdict = "no difference shown"
    if found.mean is None:
        verdict = "not measured"
    elif p <= 1 - LEVEL + 1e-12 and _away_from_zero(found.bootstrap_low, found.bootstrap_high):
        verdict = "better" if (found.mean < 0) == (outcome.better == "lower") else "worse"
    return replace(found, verdict=verdict, p_corrected=None if found.p is None else p)


def _away_from_zero(low: float | None, high: float | None) -> bool:
    return low is not None and high is not None and (low > 0 or high < 0)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
