"""Paired differences of seeds and episodes -> intervals, p and effect size that are honest at a handful of seeds; Holm's correction.

Knows no run, no arm and no outcome: a table of numbers `[S E]` comes in, seeds in rows and episodes in columns, NaN where a pair lacks.

Why not the usual: resampling three seeds makes intervals that are too short, because three seeds never show how much seeds can differ;
and exact sign flips over n seeds give no p below 2 / 2^n, 0.25 at three and 0.0625 at five, so that they could never decide anything
here. Student's t over seeds decides at three, at the price of assuming that seeds scatter about normally. And seeds and episodes both
count: every seed meets the same episodes, so that ten seeds on two easy episodes say little of a third. Hence `Paired.interval`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_NO_SPREAD = 1e-9
"""A standard error below this share of the mean is rounding."""


@dataclass(frozen=True, kw_only=True)
class Paired:
    """What a table of paired differences says of its mean. NaN where the table does not allow a number."""

    mean: float
    """Each seed's mean over its episodes, averaged over seeds."""
    variances: tuple[tuple[float, int], ...]
    """The variance of that mean over seeds and that over episodes, each with its degrees of freedom; those of which there are several."""
    effect_size: float
    """See `effect_size`."""
    num_seeds: int
    num_episodes: int
    num_pairs: int

    @property
    def standard_error(self) -> float:
        """Of the mean, if other seeds and other episodes had been drawn, as far as there are several of either."""
        return math.sqrt(sum(variance for variance, _ in self.variances)) if self.variances else math.nan

    @property
    def same_everywhere(self) -> bool:
        """Whether all pairs gave the same difference, so that there is no spread to reckon with."""
        return self.standard_error <= _NO_SPREAD * abs(self.mean)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Bounds that hold the true mean in at least a share `level` of experiments with as many other seeds and other episodes.

        The squared half width is the sum of t^2 times variance over seeds and over episodes, each t with its own degrees of freedom. What
        seeds and episodes share of the noise is counted twice, so that the interval is rather too long than too short; that it is never
        too short holds where seeds and episodes scatter normally. With one seed it speaks of episodes only, with one episode of seeds.
        Source: Banerjee, Approximate confidence interval for linear functions of means of k populations when the population variances
        are not equal, Sankhya 22 (1960); for adding the two variances: Clark, The language-as-fixed-effect fallacy, J. Verbal Learning
        and Verbal Behavior 12 (1973), min F'.
        """
        half = self._half_width(1 - level)
        return self.mean - half, self.mean + half

    @property
    def p(self) -> float:
        """One less the level of the interval that ends at zero: two-sided, of no difference. NaN with one seed.

        Where all pairs gave the same difference no interval can be made; then it is what sign flips over seeds give.
        """
        if self.num_seeds < 2:
            return math.nan
        if not self.mean:
            return 1.0
        if self.same_everywhere:
            return 2.0 ** (1 - self.num_seeds)
        from scipy.optimize import brentq

        def beyond(log_p: float) -> float:
            return self._half_width(math.exp(log_p)) - abs(self.mean)

        least, most = -60.0, -1e-6
        if beyond(least) <= 0:
            return math.exp(least)
        if beyond(most) >= 0:
            return 1.0
        return math.exp(brentq(beyond, least, most, xtol=1e-10))  # pyright: ignore[reportArgumentType] - without full_output, a float

    def _half_width(self, tails: float) -> float:
        squares = [variance * t_quantile(tails, free) ** 2 for variance, free in self.variances if variance]
        return math.sqrt(sum(squares)) if self.variances else math.nan


def paired(differences: np.ndarray) -> Paired:
    """What differences `[S E]` say; seeds and episodes without any pair do not count."""
    differences = _known(differences)
    num_seeds, num_episodes = differences.shape
    if not differences.size:
        return Paired(mean=math.nan, variances=(), effect_size=math.nan, num_seeds=0, num_episodes=0, num_pairs=0)
    seed_means, episode_means = np.nanmean(differences, axis=1), np.nanmean(differences, axis=0)
    return Paired(
        mean=float(seed_means.mean()),
        variances=tuple(_variance_of_mean(means) for means in (seed_means, episode_means) if len(means) > 1),
        effect_size=effect_size(seed_means),
        num_seeds=num_seeds,
        num_episodes=num_episodes,
        num_pairs=int(np.isfinite(differences).sum()),
    )


def effect_size(seed_means: np.ndarray) -> float:
    """Mean of the paired differences `[S]` in their own standard deviations, freed of its bias at few seeds; NaN of fewer than two.

    The sign is that of the difference. Dividing by how far seeds scatter, it says how sure a single pair of runs shows the difference,
    not how much the difference matters: that is what the difference in its own unit says.
    Source: Cohen, Statistical Power Analysis (1988), d_z of 2.3.5; Hedges, Distribution theory for Glass's estimator, J. Educational
    Statistics 6 (1981), the factor of equation 6e in its usual approximation.
    """
    free = len(seed_means) - 1
    scatter = float(np.std(seed_means, ddof=1)) if free > 0 else 0.0
    if scatter <= _NO_SPREAD * abs(float(seed_means.mean())):
        return math.nan
    return (1 - 3 / (4 * free - 1)) * float(seed_means.mean()) / scatter


def bootstrap_interval(differences: np.ndarray, samples: int, rng: np.random.Generator, level: float = 0.95) -> tuple[float, float]:
    """Percentiles of the mean of differences `[S E]` over `samples` draws of seeds and, on their own, of episodes; NaN without a pair.

    Episodes are drawn once for all seeds, not anew within each: they are the same episodes, and drawing them apart would average away
    what is peculiar to one. At few seeds it is too short all the same, so it stands beside `Paired.interval` and decides nothing alone.
    Source: Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1 (2007).
    """
    differences = _known(differences)
    if not differences.size:
        return math.nan, math.nan
    there = np.isfinite(differences)
    seeds, episodes = (rng.multinomial(size, np.full(size, 1 / size), samples).astype(np.float64) for size in differences.shape)
    counts = episodes @ there.T
    sums = episodes @ np.where(there, differences, 0.0).T
    means = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
    weights = seeds * (counts > 0)
    drawn = weights.sum(axis=1) > 0
    of_draws = (weights * means)[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
    low, high = np.quantile(of_draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def holm(p: Sequence[float]) -> list[float]:
    """Each p corrected for there being several: rejecting those up to 0.05 is wrong anywhere in at most 5 % of experiments.

    Source: Holm, A simple sequentially rejective multiple test procedure, Scandinavian J. Statistics 6 (1979).
    """
    corrected, largest = [1.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=lambda place: p[place])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[place]))
        corrected[place] = largest
    return corrected


@lru_cache(maxsize=1 << 16)
def t_quantile(tails: float, degrees_of_freedom: int) -> float:
    """The value beyond which Student's t lies, in either direction together, with the chance `tails` above 0 and up to 1."""
    from scipy.stats import t

    return float(t.isf(tails / 2, degrees_of_freedom))


def _known(differences: np.ndarray) -> np.ndarray:
    """The table without rows and columns that hold no number."""
    assert differences.ndim == 2, f"differences of shape {differences.shape}; [seeds episodes] is meant"
    there = np.isfinite(differences)
    return np.where(there, differences, np.nan)[there.any(axis=1)][:, there.any(axis=0)]


def _variance_of_mean(means: np.ndarray) -> tuple[float, int]:
    """The variance of the mean of `means`, and its degrees of freedom."""
    return float(np.var(means, ddof=1)) / len(means), len(means) - 1
