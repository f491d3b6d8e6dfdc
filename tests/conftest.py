"""What all tests share: the two markers skip with their reason, and nothing looks for the model hub."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from mvwan.training_module import HeatmapWanTrainingModule

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device here")
    if item.get_closest_marker("weights") and "MVWAN_WEIGHTS" not in os.environ:
        pytest.skip("MVWAN_WEIGHTS does not name a folder with the official Wan2.2-TI2V-5B weights")


@pytest.fixture(scope="session")
def tiny_demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of `write_demonstrations`."""
    from tests.demonstrations import write_demonstrations

    return write_demonstrations(tmp_path_factory.mktemp("demonstrations") / "ball")


@pytest.fixture(scope="session")
def debug_run(tiny_demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real run: the preset `debug` on demonstrations of a ball, two steps. Tests leave it as it is or write beside."""
    from mvwan.presets import config_from_preset
    from mvwan.train import train

    output = tmp_path_factory.mktemp("runs") / "debug"
    settings = {"data": {"root": str(tiny_demonstrations), "heatmap_sigma_px": 2.0}, "train": {"tracker": "none"}}
    train(config_from_preset("debug", settings), output)
    return output


@pytest.fixture(scope="session")
def golden_run(tiny_demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a run of seconds: the two-block base of the golden files, `tiny_demonstrations`, and a complete latent cache.

    The cache holds noise, and text of that base's width, so that such runs do not change with the weights that the package ships.
    """
    import torch

    from mvwan.config import config_from_dict
    from mvwan.data.dataset import WindowDataset, read_episodes
    from mvwan.latent_cache import Keys, write_entry
    from mvwan.latent_shards import ShardWriter
    from mvwan.model.latents import codec_digest

    folder = tmp_path_factory.mktemp("latents")
    steps = {"steps": 4, "warmup_steps": 2, "movement_step": 2, "save_every": 2, "evaluate_every": 2, "evaluate_windows": 2}
    values: dict[str, Any] = {
        "base": {"source": str(Path(__file__).parent / "golden" / "base.safetensors"), "codec": "tiny"},
        "trainable": {"lora": {"rank": 4}},
        "data": {
            "root": str(tiny_demonstrations),
            "cache": str(folder),
            "num_frames": 5,
            "window_stride": 2,
            "height_px": 64,
            "width_px": 64,
            "heatmap_sigma_px": 2.5,
            "text_tokens": 32,
        },
        "train": {**steps, "batch_size": 1, "gradient_accumulation": 2, "learning_rate": 1e-3, "tracker": "none"},
    }
    config = config_from_dict(values)
    episodes = read_episodes(config.data.root)
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "validation"):
        dataset = WindowDataset(episodes, config.data, 3, split, config.seed)
        keys = Keys(folder, dataset, codec_digest("tiny", config.data.text_tokens), config.data.heatmap_sigma_px)
        with ShardWriter(folder) as entries:
            for item in range(len(keys)):
                rgb, heat = torch.randn(2, 3, 48, 2, 4, 4, generator=generator)
                valid = torch.ones(3, 2, dtype=torch.bool)
                valid[0, 1] = bool(torch.rand((), generator=generator) < 0.5)  # streams of another size in every micro-batch
                entries.add(keys.key(item), {"rgb": rgb, "heat": heat, "heat_valid": valid})
        for path in keys.texts().values():
            write_entry(path, {"text": torch.randn(32, 32, generator=generator)})
    return values


@pytest.fixture(scope="module")
def off() -> "HeatmapWanTrainingModule":
    """A module with the switch off, every trained tensor moved."""
    from tests.saved import make_module, shake

    module = make_module()
    shake(module)
    return module


@pytest.fixture(scope="module")
def on() -> "HeatmapWanTrainingModule":
    """The same with the switch on."""
    from tests.saved import make_module, shake

    module = make_module(switch=True)
    shake(module)
    return module
