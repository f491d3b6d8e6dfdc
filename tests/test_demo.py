"""The whole demo, really run at its smallest, and what its users do with what it leaves."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mvwan import cli, cli_settings
from mvwan.demo import run_demo
from mvwan.errors import MvwanError
from mvwan.model.wan import TINY_FOLDER
from tests.test_report import Page

SMALLEST = ["--episodes", "2", "--steps", "2", "--windows", "1", "--trials", "1"]


def demo(output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mvwan", "demo", "--output", str(output), *SMALLEST, *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, env={**os.environ, "COLUMNS": "150"})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder, what was printed) of the smallest demo."""
    output = tmp_path_factory.mktemp("runs") / "demo"
    done = demo(output)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return output, done.stdout


def test_console_names_stages_tables_summary_and_report(made: tuple[Path, str]) -> None:
    output, printed = made
    stages = re.findall(r"^(\d+)\. (.+?) ─", printed, re.MULTILINE)
    assert [number for number, _ in stages] == [str(number) for number in range(1, 11)]
    assert [name.split()[0] for _, name in stages] == [
        "Record",
        "What",
        "Encode",
        "Fine-tune,",
        "Fine-tune,",
        "Measure",
        "Measure",
        "Let",
        "Let",
        "Report",
    ]
    assert "Off and on, side by side" in printed
    assert "MODULATION PARAMETERS: KEEPING FROZEN" in printed
    assert "MODULATION PARAMETER UNFREEZING" in printed
    assert printed.count("•") == 5
    assert "decide nothing about the switch" in re.sub(r"[│\s]+", " ", printed)
    assert printed.rstrip().endswith(f"report: {output / 'report.html'}")


def test_report_is_whole_and_needs_no_network(made: tuple[Path, str]) -> None:
    page = Page((made[0] / "report.html").read_text(encoding="utf-8"))
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    assert sum(source.startswith("data:image/webp") for source in page.sources) == 3 + 3 * 6
    assert sum(source.startswith("data:video/mp4") for source in page.sources) == 1 + 2 + 3
    assert page.text.count("control steps") >= 5
    for label in ("off", "on"):
        table = json.loads((made[0] / label / "table.json").read_text())
        assert f"{table['trainable_parameters']:,}" in page.text
        for group in table["groups"]:
            assert group["name"] in page.text
            assert f"{group['parameters']:,}" in page.text
    assert [figure["layout"]["title"]["text"] for figure in page.figures][-5:] == [
        "Peak error by frame",
        "3-D error by frame",
        "RGB PSNR by frame",
        "Peak error by window",
        "Path of the tool point",
    ]
    moved = {dots["name"]: set(dots["y"]) for dots in page.figures[0]["data"]}
    assert moved["on"] - moved["off"] == {"modulation", "mvs_norms"}
    assert page.figures[2]["data"][0]["x"] == [1, 2]
    assert "1 held-out window of 1 episode" in page.text
    assert "handle-press-v3" in page.text


def test_both_runs_start_from_the_same_numbers_and_share_one_cache(made: tuple[Path, str]) -> None:
    output = made[0]
    first = [json.loads((output / label / "metrics.jsonl").read_text().splitlines()[0]) for label in ("off", "on")]
    assert first[0]["step"] == 0
    assert first[0]["bands"] == first[1]["bands"]
    assert not list(output.glob("o*/latents"))
    assert list((output / "latents").rglob("*.safetensors"))
    groups = [json.loads(next(output.glob(f"{label}/checkpoints/step-*/manifest.json")).read_text())["groups"] for label in ("off", "on")]
    trained = [{name for group in held.values() if group["mode"] != "frozen" for name in group["names"]} for held in groups]
    assert {re.sub(r"\d+", "N", name) for name in trained[1] - trained[0]} == {
        "blocks.N.scale_shift_table",
        "blocks.N.mvs_attn.norm_q.weight",
        "blocks.N.mvs_attn.norm_k.weight",
    }


def test_a_second_demo_repeats_nothing_and_another_length_only_what_depends_on_it(made: tuple[Path, str]) -> None:
    output = made[0]
    kept = {path: path.stat().st_mtime_ns for name in ("demonstrations", "latents", "off", "on") for path in (output / name).rglob("*")}
    done = demo(output)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("finished earlier") == 8
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def run(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments), env={cli_settings.SWITCH_VARIABLE: None})


def test_dry_run_counts_the_windows(made: tuple[Path, str], tmp_path: Path) -> None:
    done = run("train", "--dry-run", "--output", str(tmp_path / "x"), "--set", f"data.root={made[0] / 'demonstrations'}")
    assert done.exit_code == 0, done.output
    assert re.search(r"^windows: \d+ train, \d+ validation$", done.stdout, re.MULTILINE)
    assert not (tmp_path / "x").exists()


def test_inspect_shows_the_checkpoint_and_finds_a_changed_bit(made: tuple[Path, str], tmp_path: Path) -> None:
    done = run("checkpoint", "inspect", str(made[0] / "on"))
    assert done.exit_code == 0, done.output
    assert "all digests match" in done.stdout
    assert re.search(r"mvs_norms\s+│ full", done.stdout)
    damaged = tmp_path / "damaged" / "checkpoints" / "step-000002"
    damaged.parent.mkdir(parents=True)
    subprocess.run(["cp", "-r", str(made[0] / "on" / "checkpoints" / "step-000002"), str(damaged)], check=True)
    file = damaged / "trained.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    done = run("checkpoint", "inspect", str(damaged))
    assert done.exit_code == 2
    assert "damaged" in done.stderr


def test_a_wrong_shaped_base_is_refused_before_anything_is_written(made: tuple[Path, str], tmp_path: Path) -> None:
    base = tmp_path / "base" / "transformer"
    base.mkdir(parents=True)
    (base / "config.json").write_bytes((TINY_FOLDER / "transformer" / "config.json").read_bytes())
    tensors = load_file(TINY_FOLDER / "transformer" / "diffusion_pytorch_model.safetensors")
    tensors["patch_embedding.bias"] = torch.zeros(7)
    save_file(tensors, base / "diffusion_pytorch_model.safetensors")
    output = tmp_path / "run"
    settings = [
        f"base.source={tmp_path / 'base'}",
        "base.codec=tiny",
        f"data.root={made[0] / 'demonstrations'}",
        f"data.cache={made[0] / 'latents'}",
    ]
    done = run("train", "--output", str(output), *(word for setting in settings for word in ("--set", setting)))
    assert done.exit_code == 2, done.output
    assert "patch_embedding.bias is [7]" in done.stderr
    assert not output.exists()


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(MvwanError, match="no demo of mvwan"):
        run_demo(tmp_path, fresh=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
