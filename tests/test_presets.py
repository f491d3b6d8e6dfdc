"""Presets are valid settings, carry the published numbers, and answer a misspelt name."""

import subprocess
import sys

import pytest

from mvwan.config import Config, config_from_dict, dump_yaml
from mvwan.errors import MvwanError
from mvwan.presets import PRESETS, config_from_preset, preset


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_config(name: str) -> None:
    config = config_from_preset(name)
    assert config != Config()
    assert config_from_dict(config.to_dict()) == config
    assert f"source: {config.base.source}" in dump_yaml(config)


def test_finetune_carries_the_hyper_parameters_in_use() -> None:
    config = config_from_preset("wan2.2-ti2v-5b")
    assert (config.data.num_frames, config.data.height_px, config.data.width_px, config.data.heatmap_sigma_px) == (25, 256, 256, 1.5)
    assert (config.trainable.lora.rank, config.trainable.lora.alpha) == (32, None), "alpha = rank, also where another rank is set"
    assert (config.train.learning_rate, config.train.weight_decay, config.train.max_gradient_norm) == (1e-4, 0, 1)
    assert (config.train.warmup_steps, config.train.gradient_accumulation, config.train.precision) == (100, 4, "bf16")
    assert config.unfreeze_modulation_and_norms is False


def test_pretrain_differs_from_finetune_only_in_the_clip() -> None:
    finetune, pretrain = config_from_preset("wan2.2-ti2v-5b").to_dict(), config_from_preset("wan2.2-ti2v-5b-pretrain").to_dict()
    changed = {name for name in finetune["data"] if finetune["data"][name] != pretrain["data"][name]}
    assert changed == {"num_frames", "frame_interval", "heatmap_sigma_px"}
    assert (pretrain["data"]["num_frames"], pretrain["data"]["frame_interval"], pretrain["data"]["heatmap_sigma_px"]) == (13, 2, 2.0)
    assert {**finetune, "data": None} == {**pretrain, "data": None}


def test_tiny_is_the_picture_setting_of_the_demo() -> None:
    config = config_from_preset("tiny")
    assert (config.data.height_px, config.data.width_px, config.data.num_frames) == (128, 128, 9)
    assert (config.model.views, config.data.heatmap_sigma_px, config.data.text_tokens) == (3, 6.0, 64)


def test_debug_is_two_steps_with_the_movement_proof_inside() -> None:
    config = config_from_preset("debug")
    assert config.base.source == "tiny"
    assert config.train.movement_step <= config.train.steps == 2


def test_overrides_lie_on_top_and_leave_the_preset_alone() -> None:
    config = config_from_preset("tiny", {"train": {"steps": 7}}, {"train": {"steps": 9}, "seed": 3})
    assert (config.train.steps, config.seed, config.train.learning_rate) == (9, 3, 1e-3)
    copy = preset("tiny")
    copy["train"]["steps"] = 1
    assert preset("tiny")["train"]["steps"] == 300


def test_misspelt_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(MvwanError, match=r"no such preset; there are debug, tiny.*Did you mean 'tiny'\?"):
        preset("tinny")
    with pytest.raises(MvwanError, match=r"train\.steps"):
        config_from_preset("tiny", {"train": {"steps": 0}})


def test_importing_mvwan_loads_no_heavy_library() -> None:
    code = (
        "import sys, mvwan\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'peft', 'accelerate', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert mvwan.__version__ == '0.1.0'\n"
        "assert {'load_model', 'trainable_table', 'predict', 'Prediction', 'Config'} <= set(dir(mvwan))\n"
        "assert mvwan.Config().seed == 0 and 'torch' not in sys.modules\n"
        "try:\n    mvwan.nothing\nexcept AttributeError as error:\n    assert 'nothing' in str(error)\nelse:\n    raise SystemExit(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "value"), [("adam_betas", [0.9, 1.0]), ("adam_betas", [-0.1, 0.9]), ("ema_decay", 1.0), ("condition_frames", 0)]
)
def test_what_an_optimizer_or_a_prediction_cannot_take_is_refused_at_once(name: str, value: object) -> None:
    with pytest.raises(MvwanError, match=rf"train\.{name}=.*Set train\.{name}"):
        config_from_preset("tiny", {"train": {name: value}})
