"""What all tests share: the two markers skip with their reason, and nothing looks for the model hub."""

import os
from pathlib import Path
from typing import Any

import pytest

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
    """A LeRobot dataset of four short demonstrations at 64 px: a red ball on a path through three views, drawn where it projects."""
    import numpy as np

    from mvwan.cameras import Camera
    from mvwan.data.lerobot import write_dataset

    root = tmp_path_factory.mktemp("demonstrations") / "ball"
    intrinsics = np.array([[64.0, 0, 32], [0, 64.0, 32], [0, 0, 1]])
    cameras = []
    for name, angle in (("left", -0.5), ("right", 0.5), ("front", 0.0)):
        pose = np.eye(4)
        pose[:3, :3] = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
        pose[2, 3] = 1.0
        cameras.append(Camera(name=name, width_px=64, height_px=64, intrinsics=intrinsics, world_to_camera=pose))
    rows, columns = np.mgrid[0:64, 0:64] + 0.5
    with write_dataset(root, cameras=cameras, fps=10, action_names=("dx", "dy", "dz", "gripper"), robot_type="ball") as writer:
        for episode in range(4):
            draw = np.random.default_rng(episode)
            start, end = draw.uniform(-0.3, 0.3, (2, 3))
            point_m = np.linspace(start, end, 9)
            rgb = np.zeros((3, 9, 64, 64, 3), np.uint8)
            for view, camera in enumerate(cameras):
                for frame, (u, v) in enumerate(camera.project(point_m)[0]):
                    ball = np.exp(-((columns - u) ** 2 + (rows - v) ** 2) / 32)[..., None]
                    floor = np.array([60, 80 + 20 * view, 100]) + 40 * (rows[..., None] > 40)
                    rgb[view, frame] = (floor * (1 - ball) + np.array([230, 40, 30]) * ball).round()
            writer.add_episode(
                name=f"ball/{episode:06d}",
                instruction="move the ball",
                layout_seed=episode,
                rgb=rgb,
                point_m=point_m,
                hand_m=point_m,
                gripper_open=np.ones(9),
                action=np.zeros((9, 4)),
                success=np.ones(9, bool),
            )
    return root


@pytest.fixture(scope="session")
def golden_run(tiny_demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a run of seconds: the two-block base of the golden files, `tiny_demonstrations`, and a complete latent cache.

    The cache holds noise, and text of that base's width, so that such runs do not change with the weights that the package ships.
    """
    import torch

    from mvwan import latent_cache
    from mvwan.config import config_from_dict
    from mvwan.data.dataset import WindowDataset, read_episodes
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
        keys = latent_cache._keys(folder, dataset, codec_digest("tiny", config.data.text_tokens), config.data.heatmap_sigma_px)
        for path in keys.samples:
            rgb, heat = torch.randn(2, 3, 48, 2, 4, 4, generator=generator)
            valid = torch.ones(3, 2, dtype=torch.bool)
            valid[0, 1] = bool(torch.rand((), generator=generator) < 0.5)  # streams of another size in every micro-batch
            latent_cache._write(path, {"rgb": rgb, "heat": heat, "heat_valid": valid})
        for path in sorted(set(keys.texts)):
            latent_cache._write(path, {"text": torch.randn(32, 32, generator=generator)})
    return values
