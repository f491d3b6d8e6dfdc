"""`mvwan checkpoint ...` as users meet it: output, exit codes, and nothing but JSON on stdout where JSON was asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from mvwan import cli
from mvwan.checkpoint import read_manifest
from mvwan.model.multiview_wan import MultiViewWan
from tests.saved import BASE, GOLDEN, save_run

torch.set_num_threads(1)  # sizes are tiny: waking threads costs more than they do


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["checkpoint", *map(str, arguments)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, `off` and `on`; in `off` the projector stood still."""
    folder = tmp_path_factory.mktemp("runs")
    save_run(folder / "off", still=("projector",))
    save_run(folder / "on", unfreeze_modulation_and_norms=True, ema=True, step=6)
    return folder


def test_inspect_as_json_is_the_manifest_and_where_it_was_found(runs: Path) -> None:
    done = run("inspect", runs / "on", "--json")
    found = runs / "on" / "checkpoints" / "step-000006"
    assert (done.exit_code, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"path": str(found), "manifest": read_manifest(found)}
    older = json.loads(run("inspect", GOLDEN / "trained_frozen.safetensors", "--json").stdout)
    assert (older["manifest"]["format_version"], older["manifest"]["lora"]) == (0, {"rank": 4, "alpha": None})
    assert "all digests match" in run("inspect", runs / "on").stdout


def test_verify_is_one_line_and_exit_code_0(runs: Path) -> None:
    done = run("verify", runs / "on")
    assert done.exit_code == 0
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith(f"{runs / 'on' / 'checkpoints' / 'step-000006'}: ")
    against = run("verify", runs / "off", "--against", BASE)
    assert against.exit_code == 0
    assert next(line for line in against.stdout.splitlines() if "did not move" in line).startswith("│ projector")


def test_damage_and_another_base_are_exit_code_2_and_one_sentence(runs: Path, tmp_path: Path) -> None:
    save_run(tmp_path / "run")
    optimizer = tmp_path / "run" / "checkpoints" / "step-000004" / "optimizer.safetensors"
    data = bytearray(optimizer.read_bytes())
    data[-1] ^= 1
    optimizer.write_bytes(data)
    for done in (run("verify", tmp_path / "run"), run("verify", runs / "on", "--against", "tiny")):
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


def test_diff_is_a_report_whatever_it_finds(runs: Path) -> None:
    differ, equal = run("diff", runs / "off", runs / "on"), run("diff", runs / "on", runs / "on")
    assert (differ.exit_code, equal.exit_code) == (0, 0)
    assert "Said differently" in differ.stdout
    assert differ.stdout.index("switch") < differ.stdout.index("modulation_mvs")
    assert differ.stdout.endswith("the tensors differ\n")
    assert "Said differently" not in equal.stdout
    assert equal.stdout.endswith("same tensors to the bit\n")
    data = json.loads(run("diff", runs / "off", runs / "on", "--json").stdout)
    assert data["identity"]["switch"] == {"a": False, "b": True}
    assert {group["group"] for group in data["groups"] if group["only_b"]} == {"modulation", "mvs_norms"}


def test_export_in_a_real_process_and_what_it_leaves(runs: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mvwan",
        "checkpoint",
        "export",
        str(runs / "on"),
        "--format",
        "multiview",
        "--output",
        "whole",
        "--ema",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path, env={**os.environ})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("whole\n  MultiViewWan, ")
    assert {path.name for path in tmp_path.iterdir()} == {"whole"}
    (tmp_path / "plain").write_text("")
    assert {path.stat().st_mode for path in (tmp_path / "whole").iterdir()} == {(tmp_path / "plain").stat().st_mode}
    assert MultiViewWan.from_pretrained(tmp_path / "whole").config.fusion == "channel"


def test_export_refuses_in_one_sentence_and_writes_nothing(runs: Path, tmp_path: Path) -> None:
    for arguments, says in (
        (["--format", "merged"], "no stock transformer equals its RGB half"),
        (["--format", "wan-native"], "ends with .safetensors"),
        (["--format", "multiview", "--ema"], "holds no moving average"),
        (["--format", "multiview", "--base", "./nowhere"], "no such file or folder"),
        (["--format", "diffusers-lora", "--rgb-only"], "--rgb-only: nothing of a diffusers-lora export depends on it"),
    ):
        done = run("export", runs / "off", "--output", tmp_path / "out", *arguments)
        assert (done.exit_code, done.stdout) == (2, "")
        assert says in done.stderr
        assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
