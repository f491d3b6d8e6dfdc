"""Two training steps of the whole Wan2.2-TI2V-5B with three views, saved, resumed and verified, on random weights: nothing is downloaded.

    python scripts/true_size.py                                  5 pictures per view: 2 latent frames
    python scripts/true_size.py --set data.num_frames=25 --output runs/true-size-25    25 pictures: 7 latent frames
    python scripts/true_size.py --data data/drawer               demonstrations that are there, instead of two that it records
    python scripts/true_size.py --base tiny                      a rehearsal, in two minutes

Everything goes through `mvwan train` itself; pictures through the tiny Wan's VAE, which gives latents of the same shape, prompts through
a text encoder of one random layer as wide as the base's. Prints peak memory and seconds of each process, writes `true_size.json`.

Start `mvwan train` by hand with MALLOC_MMAP_THRESHOLD_=4194304 too: left alone, glibc keeps freed activations of up to 32 MB in a heap
that trained tensors then pin, which took 30 % more memory per block.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import UMT5Config, UMT5EncoderModel

from mvwan.files import read_json_lines, write_json
from mvwan.model.wan import TINY_FOLDER, describe

_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(4 * 2**20)}


def main(arguments: list[str]) -> int:
    """Exit code: 1 when a process failed or took more memory than --most-gb."""
    options = _parse(arguments)
    output: Path = options.output
    if output.exists():
        print(f"--output {output}: is there already. Choose another folder, or remove it.", file=sys.stderr)
        return 2
    output.mkdir(parents=True)
    data = options.data or output / "demonstrations"
    settings = [
        f"base.source={options.base}",
        "base.random_weights=true",
        f"base.codec={write_codec(output / 'codec', describe(options.base).transformer_config['text_dim'])}",
        "train.precision=auto",
        f"data.root={data}",
        "data.num_frames=5",
        "data.past_end=24",
        "train.gradient_accumulation=1",
        "train.warmup_steps=0",
        "train.movement_step=2",
        "train.save_every=2",
        "train.evaluate_every=0",
        "train.tracker=none",
        *options.set,
    ]
    run = output / "run"
    train = ["train", "--preset", "wan2.2-ti2v-5b", "--output", str(run), *(part for one in settings for part in ("--set", one))]
    commands = {
        "record": ["record", "--episodes", "2", "--size-px", "256", "--output", str(data)],
        "train": [*train, "--set", "train.steps=2"],
        "resume": [*train, "--set", "train.steps=4", "--resume"],
        "verify": ["checkpoint", "verify", str(run)],
    }
    found: dict[str, dict[str, Any]] = {}
    for name, command in commands.items():
        if name == "record" and options.data:
            continue
        found[name] = _run(command)
        print(f"{name}: peak {found[name]['peak_gb']:.2f} GB, {found[name]['seconds']:.0f} s", flush=True)
        if found[name]["code"]:
            return 1
    seconds = [line["seconds"] for line in read_json_lines(run / "metrics.jsonl") if line["kind"] == "train"]
    print("seconds of each step:", *(f"{one:.1f}" for one in seconds))
    write_json(output / "true_size.json", {"processes": found, "seconds_of_steps": seconds})
    return int(max(one["peak_gb"] for one in found.values()) > options.most_gb)


def write_codec(folder: Path, text_dim: int) -> Path:
    """`folder`, with the tiny Wan's VAE and tokenizer and a text encoder of random weights whose answers are `text_dim` wide."""
    for part in ("vae", "tokenizer"):
        shutil.copytree(TINY_FOLDER / part, folder / part)
    stored = json.loads((TINY_FOLDER / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    torch.manual_seed(0)
    one_thin_layer = {"d_model": text_dim, "num_layers": 1, "num_heads": 1, "d_kv": 64, "d_ff": 64}
    UMT5EncoderModel(UMT5Config(**(stored | one_thin_layer))).save_pretrained(folder / "text_encoder")
    return folder


def _run(command: list[str]) -> dict[str, Any]:
    """Exit code, largest resident size and seconds of `mvwan` with these arguments."""
    print("mvwan", *command, flush=True)
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "mvwan", *command], env=_ALLOCATOR | os.environ)
    _, status, usage = os.wait4(process.pid, 0)
    code = process.returncode = os.waitstatus_to_exitcode(status)
    return {"code": code, "peak_gb": usage.ru_maxrss * 1024 / 1e9, "seconds": time.perf_counter() - start}


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="wan2.2-ti2v-5b", help="whose sizes; its weights are not read")
    parser.add_argument("--data", type=Path, help="demonstrations in three views; not given: two are recorded")
    parser.add_argument("--output", type=Path, default=Path("runs/true-size"), help="folder that does not exist yet")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a setting of `mvwan train`; repeatable")
    parser.add_argument("--most-gb", type=float, default=20, help="peak memory beyond which the exit code is 1")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
