"""The files for launching: accelerate reads each as what it is called, and the Slurm script starts every node with its own rank."""

import os
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "accelerate"
STAND_INS = {
    "scontrol": 'echo "node-a"; echo "node-b"',
    "srun": 'for rank in 0 1; do SLURM_NODEID=$rank "$@"; done',
    "accelerate": 'echo "$@"',
}


@pytest.mark.parametrize(
    ("name", "kind", "inside"),
    [
        ("ddp", "MULTI_GPU", {}),
        ("fsdp2", "FSDP", {"fsdp_version": 2, "fsdp_transformer_layer_cls_to_wrap": "MultiViewWanBlock"}),
        ("zero1", "DEEPSPEED", {"zero_stage": 1}),
        ("zero2", "DEEPSPEED", {"zero_stage": 2}),
    ],
)
def test_accelerate_reads_each_file(name: str, kind: str, inside: dict[str, object]) -> None:
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert str(config.distributed_type).rpartition(".")[2] == kind
    assert config.mixed_precision == "no", "the settings of the run decide"
    assert inside.items() <= {**config.fsdp_config, **config.deepspeed_config}.items()
    assert f"configs/accelerate/{name}.yaml" in (CONFIGS / f"{name}.yaml").read_text()


def test_every_file_is_tested() -> None:
    assert {path.stem for path in CONFIGS.iterdir()} == {"ddp", "fsdp2", "zero1", "zero2"}


def test_slurm_starts_every_node_with_its_rank(tmp_path: Path) -> None:
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "node-[a-b]"}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "configs" / "slurm" / "train.sbatch"), "data/with space", "runs/5b"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "--num_machines 2 --machine_rank 0 --num_processes 16 --main_process_ip node-a" in first
    assert second == first.replace("--machine_rank 0", "--machine_rank 1")
    assert "--set data.root=data/with space --output runs/5b --resume" in first
    assert (ROOT / first.split("--config_file ")[1].split()[0]).is_file()


def test_slurm_without_folders_says_which() -> None:
    done = subprocess.run(["bash", str(ROOT / "configs" / "slurm" / "train.sbatch")], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "folder of the demonstrations" in done.stderr
