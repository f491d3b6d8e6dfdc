"""The workshop is true: the lock fits pyproject, scripts are clean, and what README and docs show is what the commands print.

In README.md and docs/, `<!-- prints -->` stands between a command in a fenced block and the table or fenced block that it prints, exactly.
"""

import ast
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
GUIDES = [ROOT / "docs" / "unfreeze.md", ROOT / "docs" / "unfreeze.zh-CN.md"]
PAGES = [ROOT / "README.md", *GUIDES]
OTHER_PAGES = [ROOT / "CONTRIBUTING.md", *sorted(set((ROOT / "docs").glob("*.md")) - set(GUIDES))]
SHELL_FILES = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / "configs" / "slurm" / "train.sbatch", ROOT / ".ci" / "run"]

OUTPUT = re.compile(r"```bash\n([^\n]+)\n```\n<!-- prints -->\n(?:```text\n(.*?)\n```|((?:\|[^\n]*\n)+))", re.DOTALL)
LARGE_NUMBER = re.compile(r"\b\d{1,3}(?:,\d{3})+\b")


def lock() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs), "each line of the lock is name==version"
    return {canonicalize_name(name): version for name, version in pairs}


def test_lock_holds_exact_versions_and_no_index() -> None:
    locked = lock()
    assert locked["torch"] == "2.13.0"
    assert not [version for version in locked.values() if not re.fullmatch(r"[\w.]+", version)]
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in text
    assert "--" not in text


def requirements() -> list[str]:
    """Of all extras but those that pyproject says are not in the lock file."""
    extras = [lines for name, lines in PROJECT["optional-dependencies"].items() if name not in ("deepspeed", "fuzz")]
    return PROJECT["dependencies"] + [line for lines in extras for line in lines]


@pytest.mark.parametrize("line", requirements())
def test_lock_fits_pyproject(line: str) -> None:
    wanted = Requirement(line)
    assert wanted.specifier.contains(lock()[canonicalize_name(wanted.name)])


UNIMPORTED = {"gymnasium", "packaging", "tensorboard"}
"""Declared for other packages: metaworld's pins, and the tracker that accelerate imports."""


def test_what_is_imported_is_declared_and_the_reverse() -> None:
    distributions = importlib.metadata.packages_distributions()
    imported: set[str] = set()
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                imported |= {module.split(".")[0] for module in modules}
    outside = imported - sys.stdlib_module_names - {"mvwan", "tests"} - {path.stem for path in (ROOT / "scripts").glob("*.py")}
    needed = {canonicalize_name(distributions[module][0]) for module in outside}
    extras = PROJECT["optional-dependencies"]
    declared = {
        canonicalize_name(Requirement(line).name)
        for line in [*PROJECT["dependencies"], *(line for name in ("sim", "view", "bench", "cluster", "quantize") for line in extras[name])]
    }
    assert needed <= declared, "imported, not declared"
    assert declared <= needed | UNIMPORTED, "declared, not imported"


@pytest.mark.parametrize("extra", sorted(PROJECT["optional-dependencies"]))
def test_no_extra_is_empty(extra: str) -> None:
    assert PROJECT["optional-dependencies"][extra]


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: path.name)
def test_shell_files_are_clean(path: Path) -> None:
    done = subprocess.run([BIN / "shellcheck", "--external-sources", path], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert path.name == "launch_training.sh" or os.access(path, os.X_OK), "sourced files aside, each can be run"


@pytest.mark.parametrize("target", ["setup", "demo", "test", "soak", "lint", "bench", "lock", "clean"])
def test_make_lists_and_knows_its_targets(target: str) -> None:
    listed = subprocess.run(["make", "--no-print-directory"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert re.search(rf"^make {target}\s+\S", listed, re.MULTILINE)
    subprocess.run(["make", "--dry-run", target], capture_output=True, check=True, cwd=ROOT)


def test_ci_ends_with_the_tests() -> None:
    commands = [line.strip() for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines() if line.startswith("make ")]
    assert [command.split()[1] for command in commands] == ["setup", "lint", "test"]


def test_hooks_run_the_tools_of_the_lock() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    entries = [hook["entry"].split()[0] for repository in hooks for hook in repository["hooks"]]
    assert {Path(entry).name for entry in entries} == {"ruff", "shellcheck", "pyright", "python"}
    assert all((BIN / Path(entry).name).exists() for entry in entries)


def test_a_wheel_holds_the_whole_package_and_works_without_its_source(tmp_path: Path) -> None:
    source, installed = tmp_path / "source", tmp_path / "installed"
    shutil.copytree(ROOT / "src" / "mvwan", source / "src" / "mvwan", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([*build, str(source)], check=True)
    with ZipFile(next(tmp_path.glob("mvwan-*.whl"))) as wheel:
        wheel.extractall(installed)
    ours = {path.relative_to(source / "src") for path in (source / "src" / "mvwan").rglob("*") if path.is_file()}
    assert ours == {path.relative_to(installed) for path in (installed / "mvwan").rglob("*") if path.is_file()}
    program = (
        "import mvwan; mvwan.load_model('tiny', checkpoint='tiny-tracking', fusion='view', action_head='gripper'); print(mvwan.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    assert Path(done.stdout.strip()).parent == installed / "mvwan"


@pytest.fixture
def bare_path(tmp_path: Path) -> str:
    """A PATH with bash alone: no apt-get, no sudo."""
    (tmp_path / "bash").symlink_to(shutil.which("bash") or "/bin/bash")
    return str(tmp_path)


def test_rendering_libraries_are_named_where_they_may_not_be_installed(bare_path: str, tmp_path: Path) -> None:
    broken = tmp_path / "python-that-cannot-render"
    broken.write_text("#!/bin/bash\nexit 1\n")
    broken.chmod(0o755)
    script = [str(ROOT / "scripts" / "rendering_libraries.sh"), str(broken)]
    done = subprocess.run(["/bin/bash", *script], capture_output=True, text=True, check=False, env={"PATH": bare_path})
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "apt-get install --yes --no-install-recommends libegl1 libegl-mesa0 libgl1-mesa-dri" in done.stderr


def test_rendering_works_here() -> None:
    script = ROOT / "scripts" / "rendering_libraries.sh"
    subprocess.run(["bash", script, sys.executable], check=True, env={**os.environ, "MUJOCO_GL": "egl"})


@cache
def printed(command: str) -> str:
    """What a shown command prints: `mvwan`, `python` and `scripts/…` of this checkout."""
    words = shlex.split(command)
    words[0] = str(BIN / words[0]) if (BIN / words[0]).exists() else words[0]
    environment = {name: value for name, value in os.environ.items() if name != "UNFREEZE_MODULATION_AND_NORMS"}
    return subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT, env=environment).stdout


def shown(page: Path) -> list[tuple[str, str]]:
    """(command, block below it) for each marked block of a page."""
    found = OUTPUT.findall(page.read_text(encoding="utf-8"))
    return [(command, fenced or table) for command, fenced, table in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_pages_show_is_what_commands_print(page: Path) -> None:
    blocks = shown(page)
    assert blocks
    assert len(blocks) == page.read_text(encoding="utf-8").count("<!-- prints -->"), "a marker without a block"
    for command, block in blocks:
        assert block.strip("\n") == printed(command).strip("\n"), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_large_numbers_on_pages_come_from_their_commands(page: Path) -> None:
    known = {number for command, _ in shown(page) for number in LARGE_NUMBER.findall(printed(command))}
    assert set(LARGE_NUMBER.findall(page.read_text(encoding="utf-8"))) <= known


def test_both_guides_say_the_same() -> None:
    english, chinese = (guide.read_text(encoding="utf-8") for guide in GUIDES)
    shape = [[line.split(" ")[0] for line in text.splitlines() if line.startswith("#")] for text in (english, chinese)]
    assert shape[0] == shape[1], "headings"
    assert shown(GUIDES[0]) == shown(GUIDES[1])
    fenced = [re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for text in (english, chinese)]
    code = [[[re.sub(r"\s*#.*", "", line) for line in block.splitlines()] for block in blocks] for blocks in fenced]
    assert code[0] == code[1], "commands"


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES], ids=lambda page: page.name)
def test_commands_on_pages_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL) + re.findall(r"`([^`\n]+)`", text))
    code = re.sub(r"\s#.*", "", code)
    verbs = set(re.findall(r"\bmvwan ([a-z]+)\b", code))
    assert verbs <= set(re.findall(r"^[│|]?\s*([a-z]+)\s", printed("mvwan --help"), re.MULTILINE)), "mvwan verbs"
    targets = set(re.findall(r"^\s*(?:make|\$ make) ([a-z]+)", code, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), "make targets"
    for path in re.findall(r"\b(?:scripts|docs|tests)/[\w./-]+\.\w+", text):
        assert (ROOT / path).exists(), path
