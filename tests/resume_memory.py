"""Peak memory of a fresh run and of a resumed one, each in a process of its own, with enough trained tensors to show a second copy.

Knows nothing of where a copy comes from.
"""

import re
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from mvwan.checkpoint import latest_checkpoint, read_manifest
from mvwan.config import Config, config_from_dict, merge
from mvwan.model.wan import WanTransformer3DModel
from mvwan.train import train
from tests.kill_and_resume import forking, say_into, small_run

STEPS = 3


@dataclass(frozen=True)
class Peaks:
    """What was measured."""

    trained_bytes: int
    """Of the trained tensors."""
    start_bytes: int
    """Resident in a process that has imported everything and built nothing; part of both figures below."""
    fresh_bytes: int
    """Largest resident size of a run of three steps and its save."""
    resumed_bytes: int
    """The same of a process that resumes it for three more."""

    @property
    def ratio(self) -> float:
        """Resumed to fresh, of what the runs themselves took."""
        return (self.resumed_bytes - self.start_bytes) / (self.fresh_bytes - self.start_bytes)

    def __str__(self) -> str:
        trained, start, fresh, resumed = (
            f"{value / 2**20:,.0f} MiB" for value in (self.trained_bytes, self.start_bytes, self.fresh_bytes, self.resumed_bytes)
        )
        return f"trained tensors {trained}; process {start}, peak fresh {fresh}, peak resumed {resumed}: ratio {self.ratio:.3f}"


def resume_memory(folder: Path, width: int, rank: int, overrides: dict[str, Any] | None = None) -> Peaks:
    """Peaks of two runs into the new folder `folder`, of a base of two blocks `width` wide and LoRA of that rank."""
    folder.mkdir(parents=True)
    settings = small_run(folder)
    torch.manual_seed(0)
    sizes = {"num_attention_heads": width // 64, "attention_head_dim": 64, "ffn_dim": 2 * width, "num_layers": 2, "freq_dim": 32}
    base = WanTransformer3DModel(in_channels=48, out_channels=48, text_dim=128, **sizes)
    base.save_pretrained(folder / "wide" / "transformer")
    del base
    wide = {"base": {"source": str(folder / "wide")}, "trainable": {"lora": {"rank": rank}}}
    quiet = {"train": {"steps": STEPS, "save_every": STEPS, "evaluate_every": 0, "warmup_steps": 0, "schedule": "constant"}}
    fresh = config_from_dict(merge(settings, wide, quiet, overrides or {}))
    resumed = config_from_dict(merge(fresh.to_dict(), {"train": {"steps": 2 * STEPS, "save_every": STEPS}}))
    train_in_small = config_from_dict(merge(settings, {"train": {"steps": 1}}))
    _peak(train_in_small, folder / "latents")  # encodes the windows, so that neither run meets the codec
    cache = {"data": {"cache": str(folder / "latents" / "latents")}}
    start_bytes, fresh_bytes = _peak(config_from_dict(merge(fresh.to_dict(), cache)), folder / "run")
    _, resumed_bytes = _peak(config_from_dict(merge(resumed.to_dict(), cache)), folder / "run")
    newest = latest_checkpoint(folder / "run")
    assert newest is not None and newest.name == f"step-{2 * STEPS:06d}", newest
    parameters = sum(group["parameters"] for group in read_manifest(newest)["groups"].values())
    return Peaks(4 * parameters, start_bytes, fresh_bytes, resumed_bytes)


def _peak(config: Config, output: Path) -> tuple[int, int]:
    """(bytes resident at the start, largest bytes resident) of a process that trains into `output`, resuming what is there."""
    context = forking()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(config.to_dict(), str(output), theirs), daemon=True)
    process.start()
    theirs.close()
    sizes = ours.recv() if ours.poll(300) else None
    process.join()
    assert sizes is not None and process.exitcode == 0, f"{output}: ended with code {process.exitcode}"
    return sizes


def _measure(values: dict[str, Any], output: str, answer: Connection) -> None:
    say_into(f"{output}.log")
    start = _status("VmRSS")
    train(config_from_dict(values), output, resume=True)
    answer.send((start, _status("VmHWM")))


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])
