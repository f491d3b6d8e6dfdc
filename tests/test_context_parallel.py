"""One prediction by two and four processes is that of one process."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from mvwan.cli import app
from tests.saved import BASE, save_run

SCRIPT = """
import sys, torch
from torch import distributed
from mvwan.model.context_parallel import TokenSplit
from mvwan.model.surgery import adapt
from mvwan.model.wan import WanTransformer3DModel
from mvwan.strategy import join_for_prediction

torch.set_num_threads(1)
split, device = join_for_prediction()
for fusion, view_code, head in [("channel", "slot", "none"), ("view", "both", "gripper"), ("view", "camera", "none")]:
    torch.manual_seed(0)
    stock = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=24, in_channels=48, out_channels=48, text_dim=32, freq_dim=32, ffn_dim=96, num_layers=2
    )
    model = adapt(stock.eval().requires_grad_(False), views=3, fusion=fusion, action_head=head, view_code=view_code)[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    latents, text = torch.randn(2, 3, 96, 3, 4, 8), torch.randn(2, 6, 32)
    rays = torch.randn(2, 3, 6, 4, 8) if view_code != "slot" else None
    arguments = dict(timestep=torch.tensor([300.0, 900.0]), text=text, return_action=head != "none", rays=rays)
    answers = []
    with torch.inference_mode():
        for shared in (None, split):
            model.attend_with("auto", shared)
            answer = model(latents, **arguments)
            answers.append(answer if isinstance(answer, tuple) else (answer,))
    for alone, together in zip(*answers, strict=True):
        assert torch.allclose(alone, together, rtol=1e-4, atol=1e-5), (fusion, float((alone - together).abs().max()))
    local = []
    model.blocks[0].register_forward_hook(lambda block, inputs, output: local.append(output.shape[3]))
    model(latents, **arguments)
    assert local == [8 // split.count], "each process has its share of the tokens alone"
print("the same")
"""


def torchrun(processes: int, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def numbers_in(value: Any, name: str = "") -> dict[str, float]:
    """Dotted name -> number of all that is one in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    found = {key: number for inner, held in items for key, number in numbers_in(held, f"{name}.{inner}").items()}
    return found | ({name: float(value)} if isinstance(value, int | float) else {})


@pytest.mark.parametrize("processes", [2, 4])
def test_the_network_answers_as_one_process(tmp_path: Path, processes: int) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = torchrun(processes, str(tmp_path / "script.py"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("the same") == processes


def test_sample_by_two_processes_writes_what_one_writes(debug_run: Path, tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    words = ["sample", str(debug_run), "--denoise-steps", "2", "--output"]
    assert CliRunner().invoke(app, [*words, str(alone)]).exit_code == 0
    done = torchrun(2, "-m", "mvwan", *words, str(together), "--context-parallel")
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in together.iterdir()) == sorted(path.name for path in alone.iterdir())
    assert done.stdout.count("trajectory.json") == 1, "one of them writes"
    one, two = (numbers_in(json.loads((folder / "trajectory.json").read_text())) for folder in (alone, together))
    assert one.keys() == two.keys()
    np.testing.assert_allclose([*one.values()], [*two.values()], rtol=1e-2, atol=0.05)


def test_a_process_that_is_alone_is_told_how_to_start_several(tmp_path: Path) -> None:
    save_run(tmp_path / "run", base={"source": str(BASE), "codec": "tiny"})
    done = CliRunner().invoke(app, ["sample", str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--context-parallel"])
    assert done.exit_code == 2
    assert "torchrun --nproc-per-node 2" in done.output


def test_shares_that_are_not_even_are_refused(debug_run: Path, tmp_path: Path) -> None:
    done = torchrun(3, "-m", "mvwan", "sample", str(debug_run), "--output", str(tmp_path / "out"), "--context-parallel")
    assert done.returncode != 0
    assert "cannot be shared out evenly" in done.stderr
    assert not (tmp_path / "out").exists()
