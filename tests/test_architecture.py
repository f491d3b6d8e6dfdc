"""The map of the house holds: floors, doors, names and lengths, read from the source with `ast` and never imported.

A file imports only from strictly lower floors. A new file gets a line in `FLOORS` and in README's map.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "mvwan"

# A half is a step on the landing of its floor: what files of the same floor stand on, or what stands on them.
FLOORS: dict[float, tuple[str, ...]] = {
    -1: ("errors",),
    0: ("cameras", "devices", "files", "markdown", "memory", "sharding", "shapes", "signals", "tensors"),
    0.5: ("pickles", "processes"),
    1: (
        "ablation.intervals",
        "ablation.rates",
        "batch",
        "config",
        "data.fields",
        "data.left_out",
        "heatmaps",
        "metrics",
        "model.native_names",
        "evaluation_table",
        "latent_shards",
        "model.trainable_table",
        "pictures",
        "report_figures",
        "report_page",
        "sim.tasks",
        "stages",
    ),
    1.5: (
        "ablation.statistics",
        "actions",
        "data.episode",
        "data.picture_files",
        "data.point_clouds",
        "data.windows",
        "flow",
        "model.adapters",
        "precision",
    ),
    1.75: ("data.lerobot_files",),
    2: (
        "ablation.figures",
        "data.lerobot",
        "data.mvtrack",
        "data.rlbench",
        "data.trail",
        "data.transforms",
        "heat_reader",
        "model.quantized",
        "model.trainable",
        "model.wan",
        "presets",
        "report_frames",
        "reproduce_table",
        "rerun_export",
        "sensitivity_report",
        "trajectory",
    ),
    2.5: ("ablation.grid", "ablation.report", "cli_settings", "model.context_parallel"),
    2.75: ("model.attention",),
    3: ("checkpoint", "compatibility", "data.dataset", "model.latents", "model.movement", "model.multiview_wan", "prediction_files"),
    4: ("baselines", "data.convert", "checkpoint_writer", "latent_cache", "model.surgery"),
    5: ("checkpoint_compare", "checkpoint_export", "sample", "sim.metaworld", "train_data", "training_module"),
    5.5: ("deepspeed_engine", "sim.execution"),
    6: ("data_report", "evaluate", "optimizer", "policies", "run_manifest", "sensitivity_candidates", "strategy"),
    6.25: ("bench_networks", "train_check"),
    6.5: ("bench_pipeline", "bench_points", "closed_loop", "run_record"),
    6.75: ("report_rollouts", "step_trace"),
    7: ("ablation.outcomes", "report", "suites", "train"),
    7.125: ("ablation.jobs",),
    7.25: ("ablation.check",),
    7.5: ("ablation.cluster",),
    8: ("bench", "cli_checkpoint", "plan", "sensitivity_probes"),
    8.1: ("trainings",),
    8.25: ("ablate", "demo", "reproduce", "bench_report", "sensitivity"),
    8.5: ("cli_ablate", "cli_bench", "cli_data", "cli_plan", "cli_reproduce", "cli_sensitivity"),
    9: ("cli",),
    10: ("__init__", "__main__"),
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}

# A heavy library enters by one door.
DOORS: dict[str, tuple[str, ...]] = {
    "accelerate": ("strategy", "train"),
    "deepspeed": ("deepspeed_engine",),
    "diffusers": ("model.wan",),
    "gymnasium": ("sim.metaworld",),
    "matplotlib": ("bench_report",),
    "metaworld": ("sim.metaworld",),
    "mujoco": ("sim.metaworld",),
    "peft": ("model.adapters", "model.trainable"),
    "rerun": ("rerun_export",),
    "submitit": ("ablation.cluster",),
    "swanlab": ("train",),
    "tensorboard": ("train",),
    "torch.utils.tensorboard": ("train",),
    "trackio": ("train",),
    "torchao": ("model.quantized",),
    "transformers": ("model.wan", "optimizer"),
    "wandb": ("train",),
}

HEAVY = {"accelerate", "diffusers", "mujoco", "torch", "transformers"}
FORBIDDEN_NAMES = {"common", "helper", "helpers", "misc", "util", "utils"}
MOST_LINES = 500
MACHINE_PATH = re.compile(r"""(?<![\w.$}~-])/(?:work|root|farm|home/\w+|Users/\w+|mnt/\w+|DATA)/""")


def room_of(path: Path) -> str:
    """`model.wan` for src/mvwan/model/wan.py, `model` for a sub-package's own file."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


FILES = {room_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if "__pycache__" not in path.parts}
SUB_PACKAGES = {room for room, path in FILES.items() if path.name == "__init__.py" and room != "__init__"}
ROOMS = [room for room in FILES if room not in SUB_PACKAGES]


def imports_of(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, dotted module) of every import, wherever it stands; `from a import b` gives both `a` and `a.b`."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the whole name"
            found.append((node.lineno, node.module or ""))
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("import_module")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.append((node.lineno, str(node.args[0].value)))
    return found


def broken_floors(room: str, tree: ast.AST) -> list[str]:
    """A sentence for each import of a room that is not strictly lower."""
    broken: list[str] = []
    for line, module in imports_of(tree):
        if module == "mvwan":
            continue
        name = module.removeprefix("mvwan.")
        if not module.startswith("mvwan.") or name not in FLOOR_OF:
            continue
        if FLOOR_OF[name] >= FLOOR_OF[room]:
            broken.append(f"{room}:{line} (floor {FLOOR_OF[room]}) imports {name} (floor {FLOOR_OF[name]})")
    return broken


def broken_doors(room: str, tree: ast.AST) -> list[str]:
    """A sentence for each heavy library that this room imports past its door."""
    return [
        f"{room}:{line} imports {module}; its door is {' or '.join(doors)}"
        for line, module in imports_of(tree)
        for library, doors in DOORS.items()
        if (module == library or module.startswith(library + ".")) and room not in doors
    ]


def unpicklers(tree: ast.AST) -> list[str]:
    """Every way of reading pickles that stands in a file."""
    found = [module for _, module in imports_of(tree) if module.split(".")[0] in {"pickle", "cPickle", "cloudpickle", "dill", "joblib"}]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"torch.load", "torch.serialization.load"}:
            found.append(f"line {node.lineno}: torch.load")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.append(f"line {node.value.lineno}: allow_pickle")
    return found


def parse(room: str) -> ast.AST:
    return ast.parse(FILES[room].read_text(encoding="utf-8"))


def test_every_file_has_a_floor() -> None:
    assert set(ROOMS) <= set(FLOOR_OF), f"not on the map of this test: {sorted(set(ROOMS) - set(FLOOR_OF))}"


def test_every_floor_has_its_files() -> None:
    assert set(FLOOR_OF) <= set(ROOMS), f"on the map of this test, not in src/mvwan: {sorted(set(FLOOR_OF) - set(ROOMS))}"


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_down(room: str) -> None:
    assert not broken_floors(room, parse(room))


@pytest.mark.parametrize("room", ROOMS)
def test_heavy_libraries_use_their_door(room: str) -> None:
    assert not broken_doors(room, parse(room))


@pytest.mark.parametrize("room", ROOMS)
def test_data_and_model_do_not_know_each_other(room: str) -> None:
    other = {"data": "mvwan.model", "model": "mvwan.data"}.get(room.split(".")[0])
    assert other is None or not [module for _, module in imports_of(parse(room)) if module.startswith(other)]


@pytest.mark.parametrize("room", sorted(SUB_PACKAGES))
def test_sub_packages_hold_no_code(room: str) -> None:
    body = ast.parse(FILES[room].read_text(encoding="utf-8")).body
    assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body), f"{FILES[room]} holds code"


@pytest.mark.parametrize("room", ROOMS)
def test_length_name_and_docstring(room: str) -> None:
    path = FILES[room]
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{path.relative_to(ROOT)} has {lines} lines; {MOST_LINES} is the end: split the room"
    assert not FORBIDDEN_NAMES & set(room.split(".")), f"{path.relative_to(ROOT)} says nothing about its job"
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path.relative_to(ROOT)} has no docstring"


@pytest.mark.parametrize("room", ROOMS)
def test_strangers_bytes_are_read_in_one_place(room: str) -> None:
    """Unpickling runs code, so only `pickles` may touch them, behind its restricted reader."""
    assert room == "pickles" or not unpicklers(parse(room))


def test_readme_maps_every_file() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    mapped = set(re.findall(r"`(src/mvwan/[\w/]+\.py)`", readme))
    there = {str(FILES[room].relative_to(ROOT)) for room in ROOMS}
    assert there - mapped == set(), "not in README's map"
    assert mapped - there == set(), "in README's map, not in src/mvwan"


def texts() -> list[Path]:
    """Every text file that ships, this one aside."""
    folders = [ROOT / name for name in ("src", "tests", "scripts", "docs", ".ci", "configs", "benchmarks")]
    inside = [path for folder in folders if folder.exists() for path in folder.rglob("*")]
    suffixes = {".py", ".sh", ".md", ".toml", ".yaml", ".yml", ".json", ".lock", ""}
    found = [path for path in [*inside, *ROOT.iterdir()] if path.is_file() and path.suffix in suffixes]
    return [path for path in found if path != Path(__file__) and path.name != ".git" and "__pycache__" not in path.parts]


def test_no_path_of_one_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in texts()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert not found


@pytest.mark.parametrize("module", ["mvwan", "mvwan.config", "mvwan.presets", "mvwan.cli"])
def test_settings_and_help_are_light(module: str) -> None:
    """Checking a config and printing help load neither torch nor anything that needs it."""
    code = f"import sys, {module}; heavy = {HEAVY} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-400:]


# The rules above can fail: each is shown a file that breaks it.


def test_an_upward_import_is_found() -> None:
    assert broken_floors("shapes", ast.parse("from mvwan.train import train"))
    assert broken_floors("shapes", ast.parse("def f():\n    import mvwan.config"))
    assert broken_floors("shapes", ast.parse("from mvwan import cameras"))
    assert broken_floors("shapes", ast.parse("importlib.import_module('mvwan.cli')"))
    assert not broken_floors("train", ast.parse("from mvwan.shapes import num_tokens"))


def test_a_side_entrance_is_found() -> None:
    assert broken_doors("sample", ast.parse("def f():\n    from diffusers.models import AutoencoderKLWan"))
    assert broken_doors("evaluate", ast.parse("from torch.utils.tensorboard import SummaryWriter"))
    assert broken_doors("evaluate", ast.parse("from torch.utils import tensorboard"))
    assert not broken_doors("train", ast.parse("import accelerate"))


def test_an_unpickler_is_found() -> None:
    assert unpicklers(ast.parse("def f():\n    import pickle"))
    assert unpicklers(ast.parse("from pickle import loads"))
    assert unpicklers(ast.parse("torch.load(path, weights_only=True)"))
    assert unpicklers(ast.parse("np.load(path, allow_pickle=True)"))
    assert not unpicklers(ast.parse("np.load(path, allow_pickle=False)"))


def test_a_machine_path_is_found() -> None:
    found = ["cd /" + "work/main", 'open("/' + 'root/x")', "/" + "home/someone/data"]
    assert all(MACHINE_PATH.search(text) for text in found)
    assert not any(MACHINE_PATH.search(text) for text in ("the DATA/main folder", "$HOME/DATA/", "runs/DATA/x", "https://x.org/DATA/x"))
