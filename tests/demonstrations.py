"""A LeRobot dataset of four short demonstrations, made in a moment: a red ball on a path through three views. Knows no test."""

from pathlib import Path

import numpy as np

from mvwan.cameras import Camera
from mvwan.data.lerobot import write_dataset


def write_demonstrations(root: Path, first: int = 0, episodes: int = 4, reverse_views: bool = False) -> Path:
    """`root`, a dataset of `episodes` of nine frames at 64 px in three views; the ball is drawn where it projects.

    Another `first` gives other paths. The gripper closes on its way, one frame later in each episode.
    """
    intrinsics = np.array([[64.0, 0, 32], [0, 64.0, 32], [0, 0, 1]])
    cameras = []
    for name, angle in (("left", -0.5), ("right", 0.5), ("front", 0.0)):
        pose = np.eye(4)
        pose[:3, :3] = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
        pose[2, 3] = 1.0
        cameras.append(Camera(name=name, width_px=64, height_px=64, intrinsics=intrinsics, world_to_camera=pose))
    cameras = cameras[::-1] if reverse_views else cameras
    rows, columns = np.mgrid[0:64, 0:64] + 0.5
    with write_dataset(root, cameras=cameras, fps=10, action_names=("dx", "dy", "dz", "gripper"), robot_type="ball") as writer:
        for episode in range(episodes):
            draw = np.random.default_rng(first + episode)
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
                layout_seed=first + episode,
                rgb=rgb,
                point_m=point_m,
                hand_m=point_m,
                gripper_open=np.arange(9) < 3 + episode,
                action=np.zeros((9, 4)),
                success=np.ones(9, bool),
            )
    return root
