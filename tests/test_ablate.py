"""An ablation as a user runs it, at its smallest: a grid to a table, killed and gone on, with runs that fail; and that runs are paired."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from mvwan import ablate, cli, flow
from mvwan.ablate import run_ablation
from mvwan.ablation.check import check_grid
from mvwan.ablation.cluster import run_on_cluster
from mvwan.ablation.grid import Grid, read_grid
from mvwan.ablation.jobs import Job, run_jobs
from mvwan.ablation.outcomes import measured_windows, open_cache
from mvwan.checkpoint import TRAINED, find_checkpoint
from mvwan.config import Config, FlowConfig, merge
from mvwan.data.dataset import WindowDataset, read_episodes
from mvwan.errors import MvwanError
from mvwan.files import only_worker, read_json, read_json_lines, write_file, write_json
from mvwan.presets import config_from_preset
from mvwan.processes import Failure
from mvwan.train_data import micro_batches
from mvwan.training_module import HeatmapWanTrainingModule
from mvwan.trainings import as_many_as_fit
from tests.demonstrations import write_demonstrations
from tests.kill_and_resume import small_run

torch.set_num_threads(1)  # sizes are tiny: waking threads costs more than they do

OFF, ON = "unfreeze_modulation_and_norms=false", "unfreeze_modulation_and_norms=true"
NOISE = FlowConfig(sigma_min=0.3)
_LONGEST_S = 300


@pytest.fixture(scope="module")
def grid_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms, two rates, one seed, on a base of two narrow blocks."""
    folder = tmp_path_factory.mktemp("ablation")
    settings = small_run(folder)
    del settings["unfreeze_modulation_and_norms"], settings["train"]["learning_rate"], settings["train"]["ema_decay"]
    settings["data"]["validation_share"] = 0.5
    settings["flow"] = {"sigma_min": NOISE.sigma_min}
    settings["train"] |= {"steps": 3, "warmup_steps": 1, "save_every": 1, "evaluate_every": 3}
    grid = {"preset": "debug", "settings": settings, "vary": {"unfreeze_modulation_and_norms": [False, True]}}
    grid |= {"learning_rates": [1e-3, 1e-2], "seeds": 1, "denoise_steps": 1}
    path = folder / "asked.yaml"
    path.write_text(yaml.safe_dump(grid))
    return path


def ablated(grid_file: Path, output: Path) -> Result:
    """What the command says, in this process."""
    return CliRunner().invoke(cli.app, ["ablate", "--grid", str(grid_file), "--output", str(output)])


def wait_until(happened: Callable[[], object]) -> None:
    end = time.monotonic() + _LONGEST_S
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def made(grid_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """(folder, stdout, stderr) of the whole grid by the command."""
    output = tmp_path_factory.mktemp("made") / "out"
    done = ablated(grid_file, output)
    assert done.exit_code == 0, done.output[-3000:]
    return output, done.stdout, done.stderr


def folders_of(output: Path) -> list[Path]:
    return sorted(output.glob("runs/*/*/*"))


# ── a grid, from the command to the table ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_grid_runs_to_a_table_and_a_report(made: tuple[Path, str, str]) -> None:
    output, said, errors = made
    assert "4 runs: 2 arms x 2 learning rates (0.001, 0.01) x 1 seeds" in said
    assert f"{OFF} (reference): " in said and "parameters trained: lora " in said
    table = (output / "table.md").read_text()
    assert table in said and f"report: {output / 'report.html'}" in said
    assert "no difference shown at n = 1" in table and "Heatmap peak error" in table
    assert "Time per step" not in table, "costs differ from day to day"
    page = (output / "report.html").read_text()
    assert "Time per step" in page and "data:image/webp" in page
    assert errors.count("train and measure: ") == 4 and errors.count("predict: ") == 2, "predictions are those of the best rates alone"
    assert read_grid(output / "grid.yaml").seeds == 1
    assert not list(output.rglob(".*.partial"))


def test_every_number_is_a_row(made: tuple[Path, str, str]) -> None:
    rows = pq.read_table(made[0] / "results.parquet").to_pylist()
    outcomes = {row["outcome"] for row in rows}
    bands = {f"{stream}_loss@{name}" for stream in ("rgb", "heat") for _, _, name in flow.sigma_bands(NOISE)}
    assert len(bands) == 4 and bands == {name for name in outcomes if "_loss@" in name}, "noise that nothing trains at decides nothing"
    assert set(ablate.OUTCOMES) - {"success"} <= outcomes
    assert {name for name in outcomes if name.startswith("peak_error_px@")} == {f"peak_error_px@{part}" for part in ("1-2", "3", "4")}
    of_split = {split: {row["episode"] for row in rows if row["split"] == split and row["episode"]} for split in ("validation", "test")}
    assert of_split["validation"] and of_split["test"] and not of_split["validation"] & of_split["test"]
    mean = [row for row in rows if (row["arm"], row["learning_rate"], row["split"]) == (OFF, 1e-3, "test")]
    values = {row["outcome"]: row["value"] for row in mean}
    assert values["heat_loss"] == pytest.approx(np.mean([values[name] for name in bands if name.startswith("heat")]))
    assert values["velocity_loss"] == pytest.approx(0.5 * values["heat_loss"] + 0.5 * values["rgb_loss"])
    assert all(values[name] > 0 for name in ablate.COSTS)
    moved = read_json(folders_of(made[0])[-1] / "outcomes.json")["movement"]
    assert {(row["group"], row["block"]) for row in moved} >= {("modulation", 0), ("modulation", 1), ("lora", 0), ("mvs_norms", 1)}
    assert all(row["relative_movement"] > 0 for row in moved)


def test_jobs_share_the_gpus_in_turn(tmp_path: Path) -> None:
    config = config_from_preset("debug", {"data": {"root": str(tmp_path / "none")}})
    options = {"test_dataset": None, "seeds": 1, "windows": 1}
    folders = [tmp_path / str(number) for number in range(3)]
    jobs = [
        Job(name=folder.name, kind="encode", folder=folder, product=folder / "done", key="", config=config, options=options)
        for folder in folders
    ]
    failures = run_jobs(jobs, 2, lambda *_: None, ("4", "7"))
    assert sorted(failure.name for failure in failures) == ["0", "1", "2"] and all("none" in failure.reason for failure in failures)
    said = [(folder / "encode.log").read_text().splitlines()[0] for folder in folders]
    assert said[:2] == ["GPU 4", "GPU 7"] and said[2] in said[:2], "the third has the place of the first that ended"


def test_no_more_runs_at_a_time_than_memory_holds(made: tuple[Path, str, str]) -> None:
    grid, said = read_grid(made[0] / "grid.yaml"), io.StringIO()
    configs = [run.config for run in grid.runs(made[0])]
    fit = as_many_as_fit(configs, 100_000, Console(file=said, width=200))
    told = re.fullmatch(r"(\d+) at a time instead of 100000: a run takes some ([\d.]+) GB, ([\d.]+) GB are free\n", said.getvalue())
    assert told and int(told[1]) == fit > 1
    assert (fit + 1) * (float(told[2]) + 0.05) > float(told[3]) - 0.05 and fit * (float(told[2]) - 0.05) < float(told[3]) + 0.05
    assert as_many_as_fit(configs, 1, Console(file=said)) == 1


def test_a_second_call_runs_nothing(made: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    output, _, _ = made
    monkeypatch.setattr(ablate, "run_jobs", lambda *given, **_: pytest.fail(f"{len(given[0])} jobs run again"))
    before = (output / "table.md").read_bytes()
    made_again = run_ablation(check_grid(read_grid(output / "grid.yaml"), output))
    assert made_again.table.encode() == before == (output / "table.md").read_bytes()


def test_a_grid_goes_on_from_the_runs_of_another_and_says_how_they_fit(made: tuple[Path, str, str], tmp_path: Path) -> None:
    """Two stages: what the rules say of a checkpoint of either stands in the dry run, in the table and on the page."""
    first = read_grid(made[0] / "grid.yaml")
    arms = {"off, then on": (OFF, True), "on, then off": (ON, False), "on, then on": (ON, True)}
    place = f"{made[0]}/runs/{{}}/lr-0.001/seed-{{seed}}"
    settings = {
        name: {"train": {"from_checkpoint": place.replace("{}", arm.replace(" ", "-"))}, "unfreeze_modulation_and_norms": switch}
        for name, (arm, switch) in arms.items()
    }
    grid = replace(first, vary={}, arms=settings, learning_rates=(1e-3,))
    with pytest.raises(MvwanError, match=r"off, then on, learning rate 0\.001, seed 0: checkpoint .* was trained without the groups mod"):
        check_grid(grid, tmp_path / "out")
    accepted = replace(grid, accept_trainable_change=True)
    with pytest.raises(MvwanError, match=r"seed 1: .*seed-1"):
        check_grid(replace(accepted, seeds=2), tmp_path / "out")
    checked = check_grid(accepted, tmp_path / "out")
    started = dict(checked.starts)
    assert started["off, then on"].startswith(
        f"from {place.replace('{}', OFF)}: older; modulation: 2 tensors not in the checkpoint, they keep"
    )
    assert "newer; modulation: 2 tensors loaded and kept frozen" in started["on, then off"]
    assert started["on, then on"].endswith("seed-{seed}: exact")
    assert all(f"parameters trained: {told}" not in checked.describe() and told in checked.describe() for told in started.values())


def test_runs_of_an_earlier_start_are_not_taken_for_new_ones(made: tuple[Path, str, str], tmp_path: Path) -> None:
    """The grid says the same, but what its checkpoint holds has changed since."""
    first, start = read_grid(made[0] / "grid.yaml"), tmp_path / "start"
    shutil.copytree(folders_of(made[0])[0], start)
    grid = replace(first, settings=merge(first.settings, {"train": {"from_checkpoint": str(start)}}), learning_rates=(1e-3,))
    grid = replace(grid, accept_trainable_change=True)
    job, *_ = ablate._training_jobs(check_grid(grid, tmp_path / "out"))
    write_file(tmp_path / "out" / "grid.yaml", grid.to_yaml())
    write_json(job.folder / "training.json", {"trained_from": job.options["trained_from"]})
    assert check_grid(grid, tmp_path / "out").keys[job.folder] == job.key
    shutil.rmtree(start)
    shutil.copytree(folders_of(made[0])[1], start)
    with pytest.raises(MvwanError, match=r"trained from another base, checkpoint or data set.*remove that folder"):
        check_grid(grid, tmp_path / "out")
    (job.folder / "training.json").unlink()
    (job.folder / "checkpoints").mkdir()
    with pytest.raises(MvwanError, match="trained from another base"):
        check_grid(grid, tmp_path / "out")


def test_another_grid_in_the_folder_is_refused_with_the_difference(made: tuple[Path, str, str], tmp_path: Path) -> None:
    grid = read_grid(made[0] / "grid.yaml")
    with pytest.raises(MvwanError, match="seeds: 1 before, 2 now"):
        check_grid(replace(grid, seeds=2), made[0])
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(MvwanError, match="holds something that is no ablation"):
        check_grid(grid, tmp_path)


# ── stopped, killed, broken ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_killed_grid_goes_on_to_the_same_table(made: tuple[Path, str, str], grid_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "mvwan", "ablate", "--grid", str(grid_file), "--output", str(output)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
    try:
        wait_until(lambda: list(output.rglob("outcomes.json")) and len(list(output.rglob("metrics.jsonl"))) > 1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finished = {path: path.stat().st_mtime_ns for path in output.rglob("outcomes.json")}
    assert len(finished) < 4 and not (output / "table.md").exists()
    done = ablated(grid_file, output)
    assert done.exit_code == 0, done.output[-3000:]
    assert f"train and measure: {len(finished)} of 4 finished earlier" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "what was finished is not run again"
    for name in ("table.md", "comparison.json"):
        assert (output / name).read_bytes() == (made[0] / name).read_bytes()


def test_sigterm_stops_every_run_and_says_that_it_goes_on(grid_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"

    def stop() -> None:
        wait_until(lambda: list(output.rglob("metrics.jsonl")))
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop, daemon=True)
    stopper.start()
    done = ablated(grid_file, output)
    stopper.join(_LONGEST_S)
    assert done.exit_code == 75 and "the same command goes on" in done.stderr
    with only_worker(next(output.glob("runs/*/*/*")), wait=False):
        pass  # nobody works there any more
    with only_worker(output, wait=False):
        assert "another command is at work" in ablated(grid_file, output).stderr


def test_a_run_that_fails_is_named_and_alone_repeated(made: tuple[Path, str, str], grid_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(made[0], output)
    broken, *others = folders_of(output)
    (broken / "outcomes.json").write_text('{"key": ')
    weights = find_checkpoint(broken) / TRAINED
    weights.write_bytes(weights.read_bytes()[:-8])
    before = [(folder / "outcomes.json").stat().st_mtime_ns for folder in others]
    done = ablated(grid_file, output)
    assert done.exit_code == 1, done.output
    assert f"failed: {OFF}, learning rate 0.001, seed 0: " in done.stderr and f"see {broken / 'train.log'}" in done.stderr
    assert "train and measure: 3 of 4 finished earlier" in done.stderr and "Traceback" not in done.stderr
    for name in ("table.md", "report.html"):
        assert "Runs that did not finish" in (output / name).read_text()
    shutil.rmtree(broken)
    done = ablated(grid_file, output)
    assert done.exit_code == 0, done.output
    assert [(folder / "outcomes.json").stat().st_mtime_ns for folder in others] == before
    assert (output / "table.md").read_bytes() == (made[0] / "table.md").read_bytes()


def test_an_arm_without_a_finished_run_leaves_the_others_a_table(
    made: tuple[Path, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    shutil.copytree(made[0], output)
    monkeypatch.setattr(ablate, "run_jobs", lambda jobs, *_, **__: [Failure(name=job.name, reason="lost", log=job.log) for job in jobs])
    checked = check_grid(read_grid(output / "grid.yaml"), output)
    for folder in folders_of(output):
        if ON in folder.parts:
            (folder / "outcomes.json").unlink()
    ended = run_ablation(checked)
    assert len(ended.failures) == 2 and f"{ON}: no run finished, so there is nothing to compare" in ended.table
    for path in output.rglob("outcomes.json"):
        path.unlink()
    with pytest.raises(MvwanError, match=r"no run came to its end, so nothing can be compared\. The first, .*: lost"):
        run_ablation(checked)


# ── on a cluster ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_jobs_run_through_submitit_and_say_why_they_fail(made: tuple[Path, str, str], tmp_path: Path) -> None:
    """By its local processes: that Slurm takes the same jobs is submitit's promise."""
    pytest.importorskip("submitit", reason="submitit is not installed: pip install 'mvwan[cluster]'")
    checked = check_grid(read_grid(made[0] / "grid.yaml"), made[0])
    (job,) = ablate._encode_jobs(checked)
    good = replace(job, folder=tmp_path / "good", product=tmp_path / "good" / "encoded.json")
    nowhere = replace(job.config, data=replace(job.config.data, root=str(tmp_path / "nowhere")))
    bad = replace(job, name="bad", folder=tmp_path / "bad", product=tmp_path / "bad" / "encoded.json", config=nowhere)
    told: list[tuple[str, str]] = []
    given: dict[str, Any] = {"cluster": "local", "options": {"timeout_min": 10}, "folder": tmp_path / "submitit"}
    failures = run_on_cluster([good, bad], 2, lambda job, event, _: told.append((job.name, event)), **given)
    assert good.is_done and [failure.name for failure in failures] == ["bad"]
    assert "no such folder" in failures[0].reason and failures[0].log.is_file()
    assert sorted(told) == sorted([(good.name, "started"), ("bad", "started"), (good.name, "done"), ("bad", "failed")])


def test_without_submitit_the_command_says_what_to_install(
    made: tuple[Path, str, str], grid_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    words = ["ablate", "--grid", str(grid_file), "--output", str(made[0])]
    done = CliRunner().invoke(cli.app, [*words, "--cluster", "slurm", "--cluster-option", "timeout_min=10"])
    assert done.exit_code == 2 and "pip install 'mvwan[cluster]'" in done.stderr
    done = CliRunner().invoke(cli.app, [*words, "--cluster-option", "timeout_min=10"])
    assert done.exit_code == 2 and "belongs to --cluster" in done.stderr


# ── pairs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_arms_of_a_seed_start_at_the_same_loss(made: tuple[Path, str, str]) -> None:
    first = [read_json_lines(folder / "metrics.jsonl") for folder in folders_of(made[0])]
    assert len(first) == 4
    lines = [[line for line in run if line["kind"] == "train"] for run in first]
    assert len({(run[0]["rgb_loss"], run[0]["heat_loss"]) for run in lines}) == 1
    assert len({run[-1]["loss"] for run in lines}) == 4, "then they part"
    assert len({(folder / "first_batch.png").read_bytes() for folder in folders_of(made[0])}) == 1


def test_arms_of_a_seed_see_the_same_windows_and_noise(made: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    output, _, _ = made
    grid = read_grid(output / "grid.yaml")
    seen: list[tuple[Any, ...]] = []
    real = flow.add_noise

    def remember(clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        seen.append((clean, noise, sigma))
        return real(clean, noise, sigma)

    monkeypatch.setattr(flow, "add_noise", remember)
    names = []
    for arm in grid.all_arms:
        config = grid.config(arm, grid.rates[0], 0, output)
        training = WindowDataset(read_episodes(config.data.root), config.data, config.model.views, "train", config.seed)
        cache = open_cache(config, str(config.data.cache), training)
        module = HeatmapWanTrainingModule(config=config, print_banners=False)
        with torch.no_grad():
            for step, batch in enumerate(micro_batches(config, cache, 1, 0, 0)):
                names.append(batch.sample_ids)
                module(batch, config.seed, step)
    half = len(seen) // 2
    assert half == 6 and names[:half] == names[half:]
    for one, other in zip(seen[:half], seen[half:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ── before anything runs ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def config_of(root: Path, share: float) -> Config:
    grid = Grid(
        preset="debug", vary={"trainable.lora.ffn": [True, False]}, settings={"data": {"root": str(root), "validation_share": share}}
    )
    return grid.config(grid.all_arms[0], 1e-3, 0)


def test_held_out_episodes_are_halved_and_one_is_too_few(tiny_demonstrations: Path) -> None:
    split = measured_windows(config_of(tiny_demonstrations, 0.75), None, 1)
    names = {name: {episode.name for episode in windows.windows.used_episodes()} for name, windows in split.items()}
    assert [len(names["validation"]), len(names["test"])] == [1, 2] and not names["validation"] & names["test"]
    with pytest.raises(MvwanError, match=r"two are needed.*Raise data.validation_share=0.25, or give --test-dataset"):
        measured_windows(config_of(tiny_demonstrations, 0.25), None, 1)


def test_what_tests_in_one_seed_chooses_rates_in_none(tmp_path: Path) -> None:
    config = config_of(write_demonstrations(tmp_path / "twelve", episodes=12), 0.5)
    of_split: dict[str, set[str]] = {"validation": set(), "test": set()}
    for seed in range(5):
        split = measured_windows(replace(config, seed=seed), None, 5)
        names = {name: {episode.name for episode in windows.windows.used_episodes()} for name, windows in split.items()}
        assert all(names.values()) and sum(map(len, names.values())) == 6
        for name, episodes in names.items():
            of_split[name] |= episodes
    assert not of_split["validation"] & of_split["test"]


def test_a_dataset_of_its_own_tests_and_must_be_new(tiny_demonstrations: Path, tmp_path: Path) -> None:
    with pytest.raises(MvwanError, match="another --seed"):
        measured_windows(config_of(tiny_demonstrations, 0.25), tiny_demonstrations, 1)
    with pytest.raises(MvwanError, match="no learning rate can be chosen"):
        measured_windows(config_of(tiny_demonstrations, 0), tiny_demonstrations, 1)
    more = write_demonstrations(tmp_path / "more", first=4)
    split = measured_windows(config_of(tiny_demonstrations, 0.25), more, 1)
    assert len(split["test"].windows.used_episodes()) == 4 and len(split["validation"].windows.used_episodes()) == 1


def test_a_dry_run_counts_and_writes_nothing(tiny_demonstrations: Path, tmp_path: Path) -> None:
    words = ["ablate", "--preset", "debug", "--set", f"data.root={tiny_demonstrations}", "--set", "data.validation_share=0.5", "--vary"]
    words += [
        "unfreeze_modulation_and_norms=false,true",
        "--seeds",
        "2",
        "--learning-rates",
        "1e-3,3e-3",
        "--output",
        str(tmp_path / "new"),
    ]
    done = CliRunner().invoke(cli.app, [*words, "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "8 runs: 2 arms x 2 learning rates (0.001, 0.003) x 2 seeds" in done.output
    assert f"{ON}: 908,100 parameters trained" in done.output and "modulation 12,288" in done.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vary", "seed=0,1"], "--vary seed: --seeds decides it here"),
        (["--vary", "trainable.groups={},{nowhere: {mode: full}}"], "trainable.groups.nowhere: no such group"),
        (["--vary", "model.action_head=none,gripper_rotation"], "no window of the dataset says how the hand is turned"),
        (["--grid", "grid.yaml"], "--grid grid.yaml says it all: leave preset, settings out"),
    ],
)
def test_every_run_is_checked_before_the_first_starts(tiny_demonstrations: Path, tmp_path: Path, words: list[str], message: str) -> None:
    given = ["ablate", "--preset", "debug", "--set", f"data.root={tiny_demonstrations}", "--set", "data.validation_share=0.5"]
    done = CliRunner().invoke(cli.app, [*given, "--output", str(tmp_path / "new"), *words])
    assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
