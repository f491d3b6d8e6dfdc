"""Training that is stopped from outside: SIGTERM, a full or read-only disk, data that vanishes, a cache that rots, a loss that is NaN.

Each time: a clear error, no half file, no lost checkpoint, and the run goes on from there to the bit.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mvwan import latent_shards
from mvwan.checkpoint import TRAINED, list_checkpoints, load_trained, read_optimizer
from mvwan.config import Config, config_from_dict, dump_yaml, merge
from mvwan.errors import MvwanError, PreemptedError
from mvwan.files import read_json_lines, sha256_file
from mvwan.train import train
from tests.latents import change_entry, keys_of, put_nan

torch.set_num_threads(1)  # sizes are tiny: waking threads costs more than they do

ENDLESS: dict[str, Any] = {"train": {"steps": 100_000, "evaluate_every": 0, "save_every": 100_000}}


def config_of(values: dict[str, Any], *overrides: dict[str, Any]) -> Config:
    return config_from_dict(merge(values, *overrides))


def tensor_digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in folder.glob("*.safetensors")}


def train_lines(output: Path) -> int:
    return sum(line["kind"] == "train" for line in read_json_lines(output / "metrics.jsonl"))


def after_two_steps(output: Path, act: Callable[[], object]) -> threading.Thread:
    """Does `act` once the run in `output` has logged two steps."""

    def wait() -> None:
        while train_lines(output) < 2:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def no_half_file(output: Path) -> bool:
    return not list(output.rglob(".*.partial"))


# ── SIGTERM ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("async_save", [False, True])
def test_sigterm_saves_and_the_run_goes_on_to_the_bit(golden_run: dict[str, Any], tmp_path: Path, async_save: bool) -> None:
    more = {"unfreeze_modulation_and_norms": True, "train": {"ema_decay": 0.5, "async_save": async_save}}
    config = config_of(golden_run, ENDLESS, more)
    before = signal.getsignal(signal.SIGTERM)
    after_two_steps(tmp_path / "run", lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(PreemptedError, match=r"stopped by SIGTERM at step \d+ of 100000, which is saved; --resume goes on"):
        train(config, tmp_path / "run")
    assert signal.getsignal(signal.SIGTERM) == before
    (stopped,) = list_checkpoints(tmp_path / "run")
    step = int(stopped.name.removeprefix("step-"))
    assert 2 <= step == train_lines(tmp_path / "run")

    end = {"train": {"steps": step + 2}}
    resumed = train(config_of(config.to_dict(), end), tmp_path / "run", resume=True)
    whole = train(config_of(config.to_dict(), end, {"train": {"async_save": False}}), tmp_path / "whole")
    assert tensor_digests(resumed.checkpoint) == tensor_digests(whole.checkpoint)
    assert [line["loss"] for line in resumed.history] == [line["loss"] for line in whole.history]


@pytest.mark.parametrize("whole_group", [False, True])
def test_sigterm_ends_the_command_with_code_75(golden_run: dict[str, Any], tmp_path: Path, whole_group: bool) -> None:
    """Also when the processes that load windows get it as well, as a whole group of processes does."""
    (tmp_path / "settings.yaml").write_text(dump_yaml(config_of(golden_run, ENDLESS, {"train": {"num_workers": int(whole_group)}})))
    command = [sys.executable, "-m", "mvwan", "train", "--config", "settings.yaml", "--output", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True)
    stop = (lambda: os.killpg(process.pid, signal.SIGTERM)) if whole_group else process.terminate
    after_two_steps(tmp_path / "run", stop).join(timeout=120)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 75, errors
    assert re.search(r"^stopped: run: stopped by SIGTERM at step \d+ of 100000", errors.splitlines()[-1])
    assert "Traceback" not in errors
    assert len(list_checkpoints(tmp_path / "run")) == 1


def test_a_second_training_in_the_folder_is_refused_while_the_first_is_there(golden_run: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(golden_run, ENDLESS)
    (tmp_path / "settings.yaml").write_text(dump_yaml(config))
    command = [sys.executable, "-m", "mvwan", "train", "--config", "settings.yaml", "--output", "run"]
    first = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        after_two_steps(tmp_path / "run", lambda: None).join(timeout=120)
        with pytest.raises(MvwanError, match=r"run/checkpoints: another command is at work in it"):
            train(config, tmp_path / "run", resume=True)
    finally:
        first.terminate()
    assert first.wait(timeout=60) == 75
    (stopped,) = list_checkpoints(tmp_path / "run")
    step = int(stopped.name.removeprefix("step-"))
    assert step == train_lines(tmp_path / "run")
    assert train(config_of(config.to_dict(), {"train": {"steps": step + 1}}), tmp_path / "run", resume=True).step == step + 1


# ── the disk ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

# In a mount namespace of its own, on a small file system: two steps, then no space is left; then space, but read-only.
SMALL_DISK = """
set -e
mount -t tmpfs -o size=32m none "$1/disk"
"$2" - "$1" <<'CODE'
import os, subprocess, sys, yaml, torch
from mvwan.config import config_from_dict, merge
from mvwan.errors import MvwanError
from mvwan.train import train

torch.set_num_threads(1)
place = sys.argv[1]
values = yaml.safe_load(open(place + "/settings.yaml"))

def run(name, more, **options):
    try:
        train(config_from_dict(merge(values, more)), place + "/disk/run", **options)
    except MvwanError as error:
        print(f"{name}: {error}", flush=True)
    else:
        print(f"{name}: done", flush=True)

def fill():
    with open(filler, "ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass

filler = place + "/disk/filler"
run("first", {"train": {"steps": 2}})
fill()
with open(filler, "r+b") as file:
    file.truncate(os.path.getsize(filler) - 20 * 4096)  # enough to log, not to save
run("full", {"train": {"steps": 4}}, resume=True)
run("full in the background", {"train": {"steps": 4, "async_save": True}}, resume=True)
fill()
run("full to the brim", {"train": {"steps": 4}}, resume=True)
os.remove(filler)
subprocess.run(["mount", "-o", "remount,ro", place + "/disk"], check=True)
run("read-only", {"train": {"steps": 4}}, resume=True)
subprocess.run(["mount", "-o", "remount,rw", place + "/disk"], check=True)
run("again", {"train": {"steps": 4}}, resume=True)
CODE
cp -r "$1/disk/run" "$1/run"
"""
NAMESPACE = ["unshare", "--mount", "--map-root-user"]


def may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="needs mount namespaces: a small file system of its own")
def test_a_full_or_read_only_disk_is_an_error_and_loses_nothing(golden_run: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    more = {"train": {"save_every": 1, "keep_last": 2}}
    (tmp_path / "settings.yaml").write_text(dump_yaml(config_of(golden_run, more)))
    command = [*NAMESPACE, "bash", "-c", SMALL_DISK, "bash", str(tmp_path), sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines() if re.match(r"(first|full|read-only|again)", line))
    assert said["first"] == said["again"] == "done"
    for name in ("full", "full in the background", "full to the brim"):
        assert re.search(r"/disk/run.*cannot be written \(.*(No space left|os error 28).*Free some space", said[name]), said
    assert re.search(r"cannot be written \(Read-only file system\)", said["read-only"]), said
    assert "Traceback" not in done.stderr
    assert no_half_file(tmp_path / "run")
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-000003", "step-000004"]
    whole = train(config_of(golden_run, more), tmp_path / "whole")
    assert tensor_digests(list_checkpoints(tmp_path / "run")[-1]) == tensor_digests(whole.checkpoint)


def test_a_background_save_that_fails_is_not_forgotten(golden_run: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(golden_run, {"train": {"steps": 6, "save_every": 2, "evaluate_every": 0, "async_save": True}})

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    with pytest.raises(MvwanError, match=r"run/checkpoints.*cannot be written \((File exists|Not a directory)\)"):
        train(config, tmp_path / "run")


# ── data and cache ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def own_cache(golden_run: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The settings, with a copy of the latent cache that may be spoiled."""
    shutil.copytree(golden_run["data"]["cache"], tmp_path / "latents")
    return merge(golden_run, {"data": {"cache": str(tmp_path / "latents")}})


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cache_that_vanishes_while_training_is_an_error(own_cache: dict[str, Any], tmp_path: Path, workers: int) -> None:
    config = config_of(own_cache, ENDLESS, {"train": {"save_every": 1, "keep_last": 1, "num_workers": workers}})
    after_two_steps(tmp_path / "run", lambda: shutil.rmtree(tmp_path / "latents"))
    with pytest.raises(MvwanError, match=r"latent cache entry .*no such file.*Start the run again") as error:
        train(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    (saved,) = list_checkpoints(tmp_path / "run")
    load_trained(saved)
    read_optimizer(saved)


def test_a_dataset_that_vanishes_is_an_error_and_half_a_cache_is_of_use(
    golden_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(golden_run["data"]["root"], tmp_path / "data")
    more = {"base": {"source": "tiny", "codec": None}, "data": {"root": str(tmp_path / "data"), "cache": str(tmp_path / "cache")}}
    more["train"] = {"steps": 2, "evaluate_every": 0}
    config = config_of(golden_run, more)
    gone = threading.Event()

    monkeypatch.setattr(latent_shards, "SHARD_ENTRIES", 1)  # none waits for others

    def remove_videos() -> None:
        while not gone.is_set() and len(list((tmp_path / "cache").rglob("*.safetensors"))) < 2:
            time.sleep(0.01)
        shutil.rmtree(tmp_path / "data" / "videos")

    thread = threading.Thread(target=remove_videos, daemon=True)
    thread.start()
    try:
        with pytest.raises(MvwanError, match=r"\.mp4: no such file"):
            train(config, tmp_path / "run")
    finally:
        gone.set()
        thread.join()
    kept = {path: sha256_file(path) for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert len(kept) >= 2
    assert no_half_file(tmp_path)
    assert not (tmp_path / "run" / "checkpoints").exists()
    shutil.copytree(Path(golden_run["data"]["root"]) / "videos", tmp_path / "data" / "videos")
    train(config, tmp_path / "run", resume=True)
    assert all(sha256_file(path) == digest for path, digest in kept.items()), "what was encoded before is used"

    # Entries rot: one flipped bit, one cut short, one empty. The next start encodes them again, to the same bits, and says so.
    entries = sorted((tmp_path / "cache").rglob("*.safetensors"))
    whole = {path: path.read_bytes() for path in entries}
    flipped = bytearray(whole[entries[0]])
    flipped[-5] ^= 4
    entries[0].write_bytes(flipped)
    entries[1].write_bytes(whole[entries[1]][:200])
    entries[2].write_bytes(b"")
    resumed = train(config_of(config.to_dict(), {"train": {"steps": 3}}), tmp_path / "run", resume=True)
    assert resumed.step == 3
    assert {path: path.read_bytes() for path in entries} == whole
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(MvwanError, match="no such folder"):
        train(config_of(config.to_dict(), {"train": {"steps": 4}}), tmp_path / "run", resume=True)
    assert load_trained(tmp_path / "run").manifest["step"] == 3


# ── NaN ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_held_out_loss_that_is_not_a_number_stops_the_run_before_it_is_saved(own_cache: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(own_cache)
    keys = keys_of(config, tmp_path / "latents", "validation")
    for item in range(len(keys)):
        change_entry(keys, item, put_nan)
    with pytest.raises(MvwanError, match=r"step 0: the held-out loss is NaN or infinite at sigma 0\.00-0\.25, .*train\.learning_rate"):
        train(config, tmp_path / "run")
    assert list_checkpoints(tmp_path / "run") == []


def test_a_damaged_newest_checkpoint_is_an_error_and_not_a_silent_step_back(golden_run: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(golden_run, {"train": {"save_every": 1, "steps": 2, "evaluate_every": 0}})
    result = train(config, tmp_path / "run")
    path = result.checkpoint / TRAINED
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with pytest.raises(MvwanError, match=r"step-000002.*without this folder, --resume goes on from the one before"):
        train(config_of(config.to_dict(), {"train": {"steps": 3}}), tmp_path / "run", resume=True)
    assert len(list_checkpoints(tmp_path / "run")) == 2
    shutil.rmtree(result.checkpoint)
    resumed = train(config_of(config.to_dict(), {"train": {"steps": 3}}), tmp_path / "run", resume=True)
    whole = train(config_of(config.to_dict(), {"train": {"steps": 3}}), tmp_path / "whole")
    assert tensor_digests(resumed.checkpoint) == tensor_digests(whole.checkpoint)
