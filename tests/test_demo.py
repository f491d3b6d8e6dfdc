"""The demo, at its smallest, as a user starts it: everything real, then started again."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mvwan.checkpoint import load_trained

SMALLEST = ("--task", "handle-press-v3", "--episodes", "2", "--steps", "3", "--windows", "1")


def run_demo(output: Path) -> str:
    """What `mvwan demo` printed."""
    command = [sys.executable, "-m", "mvwan", "demo", "--output", str(output), *SMALLEST]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "120"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("demo") / "run"
    return output, run_demo(output)


def test_the_page_needs_no_network_and_shows_both_runs(demo: tuple[Path, str]) -> None:
    page = (demo[0] / "report.html").read_text(encoding="utf-8")
    loads = re.findall(r"""<(?:script|link|img|video|source|iframe)\b[^>]*\b(?:src|href)=["']([^"']{1,40})""", page)
    assert loads
    assert all(address.startswith("data:") for address in loads), "every script, picture and video is inside the page"
    for shown in (
        "switch off",
        "switch on",
        "modulation",
        "mvs_norms",
        "hold first frame",
        "data:video/mp4;base64,",
        "data:image/png;base64,",
    ):
        assert shown in page, shown


def test_the_runs_differ_by_the_switch_alone(demo: tuple[Path, str]) -> None:
    output, printed = demo
    off, on = (load_trained(output / label) for label in ("off", "on"))
    added = set(on.tensors) - set(off.tensors)
    assert set(off.tensors) < set(on.tensors)
    assert all(re.fullmatch(r"blocks\.\d+\.(scale_shift_table|mvs_attn\.norm_[qk]\.weight)", name) for name in added)
    settings = [dict(run.manifest["config"]) for run in (off, on)]
    assert [one.pop("unfreeze_modulation_and_norms") for one in settings] == [False, True]
    assert settings[0] == settings[1]
    moved = {row["group"] for row in json.loads((output / "on" / "movement.json").read_text())["groups"]}
    assert {"modulation", "mvs_norms"} <= moved
    assert "report.html" in printed


def test_started_again_it_repeats_nothing(demo: tuple[Path, str]) -> None:
    output, _ = demo
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    assert run_demo(output).count("finished earlier") == 6
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")} == before
