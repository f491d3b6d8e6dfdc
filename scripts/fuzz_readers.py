"""Coverage-guided fuzzing of everything that reads a file: `python scripts/fuzz_readers.py TARGET --minutes 3`.

Starts from real files that it makes itself in a temporary folder, and lets atheris (libFuzzer) change them. A reader may return or
raise `MvwanError` with a one-line message; anything else, ten seconds for one input, or 4 GB of memory, ends the run with the input
stored in the folder `--findings`. Needs atheris: `pip install 'mvwan[fuzz]'` (Linux on x86-64, Python 3.11 to 3.13).
"""

import argparse
import importlib
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

try:
    atheris: Any = importlib.import_module("atheris")
except ModuleNotFoundError:
    sys.exit("fuzz_readers: atheris is not installed. Run: pip install 'mvwan[fuzz]' (Linux on x86-64, Python 3.11 to 3.13)")

# First of all that needs them, so that the standard library's readers are instrumented too.
with atheris.instrument_imports(include=["mvwan", "yaml", "json", "pickle"], enable_loader_override=False):
    import json
    import pickle

    import numpy as np
    import torch

    from mvwan.cameras import Camera
    from mvwan.checkpoint import load_trained, read_optimizer, save_checkpoint
    from mvwan.config import Config, TrailConfig, config_from_dict, dump_yaml, parse_overrides, read_yaml
    from mvwan.data.episode import count_frames, read_frames
    from mvwan.data.lerobot import read_lerobot, write_dataset
    from mvwan.data.mvtrack import read_mvtrack
    from mvwan.data.rlbench import read_rlbench
    from mvwan.data.trail import read_trail
    from mvwan.errors import MvwanError
    from mvwan.files import COMMIT_MARK, read_json, read_json_lines, sha256_file
    from mvwan.pickles import read_pickle
    from mvwan.pictures import png
    from mvwan.tensors import TensorFile, digest, write_tensors

Read = Callable[[bytes], object]
SECONDS_PER_INPUT, MOST_MEMORY_MB, LONGEST_INPUT = 10, 4096, 1 << 16


def allowed(read: Read) -> Read:
    """`read`, with the refusals that are meant to be turned into a plain return."""

    def once(data: bytes) -> object:
        try:
            return read(data)
        except MvwanError as error:
            if not str(error) or not str(error).isprintable():
                raise AssertionError(f"not one line: {error!r}") from error
            return None

    return once


def of_file(path: Path, *readers: Callable[[Path], object]) -> Read:
    """Writes the input to `path` and calls each reader on it."""

    def read(data: bytes) -> None:
        path.write_bytes(data)
        for reader in readers:
            allowed(lambda _, reader=reader: reader(path))(data)

    return read


def safetensors(folder: Path) -> tuple[Read, list[bytes]]:
    """Tensor files, and those of the older system."""
    path = folder / "given.safetensors"
    write_tensors(path, {"a": torch.ones(2, 3), "b": torch.zeros((), dtype=torch.int64)}, {"digest": "x"})
    seeds = [path.read_bytes()]
    native = {"blocks.0.projector.weight": torch.ones(4, 4), "blocks.0.self_attn.q.lora_A.default.weight": torch.ones(2, 4)}
    write_tensors(path, native)
    return of_file(path, lambda given: digest(dict(TensorFile(given))), load_trained), [*seeds, path.read_bytes()]


def small_checkpoint(folder: Path) -> Path:
    """A checkpoint folder with two tensors."""
    tensors = {"blocks.0.projector.weight": torch.ones(4, 4), "blocks.0.attn1.to_q.lora_A.default.weight": torch.ones(2, 4)}
    groups = {name: {"mode": mode, "names": [key]} for name, mode, key in zip(("a", "b"), ("full", "lora"), tensors, strict=True)}
    manifest = {"base": {"id": "tiny", "digest": "sha256:0"}, "views": 3, "fusion": "channel", "groups": groups}
    manifest |= {"unfreeze_modulation_and_norms": False, "lora": {"rank": 2, "alpha": 2.0}, "config": {"train": {"steps": 4}}}
    return save_checkpoint(folder, 4, tensors, manifest, {f"exp_avg/{name}": tensor for name, tensor in tensors.items()}, {})


def manifest(folder: Path) -> tuple[Read, list[bytes]]:
    """Manifests of checkpoint folders, under a valid commit mark."""
    checkpoint = small_checkpoint(folder)
    path = checkpoint / "manifest.json"

    def marked(reader: Callable[[Path], object]) -> Callable[[Path], object]:
        def read(given: Path) -> object:
            (checkpoint / COMMIT_MARK).write_text(sha256_file(given))
            return reader(checkpoint)

        return read

    seeds = [path.read_bytes(), json.dumps(json.loads(path.read_text())).encode()]
    return of_file(path, marked(load_trained), marked(read_optimizer)), seeds


def of_files(paths: Sequence[Path], reader: Callable[[], object]) -> tuple[Read, list[bytes]]:
    """Writes the input to one of `paths`, which its first byte names, calls the reader, and puts back what was there."""
    whole = [path.read_bytes() for path in paths]

    def read(data: bytes) -> object:
        which = data[0] % len(paths) if data else 0
        paths[which].write_bytes(data[1:])
        try:
            return allowed(lambda _: reader())(data)
        finally:
            paths[which].write_bytes(whole[which])

    return read, [bytes([which]) + content for which, content in enumerate(whole)]


def jsonl(folder: Path) -> tuple[Read, list[bytes]]:
    """JSON files and JSON lines."""
    seeds = [b'{"kind": "train", "step": 1, "loss": 0.5}\n{"a": [1, null, "nan"]}\n', b'{"a": {"b": [1e5, true, "\\u00e4"]}}\n']
    return of_file(folder / "given.jsonl", read_json_lines, read_json), seeds


def yaml(folder: Path) -> tuple[Read, list[bytes]]:
    """Settings in YAML files and in --set."""

    def settings(path: Path) -> object:
        return config_from_dict(read_yaml(path), str(path)).to_dict()

    def override(path: Path) -> object:
        text = path.read_bytes().decode("utf-8", "replace")
        return config_from_dict(parse_overrides([text]), "settings")

    seeds = [dump_yaml(Config()).encode(), b"train: {steps: 10, learning_rate: 1.0e-4}\n", b"data.cameras=[a, b, c]", b"x: !!int 1:30\n"]
    return of_file(folder / "given.yaml", settings, override), seeds


def pickles(folder: Path) -> tuple[Read, list[bytes]]:
    """Pickles of strangers."""
    value = {"a": np.arange(6.0).reshape(2, 3), "b": np.float32(1), "c": [1, "x", b"y", {2}, OrderedDict(a=None)], "d": np.array(["x"])}
    return of_file(folder / "given.pkl", read_pickle), [pickle.dumps(value, protocol) for protocol in range(6)]


def dataset(folder: Path) -> Path:
    """A LeRobot dataset of one camera and two short episodes."""
    camera = Camera(name="left", width_px=32, height_px=32, intrinsics=np.diag([32.0, 32, 1]), world_to_camera=np.eye(4))
    root = folder / "dataset"
    with write_dataset(root, cameras=[camera], fps=10, action_names=("x", "y"), robot_type="none") as writer:
        for index in range(2):
            numbers = np.linspace(0, 1, 15).reshape(5, 3)
            writer.add_episode(
                name=f"e{index}",
                instruction="move",
                layout_seed=0,
                rgb=np.full((1, 5, 32, 32, 3), 40 * index, np.uint8),
                point_m=numbers,
                hand_m=numbers,
                gripper_open=np.ones(5),
                action=numbers[:, :2],
                success=np.ones(5, bool),
            )
    return root


def parquet(folder: Path) -> tuple[Read, list[bytes]]:
    """Both tables of a dataset."""
    root = dataset(folder)
    paths = [root / "meta/episodes/chunk-000/file-000.parquet", root / "data/chunk-000/file-000.parquet"]
    return of_files(paths, lambda: read_lerobot(root))


def video(folder: Path) -> tuple[Read, list[bytes]]:
    """Videos, counted and decoded."""
    path = dataset(folder) / "videos/observation.images.left/chunk-000/file-000.mp4"
    seeds = [path.read_bytes()]
    return of_file(path, count_frames, lambda given: read_frames(given, 10.0, range(10), (32, 32))), seeds


def put(path: Path, content: bytes | object) -> Path:
    """`path`, which then holds these bytes, or the pickle of what else was given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    return path


def mvtrack(folder: Path) -> tuple[Read, list[bytes]]:
    """Boxes, flags, splits and a picture of a scene."""
    scene, picture = folder / "mvtrack/cup1", png(np.zeros((16, 16, 3), np.uint8))
    texts = {"groundtruth.txt": b"1,2,3,4\n5,6,7,8\n", "invisible.txt": b"0,1", "img/1.png": picture}
    paths = [put(scene / "cup1-1" / name, content) for name, content in texts.items()]
    paths.append(put(folder / "mvtrack/train_split.txt", b"cup1-1\n"))
    put(scene / "cup1-1/img/2.png", picture)
    return of_files(paths, lambda: [episode.read_rgb([0, 1]) for episode in read_mvtrack(scene.parent)])


def trail(folder: Path) -> tuple[Read, list[bytes]]:
    """Every pickle of a demonstration, and its instruction."""
    one = folder / "trail/push/trail_1"
    contents: dict[str, Any] = {"poses/000000.pkl": np.array([0.1, 0.2, 0.3, 1, 0, 0, 0]), "gripper_states/000000.pkl": True}
    contents |= {"extrinsics.pkl": {f"3rd_{sensor}": np.eye(4) for sensor in (1, 2, 3)}, "instruction.txt": b"push"}
    for sensor in (1, 2, 3):
        contents |= {f"3rd_{sensor}_pcd/000000.pkl": np.full((4, 4, 3), 0.1, np.float32)}
        contents |= {f"3rd_{sensor}_bgr/000000.pkl": np.full((4, 4, 3), 9, np.uint8)}
    paths = [put(one / name, content) for name, content in contents.items()]
    settings = TrailConfig(scene_bounds_m=(0.0, 0.0, 0.0, 1.0, 1.0, 1.0), size_px=16)
    return of_files(paths, lambda: [episode.read_rgb([0]) for episode in read_trail(one.parent, settings)])


def rlbench(folder: Path) -> tuple[Read, list[bytes]]:
    """The pickles and a picture of a demonstration."""
    episode = folder / "rlbench/push/all_variations/episodes/episode0"
    modules = {name: ModuleType(name) for name in ("rlbench", "rlbench.backend", "rlbench.demo", "rlbench.backend.observation")}
    made: list[Any] = []
    for module, name in (("rlbench.demo", "Demo"), ("rlbench.backend.observation", "Observation")):
        setattr(modules[module], name, type(name, (), {"__module__": module}))
        made.append(getattr(modules[module], name)())
    sys.modules.update(modules)
    demo, observation = made
    observation.gripper_pose, observation.gripper_open = np.array([0.1, 0.2, 0.3, 0, 0, 0, 1]), 1.0
    observation.misc = {"front_camera_extrinsics": np.eye(4), "front_camera_intrinsics": np.diag([-9.0, -9, 1])}
    demo._observations = [observation, observation]
    contents = {"low_dim_obs.pkl": demo, "variation_descriptions.pkl": ["push"], "front_rgb/0.png": png(np.zeros((16, 16, 3), np.uint8))}
    paths = [put(episode / name, content) for name, content in contents.items()]
    put(episode / "front_rgb/1.png", contents["front_rgb/0.png"])
    for name in modules:
        del sys.modules[name]
    return of_files(paths, lambda: [found.read_rgb([0, 1]) for found in read_rlbench(folder / "rlbench")])


TARGETS = {"safetensors": safetensors, "manifest": manifest, "jsonl": jsonl, "yaml": yaml, "pickle": pickles}
TARGETS |= {"parquet": parquet, "video": video, "mvtrack": mvtrack, "trail": trail, "rlbench": rlbench}


def main() -> None:
    """Fuzzes one target for the time asked for; ends with libFuzzer's exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--findings", type=Path, default=Path("runs/fuzz"), help="folder for inputs that break a reader")
    parser.add_argument("--input", type=Path, help="run one stored input instead")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder, corpus = Path(name), Path(name) / "corpus"
        corpus.mkdir()
        given.findings.mkdir(parents=True, exist_ok=True)
        read, seeds = TARGETS[given.target](folder)
        for number, seed in enumerate(seeds):
            (corpus / str(number)).write_bytes(seed)
        options = [f"-max_total_time={round(60 * given.minutes)}", f"-timeout={SECONDS_PER_INPUT}", f"-rss_limit_mb={MOST_MEMORY_MB}"]
        options += [f"-max_len={LONGEST_INPUT}", f"-artifact_prefix={given.findings}/{given.target}-", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *options, str(given.input or corpus)], read)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
