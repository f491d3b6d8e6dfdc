"""The older system's command line: every flag sets what it says or is refused, both banners to the character, both launch scripts.

The launch scripts run whole: `accelerate launch` on the CPU, the tiny Wan, a recorded dataset, two steps.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from safetensors import safe_open

from mvwan.config import Config
from mvwan.data.lerobot import read_lerobot
from mvwan.errors import MvwanError
from tests.formats import write_mvtrack, write_trail
from tests.model.test_banners import FROZEN, MULTIVIEW_OFF, MULTIVIEW_ON, UNFROZEN

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
PRETRAIN, FINETUNE = SCRIPTS / "Wan2.2-TI2V-5B_mvtrack_pretrain.sh", SCRIPTS / "Wan2.2-TI2V-5B_heatmap_rgb_mv_3.sh"
BASE = str(ROOT / "tests" / "golden" / "base.safetensors")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("heatmap_train_mv", SCRIPTS / "heatmap_train_mv.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def config_of(script: ModuleType) -> Callable[..., Config]:
    """Flags -> the config they stand for."""

    def of(*flags: str, roots: tuple[str, ...] = ("--heatmap_data_root", "data")) -> Config:
        return script.config_of(script.make_parser().parse_args(["--base", BASE, *roots, *flags]))

    return of


def test_banners_of_the_5b_with_the_switch_off(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    script.run(["--base", "wan2.2-ti2v-5b", "--dry_run"])
    assert capsys.readouterr().out == FROZEN + MULTIVIEW_OFF + "\n"


def test_banners_of_the_5b_with_the_switch_on(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    script.run(["--base", "wan2.2-ti2v-5b", "--dry_run", "--unfreeze_modulation_and_norms"])
    assert capsys.readouterr().out == UNFROZEN + MULTIVIEW_ON + "\n"


def test_only_the_main_process_prints_banners(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    script.run(["--base", BASE, "--dry_run"])
    assert capsys.readouterr().out == ""


SET = {
    "learning_rate": ("3e-5", 3e-5),
    "weight_decay": ("0.02", 0.02),
    "max_grad_norm": ("0.5", 0.5),
    "warmup_steps": ("7", 7),
    "train_batch_size": ("3", 3),
    "gradient_accumulation_steps": ("5", 5),
    "dataset_num_workers": ("2", 2),
    "logging_steps": ("4", 4),
    "rgb_loss_weight": ("0.08", 0.08),
    "lora_rank": ("16", 16),
    "height": ("128", 128),
    "width": ("192", 192),
    "step_interval": ("2", 2),
    "num_views": ("4", 4),
}


def _field(config: Config, dotted: str) -> object:
    value: object = config
    for name in dotted.split("."):
        value = getattr(value, name)
    return value


def test_every_mapped_flag_is_tried(script: ModuleType) -> None:
    assert set(SET) == set(script.MAPPED)


@pytest.mark.parametrize("flag", SET)
def test_a_flag_sets_its_field(script: ModuleType, config_of: Callable[..., Config], flag: str) -> None:
    text, value = SET[flag]
    field = script.MAPPED[flag][2]
    assert _field(config_of(f"--{flag}", text), field) == value
    assert _field(config_of(), field) == script.MAPPED[flag][1], "the older default"


def test_switches_and_paths(config_of: Callable[..., Config]) -> None:
    plain = config_of()
    assert (plain.unfreeze_modulation_and_norms, plain.model.gradient_checkpointing, plain.train.from_checkpoint) == (False, False, None)
    config = config_of(
        "--unfreeze_modulation_and_norms", "--use_gradient_checkpointing", "--lora_checkpoint", "old.safetensors", "--enable_swanlab"
    )
    assert (config.unfreeze_modulation_and_norms, config.model.gradient_checkpointing) == (True, True)
    assert (config.train.from_checkpoint, config.train.tracker, config.data.root) == ("old.safetensors", "swanlab", "data")


def test_what_was_always_so_is_accepted(config_of: Callable[..., Config]) -> None:
    always = "--use_dual_head --find_unused_parameters --colormap_name jet --dataloader_pin_memory false --remove_prefix_in_ckpt pipe.dit."
    assert config_of(*always.split(), "--extra_inputs", "input_image,input_image_rgb,input_video_rgb") == config_of()


def test_frames(config_of: Callable[..., Config]) -> None:
    assert config_of().data.num_frames == 25
    assert config_of("--sequence_length", "12").data.num_frames == 13
    assert config_of("--num_frames", "9").data.num_frames == 9
    mvtrack = config_of(roots=("--mvtrack_data_root", "data"))
    assert (mvtrack.data.num_frames, mvtrack.data.heatmap_sigma_px, mvtrack.data.root) == (13, 5.0, "data")
    history = config_of("--wan_type", "5B_TI2V_RGB_HEATMAP_MV_HISTORY", "--num_history_frames", "5", "--sequence_length", "8")
    assert (history.data.num_frames, history.train.condition_frames) == (13, 2)


def test_timestep_boundaries_are_shares_of_a_schedule_that_starts_at_noise(config_of: Callable[..., Config]) -> None:
    flow = config_of("--min_timestep_boundary", "0.25", "--max_timestep_boundary", "0.75").flow
    assert (flow.sigma_min, flow.sigma_max) == (0.25, 0.75)
    flow = config_of("--max_timestep_boundary", "0.4").flow
    assert (flow.sigma_min, flow.sigma_max) == (0.6, 1.0)


def test_adapters(config_of: Callable[..., Config]) -> None:
    everywhere = config_of().trainable.lora
    assert everywhere.self_attention
    assert everywhere.ffn
    no_ffn = config_of("--lora_target_modules", "q,k,v,o").trainable.lora
    assert no_ffn.view_attention
    assert not no_ffn.ffn
    none = config_of("--lora_base_model", "").trainable.lora
    assert not any((none.self_attention, none.cross_attention, none.view_attention, none.ffn))


def test_trainable_models_dit_trains_every_parameter(config_of: Callable[..., Config]) -> None:
    from mvwan.training_module import HeatmapWanTrainingModule

    config = config_of("--trainable_models", "dit", "--lora_base_model", "")
    table = HeatmapWanTrainingModule(config=config, device="meta", print_banners=False).table
    assert table.trainable_parameters == table.total_parameters > 0


def test_augmentation(config_of: Callable[..., Config]) -> None:
    assert config_of().data.augment.variants == 4
    assert config_of("--disable_augmentation").data.augment.variants == 0
    given = config_of("--augmentation_variants", "2", "--transform_augmentation_rpy", "5.0,5.0,10.0").data.augment
    assert (given.variants, given.rotation_deg) == (2, (5.0, 5.0, 10.0))


def test_set_has_the_last_word(config_of: Callable[..., Config]) -> None:
    assert config_of("--lora_rank", "16", "--set", "trainable.lora.rank=4").trainable.lora.rank == 4


def test_trail_flags(config_of: Callable[..., Config]) -> None:
    trail = config_of("--trail_start", "3", "--trail_end", "12", "--scene_bounds=0,-0.5,0,1,0.5,1", "--use_merged_pointcloud").data.trail
    assert (trail.first, trail.last, trail.merged) == (3, 12, True)
    assert trail.scene_bounds_m == (0, -0.5, 0, 1, 0.5, 1)
    plain = config_of().data.trail
    assert (plain.first, plain.last, plain.merged) == (1, None, False)


def test_model_paths(script: ModuleType) -> None:
    def base_of(*flags: str) -> str:
        return script.base_of(script.make_parser().parse_args(flags))

    assert base_of() == "wan2.2-ti2v-5b"
    assert base_of("--model_paths", '[["m/dit-1.safetensors", "m/dit-2.safetensors"]]') == "m"
    assert base_of("--model_paths", '["m/dit.safetensors"]') == "m/dit.safetensors"


def test_several_folders_are_one_training_set(config_of: Callable[..., Config]) -> None:
    assert config_of(roots=("--heatmap_data_root", "a", "b")).data.root == ("a", "b")
    assert config_of(roots=("--heatmap_data_root", "a")).data.root == "a"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--trail_start 9 --trail_end 3", "at least data.trail.first=9"),
        ("--scene_bounds=0,-0.5,0,1,0.5", "scene_bounds_m"),
        ("--scene_bounds=0,a,0,1,0.5,1", "six numbers"),
        ("--use_different_projection", "top, front and side"),
        ("--transform_augmentation_xyz 0.1,0.1,0.1", "metres"),
        ("--model_id_with_origin_paths Wan-AI/Wan2.2-TI2V-5B:*.pth", "--base"),
        ("--swanlab_api_key 0000", "keys"),
        ("--swanlab_project p", "output folder"),
        ("--swanlab_experiment e", "output folder"),
        ("--colormap_name viridis", "JET"),
        ("--dataloader_pin_memory true", "pinned"),
        ("--remove_prefix_in_ckpt model.", "prefix"),
        ("--extra_inputs camera", "camera"),
        ("--trainable_models vae", "transformer"),
        ("--lora_base_model text_encoder", "transformer"),
        ("--trainable_models dit", "--lora_base_model ''"),
        ("--lora_target_modules q,v", "q,k,v,o"),
        ("--wan_type 14B_I2V", "5B_TI2V_RGB_HEATMAP_MV"),
        ("--num_history_frames 5", "5B_TI2V_RGB_HEATMAP_MV_HISTORY"),
        ("--num_history_frames 2 --wan_type 5B_TI2V_RGB_HEATMAP_MV_HISTORY", "1 + 4N"),
        ("--num_frames 24 --sequence_length 24", "25"),
        ("--sequence_length 10", "nearest are 9 and 13"),
        ("--min_trail_length 26", "window"),
        ("--height 250", "multiple of 32"),
        ("--rgb_loss_weight 2", "between 0 and 1"),
        ("--disable_augmentation --augmentation_variants 2", "leave one out"),
        ("--transform_augmentation_rpy 5", "three numbers"),
        ("--mvtrack_data_root other", "2 dataset folders"),
        ("--model_paths m.safetensors", "both name the base"),
        ("--learning_rate fast", "fast"),
        ("--learning_rat 1", "--learning_rat"),
        ("--set train.step=3", "train.steps"),
    ],
)
def test_refusals_name_the_flag_and_the_reason(config_of: Callable[..., Config], flags: str, said: str) -> None:
    with pytest.raises(MvwanError) as refused:
        config_of(*flags.split())
    sentence = str(refused.value)
    assert said in sentence
    assert "\n" not in sentence
    assert "0000" not in sentence, "a key must not be repeated"


def test_pickled_weights_are_refused(script: ModuleType) -> None:
    args = script.make_parser().parse_args(
        ["--model_paths", '[["m/a.safetensors"], "m/models_t5_umt5-xxl-enc-bf16.pth", "m/Wan2.2_VAE.pth"]']
    )
    with pytest.raises(MvwanError, match=r"models_t5.*pickled"):
        script.base_of(args)


@pytest.mark.parametrize(
    ("flags", "steps", "save_every"),
    [
        ("", 5 * 13, 500),
        ("--num_epochs 2 --dataset_repeat 3", 2 * 38, 500),
        ("--save_steps 9", 5 * 13, 9),
        ("--save_steps 0", 5 * 13, 13),
        ("--save_steps 0 --save_epochs_interval 2", 5 * 13, 26),
        ("--save_epochs_interval 2", 5 * 13, 26),
        ("--max_steps 4", 4, 500),
        ("--debug_mode", 10, 500),
    ],
)
def test_epochs_become_steps(script: ModuleType, config_of: Callable[..., Config], flags: str, steps: int, save_every: int) -> None:
    """100 windows over 2 processes, 2 per process, accumulated twice: 8 per step, 12.5 steps per epoch."""
    both = [*flags.split(), "--train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    args = script.make_parser().parse_args(both)
    config = script.with_schedule(args, config_of(*both), num_windows=100, processes=2)
    assert (config.train.steps, config.train.save_every) == (steps, save_every)


def launch(script_file: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """One launch script, run to its end with these environment variables."""
    environment = {name: value for name, value in os.environ.items() if name != "UNFREEZE_MODULATION_AND_NORMS"}
    command = ["bash", str(script_file), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment | variables, cwd=ROOT)


def test_a_mistake_is_one_sentence_and_exit_code_2() -> None:
    command = [sys.executable, str(SCRIPTS / "heatmap_train_mv.py"), "--base", BASE, "--heatmap_data_root", "data", "--height", "250"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "data.height_px" in done.stderr


@pytest.mark.parametrize("script_file", [PRETRAIN, FINETUNE])
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"HEATMAP_DATA_ROOT": "no/such", "MVTRACK_DATA_ROOT": "no/such"}, "no/such"),
        ({"UNFREEZE_MODULATION_AND_NORMS": "yes"}, "UNFREEZE_MODULATION_AND_NORMS=yes"),
    ],
)
def test_a_launch_script_refuses_in_one_sentence(tmp_path: Path, script_file: Path, variables: dict[str, str], said: str) -> None:
    output = tmp_path / "run"
    done = launch(script_file, MODEL_BASE_PATH=BASE, OUTPUT_PATH=str(output), **variables)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert said in done.stderr
    assert not output.exists()


@pytest.mark.parametrize("script_file", [PRETRAIN, FINETUNE])
def test_nodes_that_would_write_to_different_folders_are_refused(script_file: Path) -> None:
    done = launch(script_file, MODEL_BASE_PATH=BASE, NUM_NODES="2")
    assert done.returncode == 2
    assert done.stderr == "NUM_NODES=2 needs OUTPUT_PATH: one folder that all nodes share. Set it to the same on each.\n"


TINY = {
    "MODEL_BASE_PATH": "tiny",
    "USE_CPU": "true",
    "NUM_GPUS": "1",
    "HEIGHT": "64",
    "WIDTH": "64",
    "SEQUENCE_LENGTH": "4",
    "LORA_RANK": "4",
    "GRADIENT_ACCUMULATION_STEPS": "1",
    "WARMUP_STEPS": "0",
    "LEARNING_RATE": "1e-3",
    "AUGMENTATION_VARIANTS": "0",
    "STEP_INTERVAL": "1",
    "HEATMAP_SIGMA": "1.5",
}
SHORT = ("--max_steps", "2", "--set", "data.window_stride=20", "--set", "data.text_tokens=32", "--set", "train.evaluate_every=0")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of two demonstrations at 64 px."""
    from mvwan.sim.metaworld import record

    folder = tmp_path_factory.mktemp("recorded") / "dataset"
    record("button-press-topdown", episodes=2, output=folder, size_px=64, progress=False)
    return str(folder)


def groups_of(run: Path) -> dict[str, bool]:
    """Group -> whether it trained, from what the run wrote when it started."""
    return {group["name"]: group["trainable"] for group in json.loads((run / "table.json").read_text(encoding="utf-8"))["groups"]}


def saved_names(run: Path) -> set[str]:
    """Names of the tensors in the run's newest checkpoint."""
    folder = run / "checkpoints" / (run / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    with safe_open(folder / "trained.safetensors", "pt") as file:
        return set(file.keys())


def test_both_launch_scripts_train_and_hand_over(tmp_path: Path, recorded: str) -> None:
    pretrain, finetune = tmp_path / "pretrain", tmp_path / "finetune"
    switch = {"UNFREEZE_MODULATION_AND_NORMS": "true"}
    flags = (*SHORT, "--set", f"data.cache={tmp_path / 'latents'}", "--set", "model.action_head=none")  # tracking has no gripper
    tracking = write_mvtrack(tmp_path / "mvtrack", read_lerobot(recorded))
    done = launch(PRETRAIN, *flags, MVTRACK_DATA_ROOT=str(tracking), OUTPUT_PATH=str(pretrain), **TINY, **switch)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MODULATION PARAMETER UNFREEZING" in done.stdout
    assert groups_of(pretrain)["modulation"]
    assert groups_of(pretrain)["mvs_norms"]
    assert {"blocks.0.scale_shift_table", "blocks.0.mvs_attn.norm_q.weight"} <= saved_names(pretrain)

    handed = {"LOAD_PRETRAINED_CHECKPOINT": "true", "PRETRAINED_CHECKPOINT": str(pretrain)}
    two_processes = TINY | {"NUM_GPUS": "2"}
    clouds = {"HEATMAP_DATA_ROOT": str(write_trail(tmp_path / "trail", "button-press-topdown", (3, 4), size_px=64))}
    clouds |= {"SCENE_BOUNDS": "-0.45,0.3,-0.05,0.45,1.0,0.6", "USE_MERGED_POINTCLOUD": "true"}
    small = ("--set", "data.trail.size_px=64")
    done = launch(FINETUNE, *flags, *small, OUTPUT_PATH=str(finetune), **two_processes, **handed, **clouds)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("KEEPING FROZEN") == 1, "the main process alone says so"
    assert not groups_of(finetune)["modulation"]
    assert not groups_of(finetune)["mvs_norms"]
    assert saved_names(finetune) == saved_names(pretrain), "trained values that came along are kept, frozen"

    again = {"OUTPUT_PATH": str(finetune), **two_processes, **handed, **clouds}
    for more, changed, said in (
        ((), {}, "Use --resume to go on with it"),
        (("--resume",), {"LORA_RANK": "8"}, "rank: 4 in the checkpoint, 8"),
    ):
        done = launch(FINETUNE, *flags, *small, *more, **(again | changed))
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1, "before any process is launched"
        assert said in done.stderr
