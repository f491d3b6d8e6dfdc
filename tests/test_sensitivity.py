"""sensitivity: squared gradients against torch by hand, probes that move one group alone, a planted group that must win, and a suggestion
that fits its budget and trains. On the two-block base of the golden files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from mvwan import cli, flow, sensitivity, sensitivity_probes
from mvwan.batch import Batch
from mvwan.config import Config, GroupConfig, TrainConfig, config_from_dict, merge, read_yaml
from mvwan.errors import MvwanError
from mvwan.files import write_file
from mvwan.model.trainable import parameters_by_name
from mvwan.sensitivity import analyse, interval, make_plan
from mvwan.sensitivity_candidates import (
    BYTES_PER_PARAMETER,
    Budget,
    Candidate,
    Gain,
    budget_of,
    candidates_of,
    choose,
    load_module,
    suggested,
    trained_by,
)
from mvwan.sensitivity_probes import LINES, Options, held_out_losses, squared_gradients, train_shortly, training_only
from mvwan.sensitivity_report import figures, markdown, sentences
from mvwan.training_module import HeatmapWanTrainingModule
from tests.saved import save_run
from tests.test_training_module import make_batch

torch.set_num_threads(1)  # sizes are tiny: waking threads costs more than they do

EXACT = {"base": {"dtype": "float32"}, "train": {"precision": "no", "evaluate_windows": 4}}
QUICK = Options(batches=2, probe_steps=3, learning_rates=(1e-2,))


def config_of(values: dict[str, Any], *overrides: dict[str, Any]) -> Config:
    return config_from_dict(merge(values, EXACT, *overrides))


@pytest.fixture(scope="module")
def config(golden_run: dict[str, Any]) -> Config:
    return config_of(golden_run)


@pytest.fixture(scope="module")
def module(config: Config) -> HeatmapWanTrainingModule:
    return load_module(config).requires_grad_(False)


@pytest.fixture(scope="module")
def candidates(module: HeatmapWanTrainingModule, config: Config) -> dict[str, Candidate]:
    return {one.name: one for one in candidates_of(module, config)}


@pytest.fixture(scope="module")
def found(config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    output = tmp_path_factory.mktemp("sensitivity") / "found"
    return analyse(config, output, replace(QUICK, budget=30_000), progress=False), output


def values_of(module: HeatmapWanTrainingModule) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters_by_name(module.model).items()}


def moved(before: dict[str, torch.Tensor], module: HeatmapWanTrainingModule) -> set[str]:
    return {name for name, parameter in parameters_by_name(module.model).items() if not torch.equal(before[name], parameter)}


def batches(steps: int) -> list[list[Batch]]:
    return [[make_batch(1, frames=2, seed=step), make_batch(2, frames=2, seed=10 + step)] for step in range(steps)]


# ── gradients ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_squared_gradient_of_a_group_is_torch_s_own(module: HeatmapWanTrainingModule, candidates: dict[str, Candidate]) -> None:
    batch, names = make_batch(1, frames=2), candidates["modulation"].names
    squares = squared_gradients(module, names, [(batch, 5)])
    parameters = parameters_by_name(module.model)
    for name in names:
        parameters[name].requires_grad_(True)
    sums = module(batch, module.config.seed, 5)
    loss = flow.total_loss(sums, sums.rgb_count, sums.heat_count, module.config.train.rgb_weight)
    gradients = torch.autograd.grad(loss, [parameters[name] for name in names])
    module.requires_grad_(False)
    assert squares == pytest.approx({name: float(found.square().sum()) for name, found in zip(names, gradients, strict=True)}, rel=1e-5)
    assert all(squares.values())


def test_it_is_the_mean_over_windows_and_not_the_square_of_a_mean(
    module: HeatmapWanTrainingModule, candidates: dict[str, Candidate]
) -> None:
    windows, names = [(make_batch(1, frames=2, seed=seed), seed) for seed in range(2)], candidates["heads"].names
    both, alone = squared_gradients(module, names, windows), [squared_gradients(module, names, [window]) for window in windows]
    assert both == pytest.approx({name: (alone[0][name] + alone[1][name]) / 2 for name in names})
    with pytest.raises(AssertionError, match="several windows"):
        squared_gradients(module, names, [(make_batch(2, frames=2), 0)])


def test_what_lies_behind_a_zero_has_no_gradient_at_the_start(module: HeatmapWanTrainingModule, candidates: dict[str, Candidate]) -> None:
    every = [name for one in candidates.values() for name in one.names]
    squares = squared_gradients(module, every, [(make_batch(1, frames=2), 0)])
    dead = {one.name for one in candidates.values() if not any(squares[name] for name in one.names)}
    assert dead == {"lora_view_attention", "modulation_mvs", "mvs_norms"}
    adapters = {name: squares[name] for name in candidates["lora_ffn"].names}
    assert all((value > 0) == (".lora_B." in name) for name, value in adapters.items())


def test_a_broken_window_is_named(module: HeatmapWanTrainingModule, candidates: dict[str, Candidate]) -> None:
    batch = make_batch(1, frames=2)
    batch.rgb[0, 0, 0, 1, 0, 0] = torch.nan
    with pytest.raises(MvwanError, match="episode/0@0#0"):
        squared_gradients(module, candidates["heads"].names, [(batch, 0)])


# ── probes ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_only_the_probed_group_moves_and_then_nothing_has(module: HeatmapWanTrainingModule, candidates: dict[str, Candidate]) -> None:
    before = values_of(module)
    places = {name: parameter.data_ptr() for name, parameter in parameters_by_name(module.model).items()}
    for name in ("heads", "lora_self_attention", "backbone_norms", "mvs_norms"):
        names = candidates[name].names
        with training_only(module, names) as parameters:
            assert train_shortly(module, parameters, iter(batches(2)), 1e-2, {})
            expected = set() if name == "mvs_norms" else set(names)  # behind the projector, which is zero
            assert moved(before, module) == expected, name
        assert moved(before, module) == set()
        assert all(not parameter.requires_grad and parameter.grad is None for parameter in module.parameters())
    assert {name: parameter.data_ptr() for name, parameter in parameters_by_name(module.model).items()} == places


def test_all_is_put_back_after_an_error_too(module: HeatmapWanTrainingModule, candidates: dict[str, Candidate]) -> None:
    before = values_of(module)

    def fail() -> None:
        with training_only(module, candidates["heads"].names) as parameters:
            next(iter(parameters.values())).data.add_(1)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert moved(before, module) == set()


def test_frozen_bfloat16_trains_in_float32_and_comes_back(config: Config) -> None:
    narrow = load_module(replace(config, base=replace(config.base, dtype="bfloat16"))).requires_grad_(False)
    parameters = parameters_by_name(narrow.model)
    name = "blocks.0.attn1.to_q.base_layer.weight"
    assert parameters[name].dtype == torch.bfloat16
    with training_only(narrow, [name]) as held:
        assert held[name].dtype == torch.float32
    assert parameters[name].dtype == torch.bfloat16


def test_adapters_of_a_lower_rank_train_their_first_directions_alone(
    module: HeatmapWanTrainingModule, candidates: dict[str, Candidate]
) -> None:
    names, before = candidates["lora_cross_attention"].names, values_of(module)
    with training_only(module, names) as parameters:
        train_shortly(module, parameters, iter(batches(2)), 1e-2, dict.fromkeys(names, 1))
        for name, parameter in parameters.items():
            change = (parameter.detach() - before[name]).abs()
            change = change if ".lora_A." in name else change.T
            assert change[0].any(), name
            assert not change[1:].any(), name


def test_probes_are_paired_and_repeat_to_the_bit(module: HeatmapWanTrainingModule, candidates: dict[str, Candidate]) -> None:
    held_out = [make_batch(2, frames=2, seed=50)]
    results = []
    for _ in range(2):
        with training_only(module, candidates["heads"].names) as parameters:
            train_shortly(module, parameters, iter(batches(2)), 1e-2, {})
            results.append(held_out_losses(module, held_out))
    assert np.array_equal(results[0], results[1])
    assert (results[0] < held_out_losses(module, held_out)).all()


def test_the_loss_of_a_step_does_not_depend_on_its_micro_batches(
    module: HeatmapWanTrainingModule, candidates: dict[str, Candidate]
) -> None:
    whole = make_batch(2, frames=2)
    parts = [Batch(**{name: value[i : i + 1] for name, value in vars(whole).items() if value is not None}) for i in range(2)]
    ends = []
    for cut in ([whole], parts):
        with training_only(module, candidates["heads"].names) as parameters:
            train_shortly(module, parameters, iter([cut]), 1e-2, {})
            ends.append(torch.cat([parameter.detach().flatten() for parameter in parameters.values()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-5)


def test_a_probe_that_ends_in_nan_says_so(module: HeatmapWanTrainingModule, candidates: dict[str, Candidate]) -> None:
    with training_only(module, candidates["heads"].names) as parameters:
        assert not train_shortly(module, parameters, iter(batches(3)), 1e30, {})


# ── the whole ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_group_is_a_candidate_whether_it_trains_or_not(candidates: dict[str, Candidate], config: Config) -> None:
    assert list(candidates) == [
        *("lora_self_attention", "lora_cross_attention", "lora_ffn", "lora_view_attention", "patch_embedding", "heads", "projector"),
        *("modulation_mvs", "modulation", "mvs_norms", "backbone_norms", "biases", "text_embedding", "time_embedding"),
    ]
    names = [name for one in candidates.values() for name in one.names]
    assert len(names) == len(set(names))
    own = GroupConfig(pattern=r"blocks\.0\.norm2\..+", mode="full")
    more = replace(config, model=replace(config.model, action_head="gripper", view_code="camera"))
    more = replace(more, trainable=replace(config.trainable, groups={"mine": own}, lora=replace(config.trainable.lora, ffn=False)))
    assert {one.name for one in make_plan(more, QUICK).candidates} == {*candidates, "action_head", "camera_code", "mine"}


def test_what_is_found(found: tuple[dict[str, Any], Path], candidates: dict[str, Candidate]) -> None:
    result, output = found
    assert {path.name for path in output.iterdir()} == {"sensitivity.json", LINES, "suggestion.yaml"}
    rows = {row["name"]: row for row in result["candidates"]}
    assert rows.keys() == candidates.keys()
    ranks = [row["decrease_per_million"] for row in result["candidates"]]
    assert ranks == sorted(ranks, reverse=True)
    for row in rows.values():
        assert row["parameters"] == candidates[row["name"]].parameters
        assert row["interval"][0] <= row["decrease"] <= row["interval"][1]
        assert row["fisher"] == pytest.approx(sum(block["sum"] for block in row["fisher_by_block"].values()))
        behind = row["name"] in ("lora_view_attention", "modulation_mvs", "mvs_norms")
        assert (row["needs"] == "projector") == behind
        assert (row["live_parameters"] == 0) == behind
        assert ("equal_count" in row) == row["name"].startswith("lora_")
    assert rows["lora_ffn"]["equal_count"]["rank"] == 1
    assert rows["lora_ffn"]["equal_count"]["parameters"] * 4 == rows["lora_ffn"]["parameters"]
    assert rows["modulation"]["block_decrease"].keys() == {"0", "1"}
    assert [one["name"] for one in result["sets"]] == ["suggestion", "default", "switch"]
    assert {one["beside"] for one in result["comparisons"]} == {"default", "switch"}


def test_the_suggestion_fits_its_budget_by_the_table_and_trains(found: tuple[dict[str, Any], Path]) -> None:
    result, output = found
    suggestion = result["suggestion"]
    assert suggestion["groups"]
    config = config_from_dict(yaml.safe_load((output / "suggestion.yaml").read_text()))
    names, parameters = trained_by(config)
    assert parameters == suggestion["parameters"] == result["sets"][0]["parameters"] <= 30_000
    done = CliRunner().invoke(cli.app, ["train", "--config", str(output / "suggestion.yaml"), "--output", "unused", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert f"{parameters:,}" in done.stdout
    assert names


def test_a_killed_analysis_resumes_to_the_same_file(
    found: tuple[dict[str, Any], Path], config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, output = found
    lines = (output / LINES).read_text().splitlines(keepends=True)
    write_file(tmp_path / "again" / LINES, "".join(lines[:-4]) + lines[-4][:40])
    run, counted = sensitivity_probes.train_shortly, []
    monkeypatch.setattr(sensitivity_probes, "train_shortly", lambda *given: counted.append(1) or run(*given))
    analyse(config, tmp_path / "again", replace(QUICK, budget=30_000), progress=False)
    assert 1 <= len(counted) <= 4
    assert (tmp_path / "again" / "sensitivity.json").read_bytes() == (output / "sensitivity.json").read_bytes()
    assert (tmp_path / "again" / "suggestion.yaml").read_bytes() == (output / "suggestion.yaml").read_bytes()
    counted.clear()
    analyse(config, tmp_path / "again", replace(QUICK, budget=30_000), progress=False)
    assert not counted
    analyse(config, tmp_path / "again", replace(QUICK, budget=20_000), progress=False)
    assert len(counted) <= 1, "another budget measures the new list alone"


@pytest.mark.parametrize(
    "change",
    [
        {"base": {"quantize": "nf4"}},
        {"data": {"heatmap_sigma_px": 6.0}},
        {"train": {"heat_reader_weight": 100.0}},
    ],
    ids=str,
)
def test_what_depends_on_a_setting_is_measured_anew(
    config: Config, change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick, losses = replace(QUICK, probe_steps=1, batches=1), []
    monkeypatch.setattr(sensitivity_probes, "train_shortly", lambda *_: True)
    for settings in (config, config_from_dict(merge(config.to_dict(), change))):
        losses.append(analyse(settings, tmp_path / "one", quick, progress=False)["held_out_loss_at_start"])
    assert losses[0] != losses[1]


def test_a_group_of_the_switch_may_be_frozen_by_name(config: Config) -> None:
    frozen = config_from_dict(merge(config.to_dict(), {"trainable": {"groups": {"modulation": {"mode": "frozen"}}}}))
    assert make_plan(frozen, QUICK).beside == make_plan(config, QUICK).beside


@pytest.mark.parametrize("group", ["modulation", "heads"])
def test_a_planted_group_comes_first(config: Config, group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets are those of a model that differs in one group alone; what trains that group has to be found."""
    teacher = load_module(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for one in candidates_of(teacher, config):
        for name in one.names if one.name == group else ():
            tensor = parameters_by_name(teacher.model)[name].data
            tensor += 0.5 * tensor.std() * torch.randn(tensor.shape, generator=generator) + 0.02

    def losses(module: HeatmapWanTrainingModule, batch: Batch, step: int) -> torch.Tensor:
        noise = flow.draw_noise(0, step, batch.sample_ids, batch.latents.shape[1:])
        sigma = flow.sigma_per_frame(flow.draw_sigma(0, step, batch.sample_ids, config.flow), noise.shape[3], 1)
        noisy = flow.add_noise(batch.latents, noise, sigma)
        with torch.no_grad():
            target = teacher.model(noisy, flow.timestep(sigma), batch.text)
        return (module.model(noisy, flow.timestep(sigma), batch.text) - target).square().mean(dim=(1, 2, 3, 4, 5))

    monkeypatch.setattr(sensitivity_probes, "window_losses", losses)
    options = Options(batches=1, probe_steps=6, learning_rates=(1e-2,), budget=30_000)
    result = analyse(config, tmp_path / "planted", options, progress=False)
    by_decrease = sorted(result["candidates"], key=lambda row: -row["decrease"])
    assert by_decrease[0]["name"] == group, [(row["name"], row["decrease"]) for row in by_decrease[:4]]
    if group == "modulation":
        assert result["candidates"][0]["name"] == group, [(row["name"], row["decrease_per_million"]) for row in result["candidates"][:4]]
        assert result["suggestion"]["groups"][0] == group


# ── choosing ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def make_candidate(name: str, parameters: int, **more: Any) -> Candidate:
    return Candidate(name=name, group=name, mode="full", names=(name,), parameters=parameters, **more)


def test_choosing_takes_the_most_per_parameter_that_is_affordable() -> None:
    offered = [make_candidate("large", 80), make_candidate("small", 10), make_candidate("useless", 1), make_candidate("behind", 5)]
    offered.append(make_candidate("barred", 1, obstacle="why"))
    gains = {"large": Gain(decrease=4.0), "small": Gain(decrease=1.0), "useless": Gain(decrease=-1.0), "barred": Gain(decrease=9.0)}
    gains["behind"] = Gain(decrease=5.0, needs="large")

    def names(budget: int, forced: tuple[Candidate, ...] = ()) -> list[str]:
        return [one.name for one in choose(offered, gains, Budget(parameters=budget, given=""), forced)]

    assert names(1000) == ["small", "large", "behind"]
    assert names(90) == ["small", "large"]
    assert names(85) == ["small"], "greedy: what comes first is not given back"
    assert names(9) == []
    assert names(90, (offered[0],)) == ["large", "behind"]


def test_a_list_becomes_settings_that_train_it_and_nothing_else(config: Config) -> None:
    own = {"mine": GroupConfig(pattern=r"blocks\.0\.norm2\..+", mode="full"), "heads": GroupConfig(learning_rate=1e-5)}
    given = replace(config, unfreeze_modulation_and_norms=True, trainable=replace(config.trainable, groups=own))
    offered = {one.name: one for one in make_plan(given, QUICK).candidates}
    for chosen in (["modulation"], ["lora_ffn", "heads", "mvs_norms"], ["mine", "time_embedding"], ["lora_view_attention", "projector"]):
        parts = [offered[name] for name in chosen]
        names, parameters = trained_by(suggested(given, parts, list(offered.values())))
        assert parameters == sum(one.parameters for one in parts)
        assert set(names) == {name for one in parts for name in one.names}
    kept = suggested(given, [offered["heads"]], list(offered.values()))
    assert kept.trainable.groups["heads"].learning_rate == 1e-5


def test_budgets(config: Config) -> None:
    assert budget_of(config, None, None).parameters == trained_by(config)[1]
    assert budget_of(config, 5, None).parameters == 5
    assert budget_of(config, None, 1.0).parameters == 1_000_000 // 16
    factored = replace(config, train=replace(config.train, optimizer="adafactor"))
    assert budget_of(factored, None, 1.0).parameters == 1_000_000 // 8, "no moment of every parameter"
    assert BYTES_PER_PARAMETER.keys() == set(get_args(get_type_hints(TrainConfig)["optimizer"]))
    with pytest.raises(MvwanError, match="give one of them"):
        budget_of(config, 5, 1.0)


def test_intervals_hold_the_mean() -> None:
    low, mean, high = interval(np.array([1.0, 2.0, 3.0, 4.0]), 0)
    assert low < mean == 2.5 < high
    assert interval(np.ones(4), 0) == (1, 1, 1)


def test_from_a_checkpoint_its_adapters_stay(config: Config, tmp_path: Path) -> None:
    save_run(tmp_path / "run", model={"fusion": config.model.fusion})
    start = replace(config, train=replace(config.train, from_checkpoint=str(tmp_path / "run")))
    with pytest.raises(MvwanError, match="settings cannot freeze them"):
        make_plan(start, replace(QUICK, budget=100))
    plan = make_plan(start, QUICK)
    barred = {one.name for one in plan.candidates if one.obstacle}
    assert barred == {"backbone_norms", "biases", "text_embedding", "time_embedding"}
    assert {one.name for one in plan.candidates if one.needs_acceptance} == {"modulation", "mvs_norms"}
    assert plan.lower_rank is None
    result = analyse(start, tmp_path / "found", replace(QUICK, probe_steps=1, batches=1), progress=False)
    assert not any(row["needs"] for row in result["candidates"]), "nothing is zero any more"
    told = (tmp_path / "found" / "suggestion.yaml").read_text()
    accept = ["--accept-trainable-change"] if "--accept-trainable-change" in told else []
    words = ["train", "--config", str(tmp_path / "found" / "suggestion.yaml"), "--output", "unused", "--dry-run", *accept]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output


# ── words ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tables_and_plots_show_every_candidate(found: tuple[dict[str, Any], Path]) -> None:
    result, _ = found
    table = markdown(result)
    assert all(f"| {row['name']}" in table for row in result["candidates"])
    assert "| switch |" in table
    bars, per_million, fisher, blocks = figures(json.loads(json.dumps(result)))
    assert set(bars["data"][0]["y"]) == set(per_million["data"][0]["y"]) == {row["name"] for row in result["candidates"]}
    assert fisher["data"][0]["x"] == ["0", "1", "outside"]
    assert blocks["data"][0]["x"] == ["0", "1"]
    none = merge(result, {"suggestion": {"groups": []}, "comparisons": []})
    assert sentences(none)[-1].startswith("No suggestion")
    assert any(sentence.startswith("One learning rate was tried") for sentence in sentences(result))
    wider = merge(result, {"learning_rates": [1e-3, 1e-2]})
    assert any(sentence.startswith("Best at the highest rate tried, 0.01") for sentence in sentences(wider))


def command(config: Config, output: Path, *words: str) -> Any:
    write_file(output.parent / "settings.yaml", yaml.safe_dump(config.to_dict()))
    return CliRunner().invoke(cli.app, ["sensitivity", "--config", str(output.parent / "settings.yaml"), "--output", str(output), *words])


def test_a_dry_run_counts_and_writes_nothing(config: Config, tmp_path: Path) -> None:
    done = command(config, tmp_path / "out", "--dry-run", "--probe-steps", "7", "--learning-rates", "1e-3,1e-2")
    assert done.exit_code == 0, done.output
    assert "at most 42 probes of 7 steps: 294 steps" in done.stdout  # 14 candidates, 4 of lower rank, 3 lists, 2 rates
    assert not (tmp_path / "out").exists()
    plan = json.loads(command(config, tmp_path / "out", "--dry-run", "--json").stdout)
    assert sum(row["parameters"] for row in plan["candidates"] if row["name"] == "modulation") > 0


def test_the_command_writes_what_it_promises(config: Config, found: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    write_file(tmp_path / "out" / LINES, (found[1] / LINES).read_bytes())
    words = ["--batches", "2", "--probe-steps", "3", "--learning-rates", "1e-2", "--budget", "30000"]
    done = command(config, tmp_path / "out", *words, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads((found[1] / "sensitivity.json").read_text())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("sensitivity.json", "table.md", "sensitivity.html", "suggestion.yaml", LINES)
    }
    assert read_yaml(tmp_path / "out" / "suggestion.yaml")["unfreeze_modulation_and_norms"] is False


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--learning-rates", "fast"], "numbers with commas"),
        (["--learning-rates", "1e-3,1e-3"], "different numbers above 0"),
        (["--probe-steps", "0"], "at least 1"),
        (["--budget", "0"], "more than 0"),
        (["--budget", "5"], "even the smallest group"),
        (["--budget", "5", "--budget-mb", "1"], "give one of them"),
        (["--set", "data.validation_share=0"], "Set data.validation_share"),
        (["--set", "train.evaluate_windows=1"], "Set it higher"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(config: Config, words: list[str], said: str, tmp_path: Path) -> None:
    done = command(config, tmp_path / "out", *words)
    assert done.exit_code == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(config: Config, tmp_path: Path) -> None:
    write_file(tmp_path / "thesis.txt", "text")
    with pytest.raises(MvwanError, match="no sensitivity analysis"):
        sensitivity.analyse(config, tmp_path, QUICK, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
