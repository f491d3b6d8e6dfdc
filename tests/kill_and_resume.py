"""Kills training with SIGKILL at drawn moments, resumes it, and compares what it leaves with a run that nobody disturbed, bit for bit.

A run is the real trainer in a process of its own: the real classes at tiny size, latents encoded by the codec, switch, moving average,
warm-up, cosine and accumulation on. Processes are forked from one that has imported everything and computed nothing, so a kill costs
a second, not the ten of a new interpreter. Knows what the files of a run promise; knows nothing of how they come to be.
"""

import multiprocessing
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mvwan.checkpoint import list_checkpoints, load_trained, read_manifest, read_optimizer
from mvwan.config import Config, config_from_dict, merge, read_yaml
from mvwan.errors import MvwanError
from mvwan.files import read_json, read_json_lines, sha256_file
from mvwan.latent_cache import TEXT, WINDOW, read_entry
from mvwan.latent_shards import Shards
from mvwan.model.wan import WanTransformer3DModel
from mvwan.tensors import TensorFile, digest
from mvwan.train import train
from tests.demonstrations import write_demonstrations

_POLL_S = 0.0005
_LONGEST_ATTEMPT_S = 120
_HIDDEN = re.compile(r"\.step-(\d+)\.\w+\.partial")
_FILES = ("config.yaml", "table.json", "first_batch.png")


def small_run(folder: Path) -> dict[str, Any]:
    """Settings of a run of 20 steps and about five seconds; its demonstrations and its base are written to `folder`."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 96, "num_layers": 2, "freq_dim": 32}
    base = WanTransformer3DModel(in_channels=48, out_channels=48, text_dim=128, **sizes)  # prompts as wide as the tiny text encoder's
    base.save_pretrained(folder / "base" / "transformer")
    return {
        "base": {"source": str(folder / "base"), "codec": "tiny"},
        "trainable": {"lora": {"rank": 4}},
        "unfreeze_modulation_and_norms": True,
        "data": {"root": str(write_demonstrations(folder / "ball")), **_WINDOWS},
        "train": {**_LOOP, **_UPDATES},
    }


_WINDOWS = {"num_frames": 5, "window_stride": 4, "height_px": 64, "width_px": 64, "heatmap_sigma_px": 2.5, "text_tokens": 32}
_LOOP = {"steps": 20, "save_every": 2, "keep_last": 2, "evaluate_every": 4, "evaluate_windows": 2, "movement_step": 2, "tracker": "none"}
_UPDATES = {"batch_size": 1, "gradient_accumulation": 2, "learning_rate": 1e-3, "warmup_steps": 4, "schedule": "cosine", "ema_decay": 0.9}


# ── processes ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def forking() -> ForkServerContext:
    """Where processes come from: forks of one that has imported all that training needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mvwan.train", "transformers.models.umt5.modeling_umt5"])
    return context


def say_into(log: str) -> None:
    """Nothing; what this process prints goes to the file `log`, and it computes on one thread: sizes are tiny."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a killed process leaks


def start_training(config: Config, output: Path) -> BaseProcess:
    """The process that trains into `output`, resuming what is there; what it prints goes to `<output>.log`, its last words with it."""
    process = forking().Process(target=_train, args=(config.to_dict(), str(output)), daemon=True)
    process.start()
    return process


def _train(values: dict[str, Any], output: str) -> None:
    say_into(f"{output}.log")
    train(config_from_dict(values), output, resume=True)


def _wait(process: BaseProcess, happened: Callable[[], bool]) -> bool:
    """Whether it happened, as soon as it did, while the process lived."""
    end = time.monotonic() + _LONGEST_ATTEMPT_S
    while process.is_alive():
        if happened():
            return True
        assert time.monotonic() < end, f"process {process.pid} neither ended nor went on in {_LONGEST_ATTEMPT_S} s"
        time.sleep(_POLL_S)
    return False


# ── what is on the disk ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except FileNotFoundError:
        return set()


def _step_of(name: str) -> int:
    return int(name.removeprefix("step-"))


def _hidden(output: Path) -> set[Path]:
    return set(output.rglob(".*.partial"))


def _newest(output: Path) -> int:
    return max((_step_of(path.name) for path in list_checkpoints(output)), default=0)


def _without_times(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def broken_promises(output: Path, newest_before: int, keep_last: int) -> Iterator[str]:
    """A sentence for each promise about the files of a run that does not hold in `output`, whose process was just killed."""
    folder = output / "checkpoints"
    found = list_checkpoints(output)
    for path in folder.glob("step-*"):
        if path not in found:
            yield f"{path.name} has its final name and no commit mark"
    for path in found:
        try:
            trained, moments = load_trained(path), read_optimizer(path)
            for tensors in (trained.tensors, load_trained(path, ema=True).tensors, moments[0]):
                if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
                    yield f"{path.name} holds numbers that are not finite"
            if not trained.manifest["step"] == moments[1]["step"] == _step_of(path.name):
                yield f"{path.name} says that it is of another step"
        except MvwanError as error:
            yield f"{path.name} cannot be loaded: {error}"
    if _newest(output) < newest_before:
        yield f"step {newest_before} was saved, and the newest is now {_newest(output)}"
    if len(found) > keep_last + 2:  # the best one, and one that is to be removed
        yield f"{len(found)} checkpoints are kept, keep_last is {keep_last}"
    for pointer in (folder / "latest", folder / "best"):
        if pointer.exists() and folder / pointer.read_text().strip() not in found:
            yield f"the pointer {pointer.name} names {pointer.read_text().strip()!r}, which is not there"
    yield from _broken_records(output)


def _broken_records(output: Path) -> Iterator[str]:
    try:
        lines = read_json_lines(output / "metrics.jsonl")
        steps = [line["step"] for line in lines if line["kind"] == "train"]
        if steps != list(range(1, len(steps) + 1)) or len(steps) < _newest(output):
            yield f"metrics.jsonl has the steps {steps}, the newest checkpoint is of step {_newest(output)}"
        for name in ("table.json", "movement.json"):
            if (output / name).exists():
                read_json(output / name)
        if (output / "config.yaml").exists():
            config_from_dict(read_yaml(output / "config.yaml"))
        if "" in _latents(output).values():
            yield "some latents are not those that were written"
    except MvwanError as error:
        yield str(error)


def final_state(output: Path) -> dict[str, Any]:
    """All that a finished run leaves and that must not depend on how often it was killed; digests for what is large."""
    kept = list_checkpoints(output)
    pointers = {name: path.read_text() for name in ("latest", "best") if (path := output / "checkpoints" / name).exists()}
    state: dict[str, Any] = {"checkpoints": [path.name for path in kept], "pointers": pointers}
    for path in kept:
        moments, progress = read_optimizer(path)
        state |= {
            f"{path.name}: trained tensors": digest(load_trained(path).tensors),
            f"{path.name}: moving average": digest(load_trained(path, ema=True).tensors),
            f"{path.name}: optimizer": digest(moments),
            f"{path.name}: state.json": progress,
            f"{path.name}: manifest.json": read_manifest(path),
        }
    state |= {name: sha256_file(output / name) for name in _FILES}
    state["latents"] = _latents(output)
    lines = _without_times(read_json_lines(output / "metrics.jsonl"))
    state |= {f"metrics.jsonl: {kind}": [line for line in lines if line["kind"] == kind] for kind in ("train", "held_out")}
    state["metrics.jsonl: order"] = [(line["kind"], line["step"]) for line in lines]
    return state


def _latents(output: Path) -> dict[str, str]:
    """Key of each latent entry -> digest of its content, empty where that is not what was written; which shards hold them is no matter."""
    found = {path.name: digest(read_entry(path, TEXT)) for path in (output / "latents" / "text").glob("[!.]*.safetensors")}
    for path in (output / "latents" / "shards").glob("[!.]*.safetensors"):
        keys = TensorFile(path)["keys"].numpy()
        shards = Shards(output / "latents", WINDOW)
        for key, place in zip(keys, shards.find(keys).tolist(), strict=True):
            found[key.tobytes().hex()] = "" if shards.damaged(np.array([place])) else digest(shards.read(place))
    return found


def differences(got: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between two `final_state`, by name."""
    return [f"{name} differs" for name in wanted if got.get(name) != wanted[name]] + [
        f"{name} is new" for name in got.keys() - wanted.keys()
    ]


# ── when to kill ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

MODES = ("save", "rename", "metrics", "records", "time", "cache")


def _moment(mode: str, output: Path, draw: np.random.Generator) -> tuple[Callable[[], bool], float]:
    """(whether to strike now, seconds to wait before striking) of one attempt."""
    nth = int(draw.integers(1, 4))
    if mode == "time":
        start, delay = time.monotonic(), draw.uniform(0.0, 2.0)
        return lambda: time.monotonic() - start >= delay, 0.0
    if mode == "metrics":
        path = output / "metrics.jsonl"
        sizes: list[int] = []

        def grown() -> bool:
            size = path.stat().st_size if path.exists() else 0
            if not sizes or size != sizes[-1]:
                sizes.append(size)
            return len(sizes) > 2 * nth

        return grown, draw.uniform(0.0, 0.002)
    folder, pattern, longest_s = {
        "save": (output / "checkpoints", r"\.step-\d+\..*", 0.025),
        "rename": (output / "checkpoints", r"step-\d+", 0.003),
        "cache": (output / "latents" / "shards", r".*", float(draw.choice([0.003, 0.4]))),
        "records": (output, r"\..*", 0.002),
    }[mode]
    before = _names(folder)
    seen: set[str] = set()

    def appeared() -> bool:
        seen.update(name for name in _names(folder) - before if re.fullmatch(pattern, name))
        return len({_HIDDEN.sub(r"\1", name) for name in seen}) >= nth

    return appeared, draw.uniform(0.0, longest_s)


def _struck(output: Path, hidden_before: set[Path]) -> str:
    """In the middle of what the process was killed, judged by what it left."""
    newest = _newest(output)
    for path in sorted(_hidden(output) - hidden_before):
        step = _HIDDEN.fullmatch(path.name)
        if step is not None:
            return "writing a checkpoint" if int(step[1]) > newest else "removing an old checkpoint"
        if path.parent.name == "checkpoints":
            return "writing the pointer"
        return "writing latents" if "latents" in path.parts else "writing another file"
    pointer = output / "checkpoints" / "latest"
    if newest and (not pointer.exists() or _step_of(pointer.read_text().strip()) < newest):
        return "between checkpoint and pointer"
    metrics = output / "metrics.jsonl"
    if metrics.exists():
        text = metrics.read_text()
        return "writing a line of metrics" if text and not text.endswith("\n") else "training" if newest or text else "building"
    return "building"


DURING_A_SAVE = ("writing a checkpoint", "between checkpoint and pointer", "writing the pointer", "removing an old checkpoint")


@dataclass
class Report:
    """What came of it."""

    kills: int = 0
    by_mode: Counter[str] = field(default_factory=Counter)
    struck: Counter[str] = field(default_factory=Counter)
    """Kills by what the process was doing."""
    resumes: int = 0
    """Attempts that found a checkpoint to go on from."""
    finished_runs: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def during_a_save(self) -> int:
        """Kills between the first byte of a checkpoint and the last file of the one that it replaces."""
        return sum(self.struck[name] for name in DURING_A_SAVE)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        counts = {"by_mode": dict(self.by_mode.most_common()), "struck": dict(self.struck.most_common())}
        rest = {"kills": self.kills, "during_a_save": self.during_a_save, "resumes": self.resumes, "finished_runs": self.finished_runs}
        return {**rest, **counts, "failures": self.failures, "seconds": round(self.seconds, 1)}


class KillAndResume:
    """Runs into `folder` with `settings` (those of `small_run` and overrides), killed at moments drawn from `seed`."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], seed: int) -> None:
        self.folder = folder
        self.config = config_from_dict(settings)
        self.report = Report()
        self._draw = np.random.default_rng(seed)
        self._runs = 0

    def run(self, kills: int, tell: Callable[[str], None] = lambda line: None) -> Report:
        """The report after that many kills, and after the last run was left to finish; `tell` gets a line per kill and finished run."""
        start = time.monotonic()
        reference = self.folder / "undisturbed"
        process = start_training(self.config, reference)
        process.join()
        assert process.exitcode == 0, f"the undisturbed run failed: {_last_words(reference)}"
        wanted = final_state(reference)
        while self.report.kills < kills or self._unfinished:
            self._attempt(self._output, None if self.report.kills >= kills else self._mode(), wanted, tell)
            self.report.seconds = time.monotonic() - start
        return self.report

    @property
    def _output(self) -> Path:
        return self.folder / f"run-{self._runs:03d}"

    @property
    def _unfinished(self) -> bool:
        return self._output.exists()

    def _mode(self) -> str:
        if not self._output.exists() and self._draw.random() < 0.4:
            return "cache"
        return str(self._draw.choice(MODES[:-1], p=[0.4, 0.25, 0.1, 0.1, 0.15]))

    def _attempt(self, output: Path, mode: str | None, wanted: Mapping[str, Any], tell: Callable[[str], None]) -> None:
        """Starts or resumes the run, and kills it by `mode` (None: not at all); a run that finishes is compared and the next one begins."""
        newest, hidden = _newest(output), _hidden(output)
        self.report.resumes += newest > 0
        happened, delay_s = _moment(mode, output, self._draw) if mode else (lambda: False, 0.0)
        process = start_training(self.config, output)
        if _wait(process, happened):
            time.sleep(delay_s)
            process.kill()
        process.join()
        name = f"{output.name} after kill {self.report.kills}"
        if process.exitcode == 0:
            self._compare(output, name, wanted, tell)
        elif process.exitcode == -9 and mode is not None:
            struck = _struck(output, hidden)
            self.report.kills += 1
            self.report.by_mode[mode] += 1
            self.report.struck[struck] += 1
            tell(f"kill {self.report.kills:4d}  {output.name}  {mode:8s} step {_newest(output):3d}  {struck}")
            for problem in broken_promises(output, newest, self.config.train.keep_last):
                self._fail(f"{output.name}, kill {self.report.kills}, {mode}, {struck}: {problem}", tell)
        else:
            self._fail(f"{name}: ended with code {process.exitcode}: {_last_words(output)}", tell)
            self._runs += 1

    def _compare(self, output: Path, name: str, wanted: Mapping[str, Any], tell: Callable[[str], None]) -> None:
        different = differences(final_state(output), wanted)
        different += [f"{path.relative_to(output)} was left behind" for path in sorted(_hidden(output))]
        for difference in different:
            self._fail(f"{name}: {difference}", tell)
        self.report.finished_runs += 1
        self._runs += 1
        tell(f"finished   {output.name}  {'differs' if different else 'equal to the undisturbed run, bit for bit'}")

    def _fail(self, what: str, tell: Callable[[str], None]) -> None:
        self.report.failures.append(what)
        tell(f"FAILED     {what}")


def _last_words(output: Path) -> str:
    log = Path(f"{output}.log")
    return log.read_text(errors="replace")[-1500:] if log.exists() else "it said nothing"


def kill_and_resume(
    folder: Path, kills: int, seed: int, overrides: Mapping[str, Any] | None = None, tell: Callable[[str], None] = lambda line: None
) -> Report:
    """The report of that many kills of `small_run` with `overrides`, in the new folder `folder`."""
    folder.mkdir(parents=True)
    return KillAndResume(folder, merge(small_run(folder), overrides or {}), seed).run(kills, tell)
