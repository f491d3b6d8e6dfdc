"""Closed loop as an outcome of a grid, in the real simulator: a row per trial, arms paired by layout, controls beside them."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from typer.testing import CliRunner

from mvwan import cli
from mvwan.closed_loop import FIRST_TUNING_LAYOUT
from mvwan.files import read_json_lines
from mvwan.policies import POLICIES
from mvwan.sim.metaworld import record

torch.set_num_threads(1)  # sizes are tiny: waking threads costs more than they do

TASK = "handle-press-v3"
LAYOUTS = (FIRST_TUNING_LAYOUT,)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder, stdout) of the command: the switch off and on, one seed, two steps each, as many trials as `LAYOUTS`."""
    folder = tmp_path_factory.mktemp("trials")
    record(TASK, 4, folder / "data", seed=11, size_px=64, progress=False)
    settings = {"data": {"root": str(folder / "data"), "validation_share": 0.5}, "train": {"steps": 2, "warmup_steps": 1}}
    grid = {"preset": "debug", "settings": settings, "vary": {"unfreeze_modulation_and_norms": [False, True]}, "learning_rates": [1e-3]}
    grid |= {"seeds": 1, "windows": 2, "denoise_steps": 1, "execute": 4, "trials": len(LAYOUTS)}
    path = folder / "asked.yaml"
    path.write_text(yaml.safe_dump(grid))
    done = CliRunner().invoke(cli.app, ["ablate", "--grid", str(path), "--output", str(folder / "out")])
    assert done.exit_code == 0, done.output[-3000:]
    return folder / "out", done.stdout


def test_every_trial_is_a_row_and_arms_are_tried_on_the_same_layouts(made: tuple[Path, str]) -> None:
    rows = [row for row in pq.read_table(made[0] / "results.parquet").to_pylist() if row["outcome"] == "success"]
    assert len(rows) == 2 * len(LAYOUTS) and {row["split"] for row in rows} == {"test"}
    assert {row["arm"] for row in rows} == {f"unfreeze_modulation_and_norms={switch}" for switch in ("false", "true")}
    for row in rows:
        lines = read_json_lines(made[0] / "runs" / row["arm"] / "lr-0.001" / "seed-0" / "rollouts.jsonl")
        tried = {f"{line['task']}/{line['layout_seed']}": line for line in lines if line["policy"] == "predicted"}
        assert set(tried) == {f"{TASK}/{layout}" for layout in LAYOUTS}
        assert row["value"] == float(tried[row["episode"]]["success"])


def test_controls_are_tried_once_and_stand_beside_the_rate(made: tuple[Path, str]) -> None:
    folder, said = made
    tried = [line["policy"] for path in folder.rglob("rollouts.jsonl") for line in read_json_lines(path)]
    assert {policy: tried.count(policy) for policy in POLICIES} == {
        policy: len(LAYOUTS) * (2 if policy == "predicted" else 1) for policy in POLICIES
    }
    table, page = (folder / "table.md").read_text(), (folder / "report.html").read_text()
    for text in (said, table):
        assert "Closed-loop success" in text and "| expert waypoints | 1/1" in text and "| hold | 0/1" in text
    assert "Controls of the closed loop" in page and "1/1" in page
