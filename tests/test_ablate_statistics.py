"""A planted effect gets its verdict and nothing gets none; arms are compared at their best rates, on pairs, and what lacks is counted."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mvwan.ablation.statistics import Comparison, Measurement, Outcome, compare
from mvwan.errors import MvwanError

OUTCOMES = {"loss": Outcome(primary=True), "psnr": Outcome(better="higher", unit="dB", primary=True), "seconds": Outcome(unit="s")}
ARMS = ("off", "on", "ffn")


def experiment(
    effects: Mapping[tuple[str, str], float],
    seed: int,
    num_seeds: int = 5,
    num_episodes: int = 6,
    rates: Mapping[float, float] | None = None,
) -> list[Measurement]:
    """Runs of all arms. Runs and episodes differ by far more than arms, which scatter by 0.3 over seeds, 0.2 over episodes and 0.2 each.

    `effects` are added to (arm, outcome); `rates` maps learning rates to what they add to every loss.
    """
    draw = np.random.default_rng(seed)
    rows = []
    for outcome in ("loss", "psnr"):
        common = draw.normal(20, 5, (num_seeds, num_episodes))
        for arm in ARMS:
            parts = ((0.3, (num_seeds, 1)), (0.2, (1, num_episodes)), (0.2, (num_seeds, num_episodes)))
            values = (
                common + sum(spread / math.sqrt(2) * draw.normal(size=shape) for spread, shape in parts) + effects.get((arm, outcome), 0)
            )
            for rate, added in (rates or {1e-4: 0.0}).items():
                for place, value in np.ndenumerate(values):
                    told = {"arm": arm, "learning_rate": rate, "seed": place[0], "outcome": outcome, "value": float(value + added)}
                    rows += [Measurement(**told, split=split, episode=f"{split}/{place[1]}") for split in ("validation", "test")]
    return rows


def judged(rows: Sequence[Measurement], **more: Any) -> Comparison:
    return compare(rows, ARMS, "off", OUTCOMES, "loss", **({"bootstrap_samples": 400} | more))


def verdicts(found: Comparison) -> dict[tuple[str, str], str | None]:
    return {(one.arm, one.outcome): one.verdict for one in found.differences}


def test_a_planted_effect_is_found_and_its_sign_is_right() -> None:
    effects = {("on", "loss"): -2.5, ("on", "psnr"): -2.5, ("ffn", "psnr"): 2.5}
    found = [verdicts(judged(experiment(effects, seed))) for seed in range(20)]
    wanted = {("on", "loss"): "better", ("on", "psnr"): "worse", ("ffn", "psnr"): "better"}
    for place, verdict in wanted.items():
        assert sum(one[place] == verdict for one in found) >= 19, (place, verdict)
    assert sum(one["ffn", "loss"] == "no difference shown" for one in found) >= 19
    assert all(one["on", "seconds"] is None for one in found), "described only"


@pytest.mark.parametrize("num_seeds", [3, 5])
def test_where_nothing_differs_verdicts_are_rare(num_seeds: int) -> None:
    wrong = 0
    for seed in range(200):
        found = judged(experiment({}, seed, num_seeds, num_episodes=4), bootstrap_samples=200)
        wrong += any(verdict in ("better", "worse") for verdict in verdicts(found).values())
    assert wrong / 200 <= 0.05


def test_numbers_of_a_difference() -> None:
    rows = experiment({("on", "psnr"): 5.0}, 1)
    found = judged(rows).difference("on", "psnr")
    assert found is not None
    values = {(row.arm, row.seed, row.episode): row.value for row in rows if row.outcome == "psnr" and row.split == "test"}
    pairs = [value - values["off", seed, episode] for (arm, seed, episode), value in values.items() if arm == "on"]
    assert found.mean == pytest.approx(np.mean(pairs))
    assert found.reference_mean == pytest.approx(np.mean([value for (arm, _, _), value in values.items() if arm == "off"]))
    assert (found.num_seeds, found.num_episodes, found.num_pairs, found.num_dropped) == (5, 6, 30, 0)
    assert found.share_better == 1
    bounds = (found.together_low, found.low, found.bootstrap_low, found.mean, found.bootstrap_high, found.high, found.together_high)
    assert None not in bounds and list(bounds) == sorted(bounds, key=lambda bound: bound or 0), "the careful ones are outside"
    assert found.p is not None and found.p_corrected is not None and found.p < found.p_corrected <= 4 * found.p
    assert found.effect_size is not None and found.effect_size > 3


def test_the_order_of_rows_does_not_matter() -> None:
    rows = experiment({("on", "loss"): -1.0}, 3)
    assert judged(rows) == judged(rows[::-1]) == judged(sorted(rows, key=lambda row: row.value))


def test_other_arms_do_not_move_a_difference() -> None:
    rows = experiment({}, 3)
    alone = compare([row for row in rows if row.arm != "ffn"], ("off", "on"), "off", OUTCOMES, "loss", 400)
    both, one = judged(rows).difference("on", "loss"), alone.difference("on", "loss")
    assert both is not None and one is not None
    same = ("mean", "low", "high", "bootstrap_low", "bootstrap_high", "p")
    assert [getattr(both, name) for name in same] == [getattr(one, name) for name in same]


# ── learning rates ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_arm_gets_its_best_rate_on_validation_data() -> None:
    rows = experiment({}, 0, rates={1e-5: 1.0, 1e-4: 0.0, 1e-3: 2.0})
    # On test data the largest rate is the best by far, which nobody may look at.
    rows = [replace(row, value=row.value - 50) if row.split == "test" and row.learning_rate == 1e-3 else row for row in rows]
    rows = [replace(row, value=row.value - 5) if row.arm == "on" and row.learning_rate == 1e-5 else row for row in rows]
    found = judged(rows)
    assert {choice.arm: choice.best for choice in found.choices} == {"off": 1e-4, "on": 1e-5, "ffn": 1e-4}
    assert [one.learning_rate for one in found.choice("off").swept] == [1e-5, 1e-4, 1e-3]
    assert [found.choice(arm).at_edge for arm in ARMS] == ["", "smallest", ""]
    assert "widen it by smaller rates" in found.choice("on").warnings[0] and not found.choice("off").warnings
    difference = found.difference("on", "loss")
    assert difference is not None and difference.mean == pytest.approx(-4, abs=0.5), "1.0 - 5.0, at the rate of each"


def test_higher_may_be_better() -> None:
    rows = experiment({}, 0, rates={1e-5: 1.0, 1e-4: 0.0, 1e-3: 2.0})
    found = compare(rows, ARMS, "off", OUTCOMES, "psnr", 400)
    assert [choice.best for choice in found.choices] == [1e-3] * 3
    assert found.choice("off").at_edge == "largest"


def test_a_rate_at_which_a_seed_failed_is_not_chosen() -> None:
    rows = experiment({}, 0, rates={1e-5: 1.0, 1e-4: 0.5, 1e-3: 0.0})
    failed = [row for row in rows if not (row.learning_rate == 1e-3 and row.seed == 2)]
    found = judged(failed).choice("off")
    assert found.best == 1e-4 and not found.at_edge, "a larger one was tried"
    assert found.warnings == ("off: not every seed finished at learning rate 0.001 (4 of 5).",)
    diverged = [
        replace(row, value=math.nan) if (row.learning_rate, row.seed, row.episode) == (1e-3, 2, "validation/0") else row for row in rows
    ]
    assert judged(diverged).choice("off").best == 1e-4
    gone = [row for row in rows if row.learning_rate < 1e-3]
    assert judged(gone).choice("off").at_edge == "largest"
    assert not judged(gone, swept=(1e-5, 1e-4, 1e-3)).choice("off").at_edge, "all runs of the largest failed"


def test_with_no_whole_rate_the_one_with_most_seeds_is_taken() -> None:
    rows = experiment({}, 0, rates={1e-5: 0.0, 1e-4: 1.0})
    rows = [row for row in rows if row.arm != "on" or row.seed > {1e-5: 2, 1e-4: 0}[row.learning_rate]]
    found = judged(rows)
    assert found.choice("on").best == 1e-4
    assert "1e-05 (2 of 5), 0.0001 (4 of 5); it was chosen among those" in found.choice("on").warnings[1]
    difference = found.difference("on", "loss")
    assert difference is not None and (difference.num_seeds, difference.num_dropped) == (4, 6)


def test_one_rate_is_said_not_to_be_tuned() -> None:
    assert judged(experiment({}, 0)).choice("on").warnings == ("on: one learning rate only, 0.0001: it was not tuned.",)


# ── what lacks ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_unpaired_rows_are_dropped_and_counted() -> None:
    rows = experiment({}, 0)
    whole = judged(rows).difference("on", "loss")
    lost = {("on", 0, "test/1"): math.nan, ("off", 1, "test/2"): math.inf}
    rows = [
        replace(row, value=lost.get((row.arm, row.seed, row.episode), row.value)) if row.outcome == "loss" else row
        for row in rows
        if (row.arm, row.seed, row.episode) != ("on", 4, "test/3")
    ]
    found = judged(rows).difference("on", "loss")
    assert whole is not None and found is not None
    assert (found.num_pairs, found.num_dropped) == (27, 3) and found.mean != whole.mean
    assert found.notes == ("3 pairs of seed and episode were measured in one of the arms only, and left out.",)


def test_one_seed_gets_no_verdict() -> None:
    found = judged(experiment({("on", "loss"): -50.0}, 0, num_seeds=1)).difference("on", "loss")
    assert found is not None
    assert (found.verdict, found.p, found.p_corrected, found.effect_size) == ("no difference shown", None, None, None)
    assert found.high is not None and found.high < 0, "the interval over episodes"
    assert "One seed" in found.notes[0]


def test_one_episode_is_said() -> None:
    found = judged(experiment({}, 0, num_episodes=1)).difference("on", "loss")
    assert found is not None and found.notes == ("One episode: the interval speaks of other seeds, not of other episodes.",)


def test_equal_differences_everywhere_prove_nothing_at_three_seeds() -> None:
    rows = [
        Measurement(arm=arm, learning_rate=1e-4, seed=seed, split=split, episode=str(episode), outcome="loss", value=float(arm == "off"))
        for arm in ARMS
        for seed in range(3)
        for split in ("validation", "test")
        for episode in range(4)
    ]
    found = judged(rows).difference("on", "loss")
    assert found is not None and found.verdict == "no difference shown" and found.p == 0.25
    assert "sign flips" in found.notes[0]


def test_an_arm_without_a_run_is_not_measured_and_keeps_its_place_in_the_correction() -> None:
    rows = [row for row in experiment({("on", "loss"): -2.5}, 0) if row.arm != "ffn"]
    found = judged(rows)
    assert found.choice("ffn").best is None and "no run finished" in found.choice("ffn").warnings[0]
    assert verdicts(found)["ffn", "loss"] == "not measured" and found.mean("ffn", "loss") is None
    one = found.difference("on", "loss")
    assert one is not None and one.p is not None and one.p_corrected == pytest.approx(4 * one.p) and found.num_verdicts == 4


def test_what_is_measured_of_runs_has_intervals_and_no_verdict() -> None:
    rows = experiment({}, 0)
    for seed in range(5):
        for arm, added in (("off", 0.0), ("on", 1.0), ("ffn", 2.0)):
            told = {"arm": arm, "learning_rate": 1e-4, "seed": seed, "split": "test", "outcome": "seconds"}
            rows.append(Measurement(**told, episode="", value=3 + added + 0.1 * seed * (1 + added)))
    found = judged(rows)
    difference = found.difference("on", "seconds")
    assert found.of_runs == ("seconds",) and difference is not None
    assert (difference.verdict, difference.p, difference.together_low, difference.notes) == (None, None, None, ())
    assert difference.low is not None and difference.low > 0.9
    mean = found.mean("off", "seconds")
    assert mean is not None and (mean.num_seeds, mean.mean) == (5, pytest.approx(3.2))


def test_it_is_plain_json() -> None:
    rows = [row for row in experiment({}, 0, num_seeds=1) if row.arm != "ffn"]
    told = json.loads(json.dumps(judged(rows).to_json(), allow_nan=False))
    assert told["reference"] == "off" and told["outcomes"]["psnr"]["better"] == "higher"
    assert told["differences"][0]["arm"] == "on" and told["choices"][0]["swept"][0]["num_seeds"] == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"arms": ("off", "on", "on")}, "given twice"),
        ({"reference": "of"}, "none of the arms.*Did you mean 'off'"),
        ({"select_by": "los"}, "none of the outcomes.*Did you mean 'loss'"),
        ({"bootstrap_samples": 10}, "bootstrap_samples=10"),
        ({"arms": ("off", "on")}, "measurements of ffn"),
    ],
)
def test_what_was_given_is_checked(wrong: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {"arms": ARMS, "reference": "off", "outcomes": OUTCOMES, "select_by": "loss"}
    with pytest.raises(MvwanError, match=said):
        compare(experiment({}, 0), **(given | wrong))


def test_one_thing_measured_twice_is_refused() -> None:
    rows = experiment({}, 0)
    with pytest.raises(MvwanError, match=r"loss is there twice for arm off, learning rate 0.0001, seed 0, validation episode"):
        judged([*rows, rows[0]])
