"""A table of results, really reproduced at its smallest: several tasks, one model, controls, a baseline; what a second run repeats."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mvwan import cli
from mvwan.closed_loop import FIRST_TUNING_LAYOUT
from mvwan.data.dataset import read_episodes
from mvwan.errors import MvwanError
from mvwan.files import read_json, read_json_lines
from mvwan.metrics import rate_in_words
from mvwan.policies import POLICIES
from mvwan.reproduce import collect, plan_stages
from mvwan.reproduce import plan_stages
from mvwan.reproduce_table import markdown
from mvwan.sim.metaworld import RESERVED_LAYOUTS
from mvwan.sim.tasks import INSTRUCTIONS, WIDENED
from mvwan.suites import SUITES, Reproduction

ROOT = Path(__file__).parents[1]
TASKS = ("coffee-button-v3", "drawer-close-v3")
SIZES = ("height_px=64", "width_px=64", "num_frames=5", "window_stride=20", "text_tokens=32")
SMALLEST = [
    *("reproduce", "metaworld7-wide", *(word for task in TASKS for word in ("--task", task)), "--demonstrations", "1", "--tuning"),
    *("--trials", "1", "--execute", "4", "--denoise-steps", "1", "--control-steps", "120", "--videos", "0", "--baseline-steps", "2"),
    *(word for size in SIZES for word in ("--set", f"data.{size}")),
    *("--set", "train.tracker=none", "--set", "trainable.lora.rank=2", "--set", "train.batch_size=1"),
]


def reproduce(output: Path, steps: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mvwan", *SMALLEST, "--steps", str(steps), "--output", str(output)]
    environment = {**os.environ, "COLUMNS": "160", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment, cwd=ROOT)


def everything_under(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder, what was printed) of the smallest reproduction."""
    output = tmp_path_factory.mktemp("runs") / "wide"
    done = reproduce(output)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return output, done.stdout


def test_one_dataset_of_all_tasks_is_trained_on_whole_and_layouts_are_for_tuning(made: tuple[Path, str]) -> None:
    folder = made[0] / "1"
    episodes = read_episodes(folder / "demonstrations")
    assert {episode.instruction for episode in episodes} == {INSTRUCTIONS[task] for task in TASKS}
    assert len(episodes) == 2
    assert all("/widened-" in episode.name for episode in episodes)
    for label, policies in (("off", POLICIES), ("on", ("predicted",))):
        lines = read_json_lines(folder / label / "rollouts.jsonl")
        assert {(line["task"], line["policy"]) for line in lines} == {(task, policy) for task in TASKS for policy in policies}
        assert {(line["layout_seed"], line["layouts"]) for line in lines} == {(FIRST_TUNING_LAYOUT, "widened")}
        table = read_json(folder / label / "table.json")
        assert any(group["name"] == "mvs_norms" and group["trainable"] for group in table["groups"]) == (label == "on")
    assert {line["layout_seed"] for line in read_json(folder / "conv" / "closed_loop.json")["lines"]} == {FIRST_TUNING_LAYOUT}


def test_the_table_shows_what_the_trials_gave(made: tuple[Path, str]) -> None:
    output, printed = made
    result, text = read_json(output / "results.json"), (output / "results.md").read_text(encoding="utf-8")
    columns = ["switch off", "switch on", "conv baseline", "replay", "expert waypoints", "hold"]
    (table,) = result["tables"]
    assert list(table["rates"]) == columns
    assert f"| task | {' | '.join(columns)} |" in text
    tried = {label: read_json(output / "1" / label / "closed_loop.json")["tasks"] for label in ("off", "on", "conv")}
    for task in (*TASKS, "all"):
        rates = [tried["off"][task]["predicted"], tried["on"][task]["predicted"], tried["conv"][task]["conv"]]
        rates += [tried["off"][task][policy] for policy in ("replay", "expert_waypoints", "hold")]
        assert f" | {' | '.join(map(rate_in_words, rates))} |" in text
    assert table["rates"]["expert waypoints"]["all"]["successes"] == 2
    assert table["rates"]["hold"]["all"] == tried["off"]["all"]["hold"]
    assert "Tuning layouts" in text and "widened layouts 800000 to 800000" in text and "Unfinished" not in text
    assert len(result["stages"]) == 8 and all(cost["peak_memory_mb"] > 100 for cost in result["stages"].values())
    assert all(f"| {name} | " in text for name in result["stages"])
    assert printed.rstrip().endswith(f"results: {output / 'results.md'}")
    again = next(line for line in text.splitlines() if line.startswith("mvwan reproduce"))
    assert CliRunner().invoke(cli.app, [*shlex.split(again)[1:], "--dry-run"]).exit_code == 0


def test_a_second_run_repeats_nothing_and_trials_go_on(made: tuple[Path, str]) -> None:
    output = made[0]
    (output / "1" / "on" / "closed_loop.json").unlink()
    before = everything_under(output / "1")
    done = reproduce(output)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("finished earlier") == 7
    after = everything_under(output / "1")
    assert {path.name for path in after.keys() - before.keys()} == {"closed_loop.json"}
    assert {path: after[path] for path in before} == before, "no trial was run again"


def test_what_took_hours_is_not_replaced_unasked(made: tuple[Path, str]) -> None:
    before = everything_under(made[0])
    done = reproduce(made[0], steps=3)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "made with other settings" in done.stderr and "--fresh" in done.stderr
    assert everything_under(made[0]) == before


def test_published_numbers_stand_beside_and_what_is_missing_is_said(tmp_path: Path) -> None:
    wanted = Reproduction(suite="metaworld7", output=tmp_path / "none")
    names = [stage.name for stage in plan_stages(wanted)]
    text = markdown(collect(wanted, {}, names))
    assert "25/25" in text and "8/25" in text and "156/175" in text and "2604.03181" in text
    assert f"stock layouts {RESERVED_LAYOUTS} to {RESERVED_LAYOUTS + 24}" in text and "nothing is chosen on them" in text
    assert f"{len(names)} stages are still to come" in text
    some = markdown(collect(Reproduction(suite="metaworld7", output=tmp_path, tasks=["door-open"]), {}, names))
    assert "25/25" in some and "156/175" not in some and "**all** | – |" in some


def test_suites_are_sound() -> None:
    published = SUITES["metaworld7"].published
    assert published is not None and set(published) == set(SUITES["metaworld7"].tasks)
    assert round(100 * sum(published.values()) / (25 * 7), 1) == 89.1
    assert set(SUITES["metaworld7-wide"].tasks) == set(WIDENED)
    assert all(task in INSTRUCTIONS for suite in SUITES.values() for task in suite.tasks)


def test_a_dry_run_shows_settings_and_stages_and_writes_nothing(tmp_path: Path) -> None:
    output = tmp_path / "x"
    words = ["reproduce", "metaworld7", "--output", str(output), "--dry-run", "--set", "train.learning_rate=0.003", "--switch", "on"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    assert "learning_rate: 0.003" in done.stdout and "unfreeze_modulation_and_norms: true" in done.stdout
    assert [line.split(":")[0] for line in done.stdout.splitlines() if line[:2] in ("1.", "2.", "3.", "4.", "5.")] == [
        "1. Record 5 demonstrations per task",
        "2. Encode, 5 demonstrations per task",
        "3. Train on 5 demonstrations per task, switch on",
        "4. Let the arm move, 5 demonstrations per task, switch on",
    ]
    assert not output.exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"suite": "metaworld8"}, "Did you mean 'metaworld7'"),
        ({"overrides": ["train.steps=3"]}, "--steps decides it here"),
        ({"overrides": ["train.step=3"]}, "no field 'train.step'"),
        ({"execute": 13}, "--execute 13"),
        ({"tasks": ["fly"]}, "no such task"),
        ({"suite": "metaworld7-wide", "tasks": ["door-open"], "baseline": Path(__file__)}, "no widened layouts"),
        ({"suite": "metaworld7-wide", "baseline": Path("no/such.py")}, "no such script"),
        ({"seed": FIRST_TUNING_LAYOUT - 20}, "Choose a smaller seed"),
        ({"demonstrations": [0]}, "at least 1 per task"),
    ],
)
def test_mistakes_are_named_before_anything_is_done(tmp_path: Path, settings: dict, said: str) -> None:
    with pytest.raises(MvwanError, match=said):
        Reproduction(**{"suite": "metaworld7", "output": tmp_path / "x", **settings})
