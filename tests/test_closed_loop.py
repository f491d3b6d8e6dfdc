"""Trials of a real run in the real simulator, through the command a user types: repeatable, resumable, beside their controls."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import av
import pytest

from mvwan.checkpoint import find_checkpoint
from mvwan.closed_loop import (
    FIRST_TUNING_LAYOUT,
    TrialSettings,
    count_missing,
    evaluate_closed_loop,
    plan_trials,
    render,
    run_trial,
)
from mvwan.config import DataConfig
from mvwan.data.dataset import read_episodes
from mvwan.errors import MvwanError
from mvwan.evaluation_table import read_closed_loop
from mvwan.files import only_worker, read_json, read_json_lines
from mvwan.policies import POLICIES, Demonstrations, Replay, Seen
from mvwan.presets import config_from_preset
from mvwan.sim.execution import Arm
from mvwan.sim.metaworld import RESERVED_LAYOUTS, Simulator, record
from mvwan.train import train

TASK = "handle-press-v3"
SETTINGS = TrialSettings(execute=4, denoise_steps=1, control_steps=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run: two steps of the preset `debug` on three demonstrations."""
    work = tmp_path_factory.mktemp("closed_loop")
    record(TASK, 3, work / "data", seed=11, size_px=64, progress=False)
    settings = {"data": {"root": str(work / "data")}, "train": {"tracker": "none"}}
    train(config_from_preset("debug", settings), work / "run")
    return work / "run"


@pytest.fixture(scope="module")
def typed(folder: Path) -> tuple[str, dict, list[dict]]:
    """What the command line says and writes."""
    command = [sys.executable, "-m", "mvwan", "evaluate", str(folder), "--windows", "0", "--trials", "1", "--execute", "4"]
    run = subprocess.run(
        [*command, "--denoise-steps", "1", "--processes", "2"], capture_output=True, text=True, check=True, env=_wide_terminal()
    )
    return run.stdout, read_json(folder / "closed_loop.json"), read_json_lines(folder / "rollouts.jsonl")


def _wide_terminal() -> dict[str, str]:
    return os.environ | {"COLUMNS": "160", "OMP_NUM_THREADS": "1"}


def test_the_command_shows_a_rate_for_the_run_and_each_control_and_films_them(typed, folder):
    said, result, lines = typed
    assert "4 trials of handle-press-v3 on stock layouts, 4 of them still to run" in said
    assert {line["policy"]: line["layout_seed"] for line in lines} == dict.fromkeys(POLICIES, FIRST_TUNING_LAYOUT)
    assert set(result["tasks"]) == {TASK, "all"} and set(result["tasks"][TASK]) == set(POLICIES)
    assert result["tasks"][TASK]["expert_waypoints"]["successes"] == 1
    assert result["tasks"][TASK]["hold"] == {"successes": 0, "trials": 1, "rate": 0.0, "low": 0.0, "high": pytest.approx(0.7935, abs=1e-3)}
    assert all(words in said for words in ("predicted", "expert waypoints", "replay", "hold", "1/1", "0/1"))
    assert [(film["policy"], film["success"]) for film in result["films"]] == [
        (policy, next(line["success"] for line in lines if line["policy"] == policy)) for policy in POLICIES
    ]
    assert all((folder / film["file"]).is_file() for film in result["films"])
    predicted = next(line for line in lines if line["policy"] == "predicted")
    assert predicted["plans"] >= 1 and predicted["checkpoint_step"] == 2
    films = sorted((folder / "rollouts").glob("*.mp4"))
    names = [f"{TASK}-stock-{line['layout_seed']}-{line['policy']}-{line['digest'][:8]}.mp4" for line in lines]
    assert [film.name for film in films] == sorted(names)
    with av.open(str(films[0])) as container:
        frames = sum(1 for _ in container.decode(video=0))
    steps = next(line["control_steps"] for line in lines if line["policy"] == sorted(POLICIES)[0])
    assert frames == 1 + steps // 4


def test_a_trial_is_the_same_bit_for_bit_in_another_process(typed, folder):
    _, _, lines = typed
    settings = TrialSettings(execute=4, denoise_steps=1)
    for trial in plan_trials(folder, trials=1, settings=settings):
        again = run_trial(trial)
        before = next(line for line in lines if line["digest"] == trial.digest)
        assert {**again, "seconds": 0} == {**before, "seconds": 0}


def test_finished_trials_are_kept_half_a_line_is_not_and_settings_tell_trials_apart(folder):
    policies = ("hold", "replay")
    evaluate_closed_loop(folder, trials=2, policies=policies, settings=SETTINGS, processes=1, videos=0)
    path = folder / "rollouts.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:-1]) + whole[-1][: len(whole[-1]) // 2])
    planned = plan_trials(folder, trials=2, policies=policies, settings=SETTINGS)
    assert count_missing(planned) == 1
    evaluate_closed_loop(folder, trials=2, policies=policies, settings=SETTINGS, processes=1, videos=0)
    again = path.read_text().splitlines(keepends=True)
    assert again[:-1] == whole[:-1]
    assert {**json.loads(again[-1]), "seconds": 0} == {**json.loads(whole[-1]), "seconds": 0}
    assert count_missing(planned) == 0
    longer = dataclasses.replace(SETTINGS, control_steps=41)
    assert count_missing(plan_trials(folder, trials=2, policies=policies, settings=longer)) == 4
    # Controls do not look, so how often a run looks is no part of them.
    other = dataclasses.replace(SETTINGS, execute=2)
    assert count_missing(plan_trials(folder, trials=2, policies=policies, settings=other)) == 0
    assert count_missing(plan_trials(folder, trials=2, policies=("predicted",), settings=other)) == 2


def test_a_checkpoint_that_is_named_drives_itself_and_a_strange_line_is_told(folder, tmp_path):
    checkpoint = find_checkpoint(folder)
    (trial,) = plan_trials(checkpoint, trials=1, policies=("predicted",), settings=SETTINGS)
    assert trial.checkpoint == checkpoint
    shutil.copytree(checkpoint, tmp_path / "checkpoints" / checkpoint.name)
    (tmp_path / "rollouts.jsonl").write_text('{"task": "x"}\n')
    with pytest.raises(MvwanError, match="line 1 is not the line of a trial"):
        evaluate_closed_loop(tmp_path / "checkpoints" / checkpoint.name, trials=1, policies=("hold",), settings=SETTINGS)


def test_other_demonstrations_in_the_same_place_are_other_replays(folder, tmp_path):
    known = {}
    for seed in (11, 40):
        root = tmp_path / "data"
        record(TASK, 2, root, seed=seed, size_px=32, progress=False)
        known[seed] = Demonstrations(data=DataConfig(root=str(root), validation_share=0.5), seed=0)
        assert known[seed].training
        assert not known[seed].are_widened
        shutil.rmtree(root)
    assert known[11].fingerprint != known[40].fingerprint


def test_final_layouts_are_the_reserved_ones_and_no_others_ever_are(folder):
    seeds = {
        final: [trial.layout_seed for trial in plan_trials(folder, trials=3, settings=SETTINGS, final=final)] for final in (False, True)
    }
    assert min(seeds[True]) == RESERVED_LAYOUTS
    assert max(seeds[False]) < RESERVED_LAYOUTS
    with pytest.raises(MvwanError, match="at most 100000"):
        plan_trials(folder, trials=100_001, settings=SETTINGS)


def test_replay_follows_a_training_demonstration_and_solves_its_own_layout(folder):
    config = config_from_preset("debug", {"data": {"root": str(folder.parent / "data")}})
    known = Demonstrations(data=config.data, seed=config.seed)
    assert known.tasks == (TASK,) and known.control_steps_per_frame == 2
    assert len(known.training) == 2 < len(read_episodes(config.data.root))
    demonstration = known.training[0]
    with Simulator(TASK, ()) as simulator:
        simulator.reset(int(demonstration.name.split("/")[1]))
        policy = Replay([demonstration], 4, seed=0)
        policy.begin(TASK, 0, widened=False)
        arm = Arm(simulator, 500)
        plan = policy.plan(Seen(rgb=simulator.render(), cameras=(), state=simulator.state, instruction=simulator.instruction))
        assert plan.is_whole and (plan.point_m[-1] == demonstration.point_m[-1]).all()
        arm.follow(plan)
        assert arm.succeeded
    with pytest.raises(MvwanError, match="door-open-v3: the run has no training demonstration"):
        policy.begin("door-open-v3", 0, widened=False)


def test_one_command_at_a_time_lets_a_run_move(folder):
    before = (folder / "rollouts.jsonl").read_text() if (folder / "rollouts.jsonl").is_file() else None
    with only_worker(folder / "rollouts", wait=False), pytest.raises(MvwanError, match="another command is at work"):
        evaluate_closed_loop(folder, trials=1, settings=TrialSettings(execute=4, denoise_steps=1))
    assert ((folder / "rollouts.jsonl").read_text() if (folder / "rollouts.jsonl").is_file() else None) == before


def test_what_makes_heat_tells_trials_of_the_run_apart_and_no_others(folder):
    digests = [
        {trial.policy: trial.digest for trial in plan_trials(folder, trials=1, settings=TrialSettings(execute=4, heat_from=source))}
        for source in ("auto", "vae")
    ]
    assert {policy for policy in POLICIES if digests[0][policy] != digests[1][policy]} == {"predicted"}


@pytest.mark.parametrize(
    ("change", "message"), [({"model": {"views": 1}}, "one view"), ({"train": {"condition_frames": 2}}, "2 given latent frames")]
)
def test_what_no_arm_can_follow_is_refused_before_a_simulator_starts(change, message):
    config = config_from_preset("tiny", change)
    with pytest.raises(MvwanError, match=message):
        TrialSettings().check(config)


def test_a_run_is_told_what_does_not_fit_it(folder):
    for settings, message in (
        (TrialSettings(execute=13), "--execute 13: the run predicts 4 later frames"),
        (dataclasses.replace(SETTINGS, denoise_steps=0), "denoise_steps=0"),
    ):
        with pytest.raises(MvwanError, match=message):
            plan_trials(folder, trials=1, settings=settings)
    with pytest.raises(MvwanError, match="no such task"):
        plan_trials(folder, trials=1, tasks=["fly"], settings=SETTINGS)
    with pytest.raises(MvwanError, match="no widened layouts"):
        plan_trials(folder, trials=1, settings=dataclasses.replace(SETTINGS, widened=True))


def test_numbers_of_another_version_are_told(typed, folder, tmp_path):
    result = typed[1]
    assert read_closed_loop(folder / "closed_loop.json")["trials"] >= 1
    (tmp_path / "closed_loop.json").write_text(json.dumps({**result, "format_version": 1}))
    with pytest.raises(MvwanError, match="format 1, this version reads 4"):
        read_closed_loop(tmp_path / "closed_loop.json")


def test_the_table_of_a_result_has_one_row_per_task_and_one_for_all(typed):
    _, result, _ = typed
    table = render(result)
    assert (table.row_count, len(table.columns)) == (2, 1 + len(POLICIES))
