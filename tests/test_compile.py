"""`train.compile`: the same run but for rounding, and a clear word where nothing can compile."""

import json
from pathlib import Path
from typing import Any

import pytest

from mvwan.checkpoint import latest_checkpoint, read_manifest
from mvwan.config import Config, config_from_dict, dump_yaml, merge
from mvwan.errors import MvwanError
from mvwan.train import train
from tests.test_train_processes import launch

EXACT: dict[str, Any] = {
    "base": {"dtype": "float32"},
    "model": {"gradient_checkpointing": True, "action_head": "gripper", "view_code": "both"},
    "unfreeze_modulation_and_norms": True,
    "train": {"precision": "no", "evaluate_windows": 3},
}
COMPILED: dict[str, Any] = {"train": {"compile": True}}
TRAIN = """
import sys, torch, yaml
from mvwan.config import config_from_dict
from mvwan.train import train
torch.set_num_threads(1)
train(config_from_dict(yaml.safe_load(open(sys.argv[1] + ".yaml"))), sys.argv[1])
"""


def config_of(values: dict[str, Any], *overrides: dict[str, Any]) -> Config:
    return config_from_dict(merge(values, EXACT, *overrides))


def curve(run: Path) -> list[float]:
    """Losses and gradient norms of every line."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines for name in ("loss", "heat_loss", "gradient_norm") if name in line]


def names_in(run: Path) -> list[str]:
    found = latest_checkpoint(run)
    assert found is not None
    return [name for group in read_manifest(found)["groups"].values() for name in group["names"]]


@pytest.fixture(scope="module")
def plain(golden_run: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("plain") / "run"
    train(config_of(golden_run), output)
    return output


def test_a_compiled_run_is_the_plain_one_but_for_rounding_and_either_goes_on_as_the_other(
    golden_run: dict[str, Any], plain: Path, tmp_path: Path
) -> None:
    train(config_of(golden_run, COMPILED, {"train": {"steps": 2}}), tmp_path / "run")
    train(config_of(golden_run, COMPILED), tmp_path / "run", resume=True)
    assert curve(tmp_path / "run") == pytest.approx(curve(plain), rel=1e-4)
    assert names_in(tmp_path / "run") == names_in(plain)
    train(config_of(golden_run, {"train": {"steps": 5}}), tmp_path / "run", resume=True)


def test_compiled_in_bfloat16(golden_run: dict[str, Any], tmp_path: Path) -> None:
    rounded = {"base": {"dtype": "bfloat16"}, "train": {"precision": "bf16"}}
    for name, more in (("plain", {}), ("compiled", COMPILED)):
        train(config_of(golden_run, rounded, more), tmp_path / name)
    assert curve(tmp_path / "compiled") == pytest.approx(curve(tmp_path / "plain"), rel=0.02)


def test_compiled_by_two_processes_that_share_the_model(golden_run: dict[str, Any], plain: Path, tmp_path: Path) -> None:
    config = config_of(golden_run, COMPILED, {"train": {"gradient_accumulation": 1}})
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    done = launch(tmp_path, ["--use_fsdp", "--fsdp_version", "2", "--main_process_port", "0"], TRAIN, str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert curve(tmp_path / "run") == pytest.approx(curve(plain), rel=1e-4)


def test_without_a_compiler_it_is_refused_before_anything_is_written(
    golden_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(MvwanError, match=r"train.compile=true: .* there is no g\+\+ and no clang\+\+. Install one"):
        train(config_of(golden_run, COMPILED), tmp_path / "run")
    monkeypatch.setenv("CXX", "icpx")
    with pytest.raises(MvwanError, match="there is no icpx"):
        train(config_of(golden_run, COMPILED), tmp_path / "run")
    assert not (tmp_path / "run").exists()
