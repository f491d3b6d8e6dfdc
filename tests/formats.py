"""Episodes written in the formats that other systems record, so that one demonstration can be read through each of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mvwan.batch import Episode

BOX_PX = 12.0


def write_mvtrack(root: Path, episodes: Sequence[Episode], splits: dict[str, str] | None = None) -> Path:
    """`root` with a scene per episode, `<word><number>`: the tracked point is the middle of a box, unseen where it is out of the picture.

    `splits` gives `train`, `val` or `test` by scene.
    """
    for number, episode in enumerate(episodes):
        scene = f"{episode.name.split('/')[0].split('-')[0]}{number}"
        rgb = episode.read_rgb(range(episode.num_frames))
        for view, camera in enumerate(episode.cameras):
            folder = root / scene / f"{scene}-{view + 1}"
            (folder / "img").mkdir(parents=True)
            uv_px, depth_m = camera.project(episode.point_m)
            seen = camera.inside(uv_px, depth_m)
            for frame, picture in enumerate(rgb[view]):
                Image.fromarray(picture).save(folder / "img" / f"{frame + 1}.jpg", quality=95, subsampling=0)
            corners = np.where(seen[:, None], uv_px - BOX_PX / 2, 0)
            lines = [f"{u:.3f},{v:.3f},{BOX_PX},{BOX_PX}\n" for u, v in corners]
            (folder / "groundtruth.txt").write_text("".join(lines))
            (folder / "invisible.txt").write_text(",".join(str(int(not flag)) for flag in seen))
        for name in [splits[scene]] if splits else []:
            with (root / f"{name}_split.txt").open("a") as file:
                file.writelines(f"{scene}-{view + 1}\n" for view in range(len(episode.cameras)))
    return root
