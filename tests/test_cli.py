"""The command line as users meet it: verbs and options are frozen, a mistake is one sentence and exit code 2 and leaves nothing behind."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer.main
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

from mvwan import cli, cli_settings
from mvwan.config import config_from_dict
from mvwan.errors import MvwanError
from mvwan.files import write_json
from mvwan.presets import config_from_preset

SWITCH = [
    "--unfreeze_modulation_and_norms",
    "--unfreeze-modulation-and-norms",
    "--no-unfreeze_modulation_and_norms",
    "--no-unfreeze-modulation-and-norms",
]
SETTINGS = ["--preset", "--config", "--set"]
INTERFACE = {
    "params": [
        "--base",
        "--views",
        "--fusion",
        "--action-head",
        "--view-code",
        "--lora-rank",
        *SWITCH,
        "--json",
        "--markdown",
        "--compare",
    ],
    "record": ["--output", "--task", "--episodes", "--size-px", "--layouts", "--seed"],
    "cache": ["--output", *SETTINGS, "--workers"],
    "train": ["--output", *SETTINGS, *SWITCH, "--resume", "--accept-trainable-change", "--dry-run"],
    "sample": [
        *("run", "--output", "--dataset", "--window", "--image", "--cameras", "--prompt", "--point", "--point-px", "--gripper-open"),
        *("--fps", "--denoise-steps", "--seed", "--attention", "--heat-from", "--context-parallel"),
    ],
    "evaluate": [
        *("run", "--dataset", "--windows", "--denoise-steps", "--heat-from", "--seed", "--output", "--cameras", "--trials", "--task"),
        *("--layouts", "--execute", "--processes", "--videos", "--final", "--dry-run"),
    ],
    "demo": ["--output", "--task", "--episodes", "--steps", "--windows", "--trials", "--seed", "--fresh"],
    "reproduce": [
        *("table", "--output", "--steps", "--trials", "--demonstrations", "--task", "--switch", "--set", "--start-from"),
        *("--execute", "--denoise-steps", "--test-demonstrations"),
        *("--control-steps", "--videos", "--seed", "--processes", "--baseline", "--baseline-steps", "--tuning", "--fresh", "--dry-run"),
    ],
    "bench": [
        *("--size", "--part", "--repeats", "--compile", "--batch", "--views", "--latent-frames", "--latent-side", "--output", "--json"),
        "--seed",
    ],
    "ablate": [
        *("--output", "--grid", *SETTINGS, "--vary", "--seeds", "--learning-rates", "--test-dataset", "--windows", "--denoise-steps"),
        *("--trials", "--task", "--execute", "--accept-trainable-change", "--processes", "--cluster", "--cluster-option"),
        "--dry-run",
    ],
    "sensitivity": [
        *("--output", *SETTINGS, "--batches", "--probe-steps", "--learning-rates", "--budget", "--budget-mb", "--dry-run", "--json")
    ],
    "plan": [*SETTINGS, "--device", "--efficiency", "--measure", "--json"],
    "data convert": ["source", "output", "--set"],
    "data inspect": ["folder", "--sheet", "--preset", "--set", "--check", "--json"],
    "data view": ["folder", "--rerun", "--episode", "--set"],
    "checkpoint inspect": ["path", "--json"],
    "checkpoint verify": ["path", "--against"],
    "checkpoint diff": ["a", "b", "--json"],
    "checkpoint export": ["path", "--format", "--output", "--base", "--ema", "--dtype", "--rgb-only"],
}
"""Changing this is changing what users type: say so in LOG.md and the guides."""


def mvwan(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own."""
    variables = {name: value for name, value in os.environ.items() if name != cli_settings.SWITCH_VARIABLE}
    command = [sys.executable, "-m", "mvwan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=cwd, env=variables | environment)


def run(*arguments: str, **environment: str):
    """The same in this process: quicker."""
    return CliRunner().invoke(cli.app, list(arguments), env={cli_settings.SWITCH_VARIABLE: None, **environment})


def is_one_sentence(text: str) -> bool:
    return text.startswith("error: ") and text.count("\n") == 1 and "Traceback" not in text


def everything_under(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ── the interface ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def commands() -> dict[str, object]:
    found: dict[str, object] = {}
    for name, command in typer.main.get_command(cli.app).commands.items():
        inner = getattr(command, "commands", None)
        found |= {f"{name} {verb}": part for verb, part in inner.items()} if inner else {name: command}
    return found


def test_verbs_and_options_are_frozen() -> None:
    given = {
        name: [word for parameter in command.params for word in (parameter.opts + parameter.secondary_opts) if word != "--help"]
        for name, command in commands().items()
    }
    assert given == INTERFACE


@pytest.mark.parametrize("verb", INTERFACE)
def test_help_shows_an_example(verb: str) -> None:
    done = run(*verb.split(), "--help")
    assert done.exit_code == 0
    assert f"Example: mvwan {verb}" in re.sub(r"\s+", " ", done.output)


def test_examples_name_options_that_exist() -> None:
    for verb, command in commands().items():
        words = re.findall(r"--[\w-]+", command.epilog)
        assert set(words) <= {*INTERFACE[verb]}, verb


def test_help_and_version_are_quick_and_light() -> None:
    start = time.monotonic()
    done = mvwan("--version")
    assert (done.returncode, done.stdout) == (0, "mvwan 0.1.0\n")
    assert time.monotonic() - start < 10
    assert "drawer-open" not in mvwan("params", "--help").stdout


def test_a_mistyped_verb_is_answered_with_the_nearest() -> None:
    done = mvwan("trian")
    assert done.returncode == 2
    assert "train" in done.stderr


# ── params ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


TELLS_ITS_PEAK = """
import atexit, pathlib, re, sys
status = pathlib.Path("/proc/self/status")
atexit.register(lambda: print(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1], file=sys.stderr))
from mvwan.cli import main
main()
"""
"""`mvwan` as a program that ends with its own peak memory in KiB. What the system counts of a child holds what its parent had, too."""


def test_params_of_the_5b_is_exact_quick_and_small() -> None:
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    words = ["params", "--base", "wan2.2-ti2v-5b", "--json", "--unfreeze_modulation_and_norms"]
    done = subprocess.run([sys.executable, "-c", TELLS_ITS_PEAK, *words], capture_output=True, text=True)
    seconds = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout)
    assert set(table) == {"base", "views", "fusion", "groups", "trainable_parameters", "total_parameters"}
    assert table["trainable_parameters"] == 390_798_720
    groups = {group["name"]: (group["parameters"], group["tensors"]) for group in table["groups"]}
    assert (groups["modulation"], groups["mvs_norms"], groups["lora"]) == ((552_960, 30), (184_320, 60), (80_609_280, 600))
    peak_kib = int(done.stderr.split()[-1])
    assert 100 * 2**10 < peak_kib < 2 * 2**20, f"{peak_kib / 2**20:.2f} GiB"
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < 15, f"{used:.1f} s of processor time, {seconds:.1f} s on the clock"


@pytest.mark.parametrize("flag", ["--unfreeze_modulation_and_norms", "--unfreeze-modulation-and-norms"])
def test_both_spellings_of_the_switch(flag: str) -> None:
    off, on = (json.loads(run("params", "--base", "tiny", "--json", *flags).stdout) for flags in ([], [flag]))
    trains = [{group["name"] for group in table["groups"] if group["trainable"]} for table in (off, on)]
    assert trains[1] - trains[0] == {"modulation", "mvs_norms"}


def test_params_compare_and_markdown() -> None:
    compared = run("params", "--base", "tiny", "--compare", "--markdown")
    assert compared.exit_code == 0
    assert compared.stdout.startswith("| group |")
    assert "| modulation |" in compared.stdout
    data = json.loads(run("params", "--base", "tiny", "--compare", "--json").stdout)
    more = data["on"]["trainable_parameters"] - data["off"]["trainable_parameters"]
    assert data["difference"]["trainable_parameters"] == more > 0
    plain = run("params", "--base", "tiny", "--views", "2", "--fusion", "view")
    assert "2 views, fusion view, switch off" in plain.stdout
    assert "mvs_norms" in plain.stdout


def test_params_count_an_action_head() -> None:
    plain, headed = (json.loads(run("params", "--base", "tiny", "--json", *flags).stdout) for flags in ([], ["--action-head", "gripper"]))
    added = [group for group in headed["groups"] if group not in plain["groups"]]
    assert [group["name"] for group in added] == ["action_head"]
    assert headed["trainable_parameters"] - plain["trainable_parameters"] == added[0]["parameters"] > 0


def test_lora_rank_scales_the_adapters() -> None:
    counts = []
    for rank in ("8", "16"):
        groups = json.loads(run("params", "--base", "tiny", "--json", "--lora-rank", rank).stdout)["groups"]
        counts.append(next(group["parameters"] for group in groups if group["name"] == "lora"))
    assert counts[1] == 2 * counts[0] > 0


def test_options_that_contradict_are_refused() -> None:
    for arguments in (["--json", "--markdown"], ["--compare", "--unfreeze_modulation_and_norms"]):
        done = run("params", "--base", "tiny", *arguments)
        assert done.exit_code == 2
        assert is_one_sentence(done.stderr)


# ── the switch from the environment ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("text", "is_on"), [("true", True), ("1", True), ("false", False), ("0", False), ("TRUE", True)])
def test_params_honours_the_environment_and_says_so(text: str, is_on: bool) -> None:
    done = run("params", "--base", "tiny", "--json", UNFREEZE_MODULATION_AND_NORMS=text)
    groups = {group["name"]: group["trainable"] for group in json.loads(done.stdout)["groups"]}
    assert groups["mvs_norms"] is is_on
    assert (
        done.stderr
        == f"note: unfreeze_modulation_and_norms={str(is_on).lower()}, from the environment variable UNFREEZE_MODULATION_AND_NORMS\n"
    )


def test_the_flag_wins_over_the_environment_in_silence() -> None:
    done = run("params", "--base", "tiny", "--json", "--no-unfreeze_modulation_and_norms", UNFREEZE_MODULATION_AND_NORMS="true")
    assert not {group["name"]: group["trainable"] for group in json.loads(done.stdout)["groups"]}["modulation"]
    assert done.stderr == ""


@pytest.mark.parametrize("text", ["yes", "", "on", "2"])
def test_any_other_value_of_the_environment_is_an_error(text: str) -> None:
    with pytest.raises(MvwanError, match="must be true, false, 1 or 0"):
        cli_settings.switch_from_environment({cli_settings.SWITCH_VARIABLE: text})
    done = run("params", "--base", "tiny", UNFREEZE_MODULATION_AND_NORMS=text)
    assert done.exit_code == 2
    assert is_one_sentence(done.stderr)
    assert done.stdout == ""


def test_who_sets_the_switch_in_train(tmp_path: Path) -> None:
    on_by_file = tmp_path / "on.yaml"
    on_by_file.write_text("unfreeze_modulation_and_norms: true\n")

    def resolved(file: Path | None, settings: list[str], flag: bool | None, **environment: str) -> tuple[bool, bool]:
        config, note = cli_settings.resolve_config("tiny", file, settings, flag, environment)
        return config.unfreeze_modulation_and_norms, bool(note)

    field = "unfreeze_modulation_and_norms"
    assert resolved(None, [], None) == (False, False)
    assert resolved(on_by_file, [], None) == (True, False)
    assert resolved(on_by_file, [], None, UNFREEZE_MODULATION_AND_NORMS="false") == (False, True)
    assert resolved(None, [f"{field}=false"], None, UNFREEZE_MODULATION_AND_NORMS="true") == (False, False)
    assert resolved(None, [f"{field}=false"], True, UNFREEZE_MODULATION_AND_NORMS="false") == (True, False)


# ── train ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_dry_run_prints_config_table_and_windows_and_writes_nothing(tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = run(
        "train", "--preset", "tiny", "--set", "train.steps=7", "--unfreeze_modulation_and_norms", "--dry-run", "--output", str(output)
    )
    assert done.exit_code == 0, done.output
    text = done.stdout
    config = config_from_dict(yaml.safe_load(text[: text.index("What trains")]))
    assert config == config_from_preset("tiny", {"train": {"steps": 7}, "unfreeze_modulation_and_norms": True})
    assert re.search(r"mvs_norms\s*│ full", text)
    assert "windows: unknown, data.root is not set" in text
    assert not output.exists()


def test_dry_run_says_how_the_checkpoint_to_start_from_fits(tmp_path: Path) -> None:
    golden = Path(__file__).parent / "golden"
    settings = [f"base.source={golden / 'base.safetensors'}", f"train.from_checkpoint={golden / 'trained_frozen.safetensors'}"]
    settings += ["trainable.lora.rank=4", "model.fusion=channel", "model.action_head=none"]
    command = ["train", "--output", str(tmp_path / "run"), "--dry-run", *(word for setting in settings for word in ("--set", setting))]
    assert "trained_frozen.safetensors: exact" in run(*command).stdout
    refused = run(*command, "--unfreeze_modulation_and_norms")
    assert (refused.exit_code, is_one_sentence(refused.stderr)) == (2, True)
    assert "insist with --accept-trainable-change" in refused.stderr
    accepted = run(*command, "--unfreeze_modulation_and_norms", "--accept-trainable-change")
    assert "trained_frozen.safetensors: older\nmodulation: 2 tensors not in the checkpoint, they keep the base's values" in accepted.stdout
    assert not (tmp_path / "run").exists()


def test_dry_run_of_a_resumed_run_finds_what_the_run_would(debug_run: Path) -> None:
    own = ["--config", str(debug_run / "config.yaml"), "--output", str(debug_run), "--dry-run"]
    steps = yaml.safe_load((debug_run / "config.yaml").read_text())["train"]["steps"]
    refused = run("train", *own)
    assert (refused.exit_code, is_one_sentence(refused.stderr)) == (2, True) and "Use --resume to go on with it" in refused.stderr
    done = run("train", *own, "--resume", "--set", f"train.steps={steps + 5}")
    assert f"step-{steps:06d}: exact" in done.stdout, done.stderr
    assert f"training: at step {steps}, from {debug_run / 'checkpoints'}/step-{steps:06d}, to step {steps + 5}" in done.stdout
    other = run("train", *own, "--resume", "--set", f"train.steps={steps + 5}", "--set", "seed=7")
    assert (other.exit_code, is_one_sentence(other.stderr)) == (2, True) and "seed: 0 in the checkpoint, 7 now" in other.stderr


def test_settings_lie_over_the_file_over_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("train: {steps: 5, batch_size: 2}\nseed: 3\n")
    config, _ = cli_settings.resolve_config("tiny", file, ["train.steps=9"], None, {})
    assert (config.train.steps, config.train.batch_size, config.seed, config.train.learning_rate) == (9, 2, 3, 1e-3)


# ── mistakes ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with things that are not what they are taken for."""
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    (tmp_path / "text.safetensors").write_text("not a checkpoint either")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "odd").mkdir()
    write_json(tmp_path / "odd" / "config.json", {"_class_name": "UNet2DModel"})
    save_file({"conv_in.weight": torch.zeros(3)}, tmp_path / "odd" / "diffusion_pytorch_model.safetensors")
    return tmp_path


MISTAKES = {
    "wrong frame count": (["train", "--output", "run", "--set", "data.num_frames=50"], "needs 4*k+1 frames; nearest are 49 and 53"),
    "wrong picture size": (["train", "--output", "run", "--set", "data.height_px=100"], "multiple of 32 px"),
    "missing folder": (["train", "--output", "run", "--set", "data.root=nowhere"], "nowhere"),
    "no folder given": (["train", "--output", "run"], "data.root"),
    "unknown field": (["train", "--output", "run", "--set", "train.step=3"], "Did you mean 'train.steps'?"),
    "wrong type": (["train", "--output", "run", "--set", "train.steps=many"], "train.steps"),
    "malformed setting": (["train", "--output", "run", "--set", "train.steps"], "needs the form section.field=value"),
    "unknown preset": (["train", "--output", "run", "--preset", "tinny"], "Did you mean 'tiny'?"),
    "missing config": (["train", "--output", "run", "--config", "nowhere.yaml"], "no such configuration file"),
    "config that is a list": (["train", "--output", "run", "--config", "list.yaml"], "a mapping of sections is needed"),
    "unknown group": (
        ["train", "--output", "run", "--dry-run", "--set", "trainable.groups.projectr.mode=frozen"],
        "trainable.groups.projectr: no such group. Did you mean 'projector'?",
    ),
    "base of another kind": (["params", "--base", "odd"], "UNet2DModel"),
    "missing base": (["params", "--base", "./nowhere"], "no such file or folder"),
    "misspelt base": (["params", "--base", "wan2.2-ti2v-5"], "Did you mean 'wan2.2-ti2v-5b'?"),
    "text file as checkpoint": (["checkpoint", "inspect", "notes.txt"], "notes.txt"),
    "text file named safetensors": (["checkpoint", "inspect", "text.safetensors"], "text.safetensors"),
    "missing checkpoint": (["checkpoint", "inspect", "nowhere"], "nowhere"),
    "nothing to measure": (["evaluate", "odd", "--windows", "0"], "nothing is left to measure"),
    "trials of other demonstrations": (["evaluate", "odd", "--trials", "1", "--dataset", "odd"], "Run them apart"),
    "dry run of no trials": (["evaluate", "odd", "--dry-run"], "give --trials"),
    "text file as run": (["evaluate", "notes.txt"], "notes.txt"),
    "folder without run": (["sample", "odd", "--output", "pictures"], "odd"),
    "unknown task": (["record", "--output", "data", "--task", "drawer-opn-v3"], "Did you mean 'drawer-open-v3'?"),
    "record onto something": (["record", "--output", "odd"], "odd"),
    "cache without data": (["cache", "--output", "latents"], "data.root"),
    "demo in a folder with other things": (["demo", "--output", "odd"], "no demo of mvwan"),
    "demo onto a file": (["demo", "--output", "notes.txt"], "a file, not a folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_with_exit_code_2_and_changes_nothing(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, expected = MISTAKES[name]
    monkeypatch.chdir(place)
    before = everything_under(place)
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert is_one_sentence(done.stderr), done.stderr
    assert expected in done.stderr
    assert everything_under(place) == before
    assert {path.name for path in place.iterdir()} == {"notes.txt", "text.safetensors", "list.yaml", "odd"}


def test_a_mistake_in_a_real_process(place: Path) -> None:
    before = everything_under(place)
    done = mvwan("train", "--output", "run", "--set", "data.num_frames=50", cwd=place)
    sentence = "error: settings: data.num_frames=50: Wan needs 4*k+1 frames; nearest are 49 and 53. Set data.num_frames.\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", sentence)
    assert everything_under(place) == before


def test_an_unexpected_error_keeps_its_traceback() -> None:
    code = "from mvwan import cli\ncli.dump_yaml = None\ncli.app(['train', '--output', 'run', '--dry-run'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "TypeError" in done.stderr


def test_ctrl_c_is_130() -> None:
    interrupt = "cli.dump_yaml = lambda config: os.kill(os.getpid(), signal.SIGINT)"
    code = f"import os, signal\nfrom mvwan import cli\n{interrupt}\ncli.app(['train', '--output', 'run', '--dry-run'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 128 + signal.SIGINT
    assert "Traceback" not in done.stderr
