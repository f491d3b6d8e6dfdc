"""The grid of an ablation: factors to arms, a file and back, what may not be varied. Runs nothing."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mvwan.ablation.grid import Grid, differences, grid_from_dict, parse_factors, read_grid
from mvwan.cli_settings import parse_rates
from mvwan.errors import MvwanError

SWITCH = {"unfreeze_modulation_and_norms": [False, True]}
MODULATION_ALONE = {"trainable": {"groups": {"modulation": {"mode": "full"}}}}


def test_every_combination_is_an_arm_and_the_first_values_are_the_reference(tmp_path: Path) -> None:
    grid = Grid(preset="debug", vary={**SWITCH, "trainable.lora.ffn": [True, False]}, learning_rates=(1e-3, 3e-3), seeds=2)
    assert [arm.name for arm in grid.all_arms] == [
        "unfreeze_modulation_and_norms=false, ffn=true",
        "unfreeze_modulation_and_norms=false, ffn=false",
        "unfreeze_modulation_and_norms=true, ffn=true",
        "unfreeze_modulation_and_norms=true, ffn=false",
    ]
    assert grid.reference == "unfreeze_modulation_and_norms=false, ffn=true"
    runs = grid.runs(tmp_path)
    assert len(runs) == len({run.folder for run in runs}) == 16
    assert [run.seed for run in runs] == [0] * 8 + [1] * 8, "a grid that is cut off has whole pairs"
    last = runs[-1].config
    assert (last.seed, last.train.learning_rate, last.unfreeze_modulation_and_norms, last.trainable.lora.ffn) == (1, 3e-3, True, False)
    assert {run.config.data.cache for run in runs} == {str(tmp_path / "latents")}


def test_a_factor_is_a_yaml_list_without_its_brackets() -> None:
    given = ["trainable.lora.alpha=null,16", "trainable.groups={},{modulation: {mode: full}}"]
    assert parse_factors(given) == {
        "trainable.lora.alpha": [None, 16],
        "trainable.groups": [{}, {"modulation": {"mode": "full"}}],
    }
    grid = Grid(preset="debug", vary=parse_factors(given))
    assert grid.all_arms[-1].name == "alpha=16, groups={modulation: {mode: full}}"
    assert grid.config(grid.all_arms[-1], 1e-3, 0).trainable.groups["modulation"].mode == "full"


def test_arms_of_their_own_stand_beside_factors(tmp_path: Path) -> None:
    both = Grid(preset="debug", vary=SWITCH, arms={"modulation alone": MODULATION_ALONE})
    assert [arm.name for arm in both.all_arms][1:] == ["unfreeze_modulation_and_norms=true", "modulation alone"]
    alone = Grid(
        preset="debug", arms={"nothing more": {}, "modulation alone!": MODULATION_ALONE, "modulation alone?": {"train": {"steps": 3}}}
    )
    assert alone.reference == "nothing more"
    names = [run.folder.parts[-3] for run in alone.runs(tmp_path)[:3]]
    assert names[0] == "nothing-more" and len(set(names)) == 3, names


def test_a_seed_may_go_on_from_its_own_pretraining(tmp_path: Path) -> None:
    place = "runs/first/lr-0.001/seed-{seed}/checkpoints/{newest}"
    grid = Grid(
        preset="debug",
        settings={"train": {"from_checkpoint": place}},
        vary=SWITCH,
        arms={"stock": {"train": {"from_checkpoint": None}}},
        seeds=2,
    )
    starts = [(run.seed, run.config.train.from_checkpoint) for run in grid.runs(tmp_path)]
    own = [(seed, place.replace("{seed}", str(seed))) for seed in (0, 1)]
    assert starts == [own[0], own[0], (0, None), own[1], own[1], (1, None)]
    assert [grid.start(arm) for arm in grid.all_arms] == [place, place, None]


def test_a_grid_comes_back_from_its_file(tmp_path: Path) -> None:
    grid = Grid(
        preset="debug",
        settings={"data": {"root": "data/drawer"}},
        vary={"trainable.lora.alpha": [None, 8]},
        arms={"modulation alone": MODULATION_ALONE},
        learning_rates=(1e-3, 3e-3),
        seeds=5,
        test_dataset="data/more",
        trials=2,
        tasks=("drawer-open-v3",),
    )
    (tmp_path / "grid.yaml").write_text(grid.to_yaml())
    again = read_grid(tmp_path / "grid.yaml")
    assert again == grid and not differences(again, grid)
    assert [run.config for run in again.runs(tmp_path)] == [run.config for run in grid.runs(tmp_path)]


def test_differences_name_the_setting_and_both_values() -> None:
    one = Grid(preset="debug", vary=SWITCH, settings={"train": {"steps": 2}})
    other = Grid(preset="debug", vary=SWITCH, settings={"train": {"steps": 3}}, seeds=5)
    assert differences(one, other) == ["seeds: 3 before, 5 now", "train.steps: 2 before, 3 now"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vary": {"seed": [0, 1]}}, "--vary seed: --seeds decides it"),
        ({"vary": {"train.learning_rate": [1, 2]}}, "--vary train.learning_rate: it is swept"),
        ({"vary": {"data.root": ["a", "b"]}}, "--vary data.root: arms are compared on the same demonstrations"),
        ({"vary": {"data.num_frames": [5, 9]}}, "no pairs to compare"),
        ({"vary": {"data": [{"num_frames": 5}, {"num_frames": 9}]}}, "no pairs to compare"),
        ({"vary": {"data.trail.size_px": [64, 128]}}, "no pairs to compare"),
        ({"vary": {"base.source": ["tiny", "other"]}}, "compared on one base"),
        ({"vary": {"train": [{}, {"steps": 3}]}}, "it is swept"),
        ({"vary": {"train.ema_decay": [0.0, 0.99]}}, "the last weights, not their average"),
        ({"vary": SWITCH, "tasks": ["drawer-open"]}, "Give --trials"),
        ({"vary": SWITCH, "execute": 4}, "Give --trials"),
        ({"vary": SWITCH, "settings": {"seed": 3}}, "--set seed: --seeds decides it"),
        ({"arms": {"a": {}, "b": {"model": {"views": 2}}}}, "arms: b: model.views"),
        ({"vary": {"unfreeze_modulation_and_norms": [True]}}, "nothing to compare"),
        ({}, "0 arm: nothing to compare"),
        ({"vary": {"train.weight_decay": [0, 0.0]}}, "have the same settings"),
        ({"vary": {"train.weight_decai": [0, 1]}}, "no field 'train.weight_decai'"),
        ({"vary": SWITCH, "arms": {"unfreeze_modulation_and_norms=true": {}}}, "is there twice"),
        ({"vary": SWITCH, "learning_rates": [1e-3, 0.001]}, "given once"),
        ({"vary": SWITCH, "learning_rates": [-1]}, "above 0"),
        ({"vary": SWITCH, "seeds": 0}, "--seeds 0: must be at least 1"),
        ({"vary": SWITCH, "seeds": "many"}, "seeds='many'"),
        ({"vry": SWITCH}, "Did you mean 'vary'?"),
    ],
)
def test_what_cannot_be_compared_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(MvwanError) as error:
        grid_from_dict({"preset": "debug", **values}, "my grid")
    assert message in str(error.value) and str(error.value).startswith("my grid: ")


@pytest.mark.parametrize("words", ["seeds", "=1,2", "train.steps=[", "train.steps=1,2\x00"])
def test_factors_that_are_none_are_refused(words: str) -> None:
    with pytest.raises(MvwanError, match="--vary"):
        parse_factors([words])


def test_a_factor_is_given_once_and_rates_are_numbers() -> None:
    with pytest.raises(MvwanError, match="given twice"):
        parse_factors(["train.steps=1,2", "train.steps=3"])
    assert parse_rates("1e-3,0.01") == (1e-3, 0.01)
    with pytest.raises(MvwanError, match="--learning-rates 1e-3;2"):
        parse_rates("1e-3;2")


def test_a_rate_that_yaml_takes_for_a_text_is_a_number() -> None:
    grid = grid_from_dict(
        yaml.safe_load("{preset: debug, vary: {unfreeze_modulation_and_norms: [false, true]}, learning_rates: [1e-3]}"), "x"
    )
    assert grid.rates == (0.001,)
    assert Grid(preset="tiny-finetune", vary=SWITCH).rates == (2e-3,), "not given: that of the settings"


@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "configs" / "ablation").glob("*.yaml")), ids=lambda path: path.name)
def test_grids_that_ship_are_grids_and_say_how_they_are_run(path: Path) -> None:
    grid = read_grid(path)
    arms = {"switch.yaml": 4, "parts.yaml": 4, "pretraining.yaml": 2, "two-stage.yaml": 4, "suggestion.yaml": 3}
    assert len(grid.all_arms) == arms[path.name] and grid.seeds == 3 and grid.test_dataset is not None
    assert f"mvwan ablate --grid configs/ablation/{path.name}" in path.read_text(encoding="utf-8")
