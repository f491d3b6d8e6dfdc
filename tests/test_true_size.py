"""The script that trains at true size, at tiny size: three processes through the command line, on a base that has no codec."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mvwan.files import read_json
from mvwan.model.latents import LatentCodec
from tests.saved import BASE

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "true_size.py"
SMALL = ("data.height_px=64", "data.width_px=64", "data.text_tokens=32", "trainable.lora.rank=4", "base.dtype=bfloat16")


def test_two_steps_are_trained_saved_resumed_and_verified(tiny_demonstrations: Path, tmp_path: Path) -> None:
    output = tmp_path / "true-size"
    command = [sys.executable, str(SCRIPT), "--base", str(BASE), "--data", str(tiny_demonstrations), "--output", str(output)]
    small = [part for setting in SMALL for part in ("--set", setting)]
    done = subprocess.run([*command, *small], capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    found = read_json(output / "true_size.json")
    assert list(found["processes"]) == ["train", "resume", "verify"]
    assert all(0.1 < one["peak_gb"] < 3 for one in found["processes"].values())
    assert len(found["seconds_of_steps"]) == 4
    assert read_json(output / "run" / "movement.json")["first_step"] == 2, "proved again after the resume"
    assert "peak" in done.stdout


@pytest.mark.parametrize("text_dim", [32, 96])
def test_its_codec_gives_text_as_wide_as_the_base_reads(tmp_path: Path, text_dim: int) -> None:
    code = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); from pathlib import Path; import true_size; "
    subprocess.run([sys.executable, "-c", f"{code}true_size.write_codec(Path({str(tmp_path)!r}), {text_dim})"], check=True)
    text = LatentCodec.load(tmp_path, 16).encode_text(["open it"])
    assert text.shape == (1, 16, text_dim)
    assert torch.isfinite(text).all()
    assert text.any()
