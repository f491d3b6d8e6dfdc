"""The tables of results, really made at their smallest through the command a user types, and what a second call does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mvwan.data.dataset import read_episodes
from mvwan.errors import MvwanError
from mvwan.evaluation_table import read_evaluation
from mvwan.files import read_json, read_json_lines, write_json
from mvwan.reproduce import plan_stages
from mvwan.reproduce_table import markdown
from mvwan.sim.metaworld import RESERVED_LAYOUTS
from mvwan.suites import SUITES, TEST_LAYOUTS, Reproduction

TASK = "handle-press-v3"
SMALLEST = ["--task", "handle-press", "--demonstrations", "2", "--steps", "2", "--trials", "1", "--execute", "4", "--denoise-steps", "1"]
SMALLEST += ["--test-demonstrations", "1"]
SMALLEST += [word for name in ("num_frames=5", "height_px=64", "width_px=64", "window_stride=16") for word in ("--set", f"data.{name}")]


DATA = ("Record test demonstrations", "Record 2", "Encode")
TRIALS = ("Measure predicted paths", "Let the arm move")


def reproduce(output: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mvwan", "reproduce", "metaworld7", "--output", str(output), *SMALLEST, *words]
    environment = {**os.environ, "COLUMNS": "150", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder, what was printed) of the smallest table."""
    output = tmp_path_factory.mktemp("tables") / "metaworld7"
    done = reproduce(output, "--switch", "off", "--tuning")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return output, done.stdout


def test_the_table_shows_rates_beside_controls_and_says_what_they_are_worth(made: tuple[Path, str]) -> None:
    output, printed = made
    text = (output / "results.md").read_text()
    assert "| task | switch off | replay | expert waypoints | hold | published |" in text
    row = next(line for line in text.splitlines() if line.startswith(f"| {TASK} "))
    assert "1/1, 21–100 %" in row and "25/25, 87–100 %" in row
    assert "**Tuning layouts**" in text and "Unfinished" not in text
    assert "--tuning" in text and "optimizer steps | 2 |" in text
    assert "Train on 2 demonstrations per task, switch off" in text and "wall time" in text
    lines = read_json_lines(output / "2" / "off" / "rollouts.jsonl")
    assert {line["layout_seed"] for line in lines} == {800_000}
    assert printed.rstrip().endswith(f"results: {output / 'results.md'}")


def test_predicted_paths_are_measured_on_layouts_of_their_own(made: tuple[Path, str]) -> None:
    output, _ = made
    evaluation = read_evaluation(output / "2" / "off" / "evaluation.json")
    tested, trained = ([episode.name for episode in read_episodes(folder)] for folder in (output / "test", output / "2" / "demonstrations"))
    assert [int(name.split("/")[1]) >= TEST_LAYOUTS for name in [*tested, *trained]] == [True, False, False]
    assert 0 < evaluation["num_windows"] <= 12
    text = (output / "results.md").read_text()
    assert f"Predicted paths on {evaluation['num_windows']} windows from 1 demonstration per task" in text
    shown = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    for column, source in (("switch off", "predicted"), ("nearest", "nearest"), ("hold first", "hold_first")):
        error = evaluation["measures"][source]["error_3d_mm"]
        numbers = (error["mean"], error["median"], error["p95"], error["per_frame"][-1])
        assert shown[column] == f"| {column} | {' | '.join(f'{number:.1f}' for number in numbers)} |"


def test_a_second_call_repeats_nothing_and_other_settings_lose_nothing(made: tuple[Path, str]) -> None:
    output, _ = made
    before = (output / "2" / "off" / "rollouts.jsonl").read_text()
    again = reproduce(output, "--switch", "off", "--tuning")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("finished earlier") == 6
    other = reproduce(output, "--switch", "off", "--tuning", "--set", "train.learning_rate=1e-4")
    assert other.returncode == 2 and "made with other settings" in other.stderr
    assert (output / "2" / "off" / "rollouts.jsonl").read_text() == before


def test_a_dry_run_names_every_stage_and_does_nothing(tmp_path: Path) -> None:
    done = reproduce(tmp_path / "new", "--dry-run")
    assert done.returncode == 0, done.stderr
    for number, stage in enumerate((*DATA, "Train on", "Train on", *TRIALS, *TRIALS), 1):
        assert f"\n{number}. {stage}" in done.stdout
    assert f"first_layout {RESERVED_LAYOUTS}" in done.stdout
    without = reproduce(tmp_path / "new", "--dry-run", "--test-demonstrations", "0")
    assert "Measure predicted paths" not in without.stdout and "Record test demonstrations" not in without.stdout
    assert not (tmp_path / "new").exists()


def test_the_published_numbers_are_those_printed() -> None:
    published = SUITES["metaworld7"].published
    assert published is not None
    assert round(100 * sum(published.values()) / (25 * len(published)), 1) == 89.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suite": "metaworld8"}, "no such table"),
        ({"overrides": ["train.steps=5"]}, "--steps decides it here"),
        ({"seed": 699_999}, "must stay below 700000"),
        ({"suite": "metaworld7-wide", "tasks": ["door-open"], "baseline": Path(__file__)}, "no widened layouts"),
        ({"suite": "metaworld7-wide", "baseline": Path("nowhere.py")}, "no such script"),
        ({"trials": 0}, "--trials 0"),
        ({"test_demonstrations": -1}, "--test-demonstrations -1"),
        ({"test_demonstrations": 30_000}, "--test-demonstrations 30000: at most 25000"),
        ({"start_from": Path("earlier"), "overrides": ["train.from_checkpoint=tiny-tracking"]}, "--start-from decides it here"),
    ],
)
def test_what_cannot_be_reproduced_is_refused_at_once(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(MvwanError, match=message):
        Reproduction(**{"suite": "metaworld7", "output": tmp_path, **changes})


def test_a_change_in_what_the_baseline_imports_repeats_its_stages(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("WIDTH = 1")
    (tmp_path / "baseline.py").write_text("import net")
    wanted = Reproduction(suite="metaworld7-wide", output=tmp_path / "out", tasks=["drawer-open"], baseline=tmp_path / "baseline.py")
    before = [stage.settings for stage in plan_stages(wanted) if "baseline" in stage.name]
    (tmp_path / "net.py").write_text("WIDTH = 2")
    after = [stage.settings for stage in plan_stages(wanted) if "baseline" in stage.name]
    assert len(before) == 6 and all(old != new for old, new in zip(before, after, strict=True))


def test_runs_go_on_from_those_of_an_earlier_table(made: tuple[Path, str], tmp_path: Path) -> None:
    done = reproduce(tmp_path / "longer", "--switch", "off", "--tuning", "--start-from", str(made[0]), "--set", "data.heatmap_sigma_px=3")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "longer" / "results.md").read_text()
    goes_on = f"Each run goes on from the one of the same switch in `{made[0]}`"
    assert f"{goes_on}, made by `mvwan reproduce metaworld7 --task handle-press-v3" in text
    unknown = read_json(tmp_path / "longer" / "results.json") | {"start_made_by": None}
    assert f"{goes_on}. **Tuning" in markdown(unknown)
    assert f"| started from | {made[0] / '2' / 'off'} |" in text and f"--start-from {made[0]}" in text
    trained_with = yaml.safe_load((tmp_path / "longer" / "2" / "off" / "config.yaml").read_text())
    assert trained_with["train"]["from_checkpoint"] == str(made[0] / "2" / "off")
    again = reproduce(tmp_path / "nothing", "--switch", "off", "--dry-run", "--start-from", str(tmp_path))
    assert again.returncode == 2 and str(tmp_path / "2" / "off") in again.stderr


def test_an_unfinished_table_says_so(made: tuple[Path, str], tmp_path: Path) -> None:
    result = read_json(made[0] / "results.json")
    write_json(tmp_path / "results.json", {**result, "unfinished_stages": ["Train on more"], "final": True})
    text = markdown(read_json(tmp_path / "results.json"))
    assert "**Unfinished**: 1 stage still to come" in text and "nothing is chosen on them" in text


def test_a_training_that_was_cut_off_costs_all_its_steps(made: tuple[Path, str]) -> None:
    result = read_json(made[0] / "results.json")
    name = next(name for name in result["stages"] if name.startswith("Train on"))
    assert 0 < result["stages"][name]["steps_seconds"] <= result["stages"][name]["seconds"]
    again = {**result["stages"][name], "attempts": 3, "steps_seconds": 4000.0}
    assert f"| {name} (3 attempts: their steps alone) | 1 h 06 min |" in markdown({**result, "stages": {name: again}})
