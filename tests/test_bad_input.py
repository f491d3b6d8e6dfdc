"""Bad input: more than 500 generated cases. A reader returns, or says in one line of `MvwanError` what is wrong: it never raises anything
else, hangs, takes the memory, or writes a file. A changed bit of anything under a digest is always an error.

Cases are drawn by hypothesis from fixed seeds. They change real files: one mutation of bytes, or one field of a tree of values.
`scripts/fuzz_readers.py` searches the same readers for longer.
"""

import copy
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mvwan import cli_checkpoint
from mvwan.checkpoint import TRAINED, find_checkpoint, load_trained, read_manifest, read_optimizer, save_checkpoint
from mvwan.compatibility import check_identity, check_resume, load_into
from mvwan.config import Config, config_from_dict, dump_yaml, parse_overrides, read_yaml
from mvwan.data.dataset import read_episodes
from mvwan.errors import MvwanError
from mvwan.files import read_json, read_json_lines, sha256_file
from mvwan.latent_cache import WINDOW, read_entry, write_entry
from mvwan.latent_shards import Shards, ShardWriter
from mvwan.model.native_names import to_ours
from mvwan.model.surgery import LoadReport, load_model
from mvwan.model.wan import load_transformer
from mvwan.pickles import read_pickle
from mvwan.tensors import TensorFile, digest, write_tensors
from tests.stock import make_stock

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / "golden"
SECONDS_PER_CASE = 10
CASES = {
    "safetensors bytes": 80,
    "safetensors header": 60,
    "checkpoint files": 60,
    "manifest": 90,
    "state": 20,
    "json": 60,
    "yaml": 80,
    "yaml bytes": 40,
    "settings": 40,
    "info and cameras": 80,
    "parquet bytes": 40,
    "parquet columns": 40,
    "video": 30,
    "pickle bytes": 60,
    "cache entry": 30,
    "base config": 50,
}
PROFILE = settings(
    derandomize=True, database=None, deadline=timedelta(seconds=SECONDS_PER_CASE), suppress_health_check=list(HealthCheck), print_blob=False
)


def test_there_are_at_least_500_cases() -> None:
    assert sum(CASES.values()) >= 500


# ── the property, and what mutates ────────────────────────────────────────────────────────────────────────────────────────────────


def refusal(read: Callable[[], object]) -> str | None:
    """What the reader said, None when it returned. Fails for every other exception and for more than one line."""
    start = time.monotonic()
    try:
        read()
        said = None
    except MvwanError as error:
        said = str(error)
        assert said.isprintable(), repr(said)
        assert 10 < len(said) < 2500, said
    assert time.monotonic() - start < SECONDS_PER_CASE
    return said


def files_under(folder: Path) -> list[str]:
    return sorted(os.path.join(where, name) for where, folders, names in os.walk(folder) for name in (*folders, *names))


def check_cases(kind: str, folder: Path, cases: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Calls `check` with as many cases as `CASES` says; each leaves the folder with the files that were there."""
    before, ran = files_under(folder), 0

    @settings(PROFILE, max_examples=CASES[kind])
    @given(cases)
    def each(case: Any) -> None:
        nonlocal ran
        ran += 1
        check(case)
        assert files_under(folder) == before

    each()
    assert ran >= CASES[kind]


@st.composite
def damaged(draw: st.DrawFn, contents: list[bytes]) -> tuple[int, bytes]:
    """(which content, the content with one mutation)."""
    which = draw(st.integers(0, len(contents) - 1))
    content = bytearray(contents[which])
    place = draw(st.integers(0, len(content) - 1))
    how = draw(st.sampled_from(["cut", "flip", "flip", "flip", "zeros", "twice", "insert", "overwrite"]))
    if how == "cut":
        return which, bytes(content[:place])
    if how == "flip":
        content[place] ^= 1 << draw(st.integers(0, 7))
    elif how == "zeros":
        content[place : place + 8] = bytes(min(8, len(content) - place))
    elif how == "twice":
        content[place:place] = content[place : place + 64]
    elif how == "insert":
        content[place:place] = draw(st.binary(min_size=1, max_size=8))
    else:
        content[place : place + 4] = draw(st.sampled_from([b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\1", b"-1e9"]))
    return which, bytes(content)


TEXTS = ["", "ü 视角", "a\nb\rc", "\x1b[31mred", "x" * 5000, "../../etc/passwd", "/etc/passwd", "\0", "\u202egnp", "{}", "nan", "%s", "."]
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2**31, 2**63, -(10**30), 10**400]),
    st.sampled_from([0.5, -0.0, 1e-320, 1e308, -1.5]),
    st.sampled_from(TEXTS),
    st.text(max_size=8),
    st.sampled_from([[], {}, [None], [[[]]], {"a": {}}, ["x"], [1, "x"], {"": 1}, {"id": 3, "digest": []}]),
)


def places_in(tree: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [here, *(place for key, value in inner for place in places_in(value, (*here, key)))]


@st.composite
def changed(draw: st.DrawFn, tree: Any) -> Any:
    """The tree with one value replaced, removed or added, anywhere in it."""
    *outer, last = draw(st.sampled_from([place for place in places_in(tree) if place]))
    tree = copy.deepcopy(tree)
    holder = tree
    for key in outer:
        holder = holder[key]
    how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
    if how == "remove":
        del holder[last]
    elif how == "add" and isinstance(holder, dict):
        holder[draw(st.sampled_from(TEXTS))] = draw(ODD)
    else:
        holder[last] = draw(ODD)
    return tree


# ── safetensors ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def with_header(header: bytes, length: int | None = None, data: bytes = bytes(64)) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def test_damaged_tensor_files(tmp_path: Path) -> None:
    small = {"blocks.0.projector.weight": torch.ones(4, 4), "blocks.0.self_attn.q.lora_A.default.weight": torch.ones(2, 4)}
    write_tensors(tmp_path / "given.safetensors", small)
    write_tensors(tmp_path / "other.safetensors", {"a": torch.ones(3, dtype=torch.int64), "b": torch.tensor(True)}, {"digest": "x"})
    contents = [(tmp_path / name).read_bytes() for name in ("given.safetensors", "other.safetensors")]

    def check(case: tuple[int, bytes]) -> None:
        (tmp_path / "given.safetensors").write_bytes(case[1])
        for said in (refusal(lambda: load_trained(tmp_path / "given.safetensors")), refusal(read_all_tensors)):
            assert said is None or "given.safetensors" in said

    def read_all_tensors() -> None:
        digest(dict(TensorFile(tmp_path / "given.safetensors")))

    check_cases("safetensors bytes", tmp_path, damaged(contents), check)


def test_lying_tensor_headers(tmp_path: Path) -> None:
    path = tmp_path / "given.safetensors"
    dtypes = ["F32", "F64", "BF16", "I8", "BOOL", "F8_E5M2", "F8_E8M0", "F4", "C64", "U16", "Q9", 5, None]
    shapes = [[4, 4], [], [16], [-1], [2**62, 4], [0, 2**62], [2**32, 2**32], [1.5], "4", [16, 1, 1, 1, 1, 1, 1, 1, 1]]
    offsets = [[0, 64], [0, 2**63], [64, 0], [0, 0], [-1, 63], [0], ["0", "64"]]
    names = st.one_of(st.sampled_from([*TEXTS, "blocks.0.projector.weight", "blocks.0.self_attn.q.lora_A.weight"]), st.text(max_size=12))
    entry = st.fixed_dictionaries(
        {"dtype": st.sampled_from(dtypes), "shape": st.sampled_from(shapes), "data_offsets": st.sampled_from(offsets)}
    )
    headers = st.dictionaries(names, st.one_of(entry, entry, ODD), max_size=2).map(lambda header: with_header(json.dumps(header).encode()))
    lengths = st.sampled_from([0, 1, 7, 100, 2**31, 2**40, 2**63, 2**64 - 1]).map(lambda length: with_header(b"{}", length))
    texts = [b"", b"{", b"not JSON", b"[]", b"null", b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000, b'{"__metadata__": {"a": 1}}', b"{}{}"]

    def check(content: bytes) -> None:
        path.write_bytes(content)
        said = refusal(lambda: load_trained(path))
        assert said is not None
        assert "given.safetensors" in said
        refusal(lambda: digest(dict(TensorFile(path))))

    path.write_bytes(b"")
    check_cases("safetensors header", tmp_path, st.one_of(headers, headers, lengths, st.sampled_from(texts).map(with_header)), check)


# ── checkpoint folders ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small whole checkpoint with everything that one can hold."""
    tensors = {"blocks.0.projector.weight": torch.ones(4, 4), "blocks.0.attn1.to_q.lora_A.default.weight": torch.ones(2, 4)}
    groups = {name: {"mode": mode, "names": [key]} for name, mode, key in zip(("a", "b"), ("full", "lora"), tensors, strict=True)}
    manifest = {
        "base": {"id": "golden", "digest": "sha256:0"},
        "views": 3,
        "fusion": "channel",
        "lora": {"rank": 2, "alpha": 2.0},
        "unfreeze_modulation_and_norms": False,
        "groups": groups,
        "data": {"fingerprint": "d"},
        "items_per_step": 4,
        "config": Config().to_dict(),
    }
    moments = {f"exp_avg/{name}": tensor for name, tensor in tensors.items()}
    return save_checkpoint(tmp_path, 4, tensors, manifest, moments, {"updates": {"a": 4, "b": 4}}, ema=tensors)


def read_whole(folder: Path) -> None:
    """Every reader of a checkpoint folder."""
    load_trained(find_checkpoint(folder))
    load_trained(folder, ema=True)
    read_optimizer(folder)


def test_one_changed_byte_in_any_file_of_a_checkpoint_is_an_error(checkpoint: Path) -> None:
    paths = sorted(checkpoint.iterdir())
    contents = [path.read_bytes() for path in paths]
    read_whole(checkpoint)

    def check(case: tuple[int, bytes]) -> None:
        which, content = case
        if content.strip() == contents[which].strip():
            return
        paths[which].write_bytes(content)
        said = refusal(lambda: read_whole(checkpoint))
        paths[which].write_bytes(contents[which])
        assert said is not None, paths[which].name
        assert checkpoint.name in said

    check_cases("checkpoint files", checkpoint, damaged(contents), check)


def commit(folder: Path, manifest: Any) -> None:
    """Writes the manifest under a commit mark of its own."""
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "COMMITTED").write_text(sha256_file(folder / "manifest.json"))


def test_a_manifest_that_is_committed_but_wrong(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    now = manifest | {"step": 0}

    def use(found: dict[str, Any]) -> None:
        check_identity(found, checkpoint, base="sha256:0", views=3, fusion="channel", rank=2, alpha=2.0)
        cli_checkpoint._manifest_table(found, 2)
        config_from_dict(found["config"], "checkpoint config")
        check_resume(found, now, checkpoint)

    def check(changed_manifest: Any) -> None:
        commit(checkpoint, changed_manifest)
        refusal(lambda: read_whole(checkpoint))
        refusal(lambda: use(load_trained(checkpoint).manifest))

    config = {"config": manifest["config"]}
    rest = changed({name: value for name, value in manifest.items() if name != "config"}).map(lambda tree: config | tree)
    check_cases("manifest", checkpoint, st.one_of(rest, rest, rest, changed(manifest)), check)
    for odd in ([], None, 3, "text", {}, [manifest]):
        commit(checkpoint, odd)
        assert refusal(lambda: read_whole(checkpoint)) is not None


def test_a_state_that_is_vouched_for_but_wrong(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)

    def check(state: Any) -> None:
        (checkpoint / "state.json").write_text(json.dumps(state))
        manifest["files"]["state.json"] = sha256_file(checkpoint / "state.json")
        commit(checkpoint, manifest)
        said = refusal(lambda: read_optimizer(checkpoint))
        assert said is not None or (state["step"] == 4 and all(type(n) in (int, bool) and n >= 0 for n in state["updates"].values()))

    states = changed({"step": 4, "updates": {"a": 4, "b": 4}})
    check_cases("state", checkpoint, st.one_of(states, states, ODD), check)


def test_files_that_are_folders_and_names_that_cannot_be(checkpoint: Path) -> None:
    for name in ("COMMITTED", "manifest.json", "trained.safetensors", "state.json"):
        kept = (checkpoint / name).read_bytes()
        (checkpoint / name).unlink()
        (checkpoint / name).mkdir()
        assert refusal(lambda: read_whole(checkpoint)) is not None
        (checkpoint / name).rmdir()
        (checkpoint / name).write_bytes(kept)
    for name in ("x" * 5000, "a\0b", "a\nb", "\udcff", ""):
        for read in (load_trained, load_transformer, read_episodes, read_json, read_yaml, read_pickle, TensorFile):
            said = refusal(lambda read=read, name=name: read(checkpoint / "nowhere" / name))  # type: ignore[operator]
            assert said is not None


# ── one tensor at a time ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def golden() -> tuple[Any, LoadReport]:
    """The model of the golden files with the switch on, and what trains in it."""
    return load_model(GOLDEN / "base.safetensors", GOLDEN / "trained_unfrozen.safetensors", unfreeze_modulation_and_norms=True)


def one_tensor_changes(tensors: dict[str, torch.Tensor], other_types: tuple[torch.dtype, ...]) -> list[tuple[str, dict[str, torch.Tensor]]]:
    """(name of the tensor, all tensors with it changed): for each tensor removed, renamed, doubled, transposed, of other types, NaN."""
    changes = []
    for name, tensor in tensors.items():
        without = {key: value for key, value in tensors.items() if key != name}
        changes += [(name, without), (name, without | {f"{name}x": tensor}), (name, tensors | {f"{name}x": tensor.clone()})]
        changes += [(name, tensors | {name: tensor.to(dtype)}) for dtype in other_types]
        if len(changes) % 5 == 0:  # which tensor it is makes no difference to this check
            changes.append((name, tensors | {name: tensor * float("nan")}))
        if tensor.ndim > 1 and tensor.shape[0] != tensor.shape[1]:  # a square one turned is seen by its digest alone
            changes.append((name, tensors | {name: tensor.transpose(0, 1).contiguous()}))
    return changes


def test_one_changed_tensor_of_a_checkpoint_is_named(golden: tuple[Any, LoadReport], tmp_path: Path) -> None:
    model, report = golden
    rows = report.table.trainable_rows
    parameters = dict(model.named_parameters())
    tensors = {name: parameters[name].detach() for name in report.table.trainable_names}
    manifest = {"base": {"id": "golden", "digest": "0"}, "views": 3, "fusion": "channel", "lora": {"rank": 4, "alpha": 4.0}}
    manifest |= {"unfreeze_modulation_and_norms": True, "config": {}}
    manifest["groups"] = {row.name: {"mode": row.mode, "names": list(row.names)} for row in rows}
    folder = save_checkpoint(tmp_path, 4, tensors, manifest, {}, {})
    manifest = read_manifest(folder)
    other_types = (torch.float64, torch.bfloat16)
    for name, given_tensors in one_tensor_changes(tensors, other_types):
        save_file(given_tensors, folder / TRAINED)
        entry = {"mode": "full", "parameters": 1, "tensors": 1, "dtype": "float32", "digest": digest(given_tensors)}
        commit(folder, manifest | {"groups": {"all": entry | {"names": list(given_tensors)}}})
        said = refusal(lambda: load_into(model, load_trained(folder).tensors, report.table, "infer", folder))
        assert said is not None, name
        assert name in said


def test_one_changed_tensor_of_an_older_file_is_named(golden: tuple[Any, LoadReport], tmp_path: Path) -> None:
    model, report = golden
    stored = load_file(GOLDEN / "trained_unfrozen.safetensors")
    ours, path = to_ours(stored), tmp_path / "older.safetensors"
    for name, given_tensors in one_tensor_changes(stored, (torch.float64, torch.int32)):
        save_file(given_tensors, path)
        said = refusal(lambda: load_into(model, load_trained(path).tensors, report.table, "infer", path))
        assert said is not None, name
        assert name in said or ours[name] in said, said


def test_types_that_float32_holds_exactly_are_read_from_older_files(golden: tuple[Any, LoadReport], tmp_path: Path) -> None:
    model, report = golden
    for dtype in (torch.bfloat16, torch.float16):
        stored = {name: tensor.to(dtype) for name, tensor in load_file(GOLDEN / "trained_unfrozen.safetensors").items()}
        save_file(stored, tmp_path / "older.safetensors")
        tensors = load_trained(tmp_path / "older.safetensors").tensors
        load_into(model, tensors, report.table, "infer", "older")
        parameters = dict(model.named_parameters())
        assert all(torch.equal(parameters[name], tensor.float()) for name, tensor in tensors.items())


# ── JSON, YAML, pickles ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_odd_json(tmp_path: Path) -> None:
    path = tmp_path / "given.json"
    path.write_bytes(b"")
    whole = b'{"kind": "train", "step": 1, "bands": {"low": [0.5, null, "\\u00e4"]}}\n'
    hostile = [b'{"a": 1, "a": 2}', b'{"a": NaN}', b"[-Infinity]", b"1" * 5000, b"[" * 100_000, b'{"a":' * 3000, b"[" * 500 + b"]" * 500]
    hostile += [b'{"a": 1e99999}', b'"\\ud800"', b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0", b"{}{}", b"'a'", b"{a: 1}", b"", b"\0", b"nul"]

    def check(content: bytes) -> None:
        path.write_bytes(content + b"\n")
        for reader in (read_json, read_json_lines):
            said = refusal(lambda reader=reader: reader(path))
            assert said is None or "given.json" in said

    check_cases("json", tmp_path, st.one_of(damaged([whole]).map(lambda case: case[1]), st.sampled_from(hostile)), check)
    for content in hostile[:7]:
        path.write_bytes(content + b"\n")
        assert refusal(lambda: read_json(path)) is not None
        assert refusal(lambda: read_json_lines(path)) is not None


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60)) + "train: {steps: *a59}\n"
HOSTILE_YAML = [
    LAUGHS,
    "seed: !!python/object/apply:os.system ['touch mark']",
    "seed: !!python/name:os.system",
    "train: &t {steps: 1}\ndata: *t",
    "a: &a [*a]",
    "seed: 1\nseed: 2",
    "seed: !!int ''",
    "seed: !!timestamp x",
    "seed: !!bool x",
    "seed: !!binary '*'",
    "seed: 2020-99-99",
    "seed: 0b",
    "seed: " + "9" * 5000,
    "seed: " + ":".join("1" * 20000),
    "{" * 5000,
    "- " * 5000,
    "? [a]\n: b",
    "? {a: b}\n: c",
    "1: 2",
    "null: 1",
    "~",
    "'",
    "\t",
    "%YAML 9.9\n---\n",
    "--- 1\n--- 2\n",
    "train: {learning_rate: .nan}",
    "train: {learning_rate: .inf}",
    "flow: {shift: .inf}",
    "data: {rotation_deg: [.nan, 1, 1]}",
    "trainable: {groups: {projector: {weight_decay: .nan}}}",
    "x" * 200_000,
]


def test_odd_settings_files(tmp_path: Path) -> None:
    path = tmp_path / "given.yaml"
    path.write_bytes(b"")
    tree = Config().to_dict()

    def check(text: str) -> None:
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        said = refusal(lambda: config_from_dict(read_yaml(path), str(path)).to_dict())
        assert said is None or "given.yaml" in said

    trees = changed(tree).map(lambda values: yaml.safe_dump(values, allow_unicode=True))
    check_cases("yaml", tmp_path, st.one_of(trees, trees, st.sampled_from(HOSTILE_YAML)), check)
    accepted = ("~", "\t", "%YAML 9.9\n---\n")
    for text in HOSTILE_YAML:
        check(text)
        if text not in accepted:
            assert refusal(lambda: config_from_dict(read_yaml(path), str(path))) is not None, text[:50]


def test_damaged_settings_files(tmp_path: Path) -> None:
    path = tmp_path / "given.yaml"
    path.write_bytes(b"")

    def check(case: tuple[int, bytes]) -> None:
        path.write_bytes(case[1])
        refusal(lambda: config_from_dict(read_yaml(path), str(path)).to_dict())

    check_cases("yaml bytes", tmp_path, damaged([dump_yaml(Config()).encode()]), check)


def test_odd_settings_of_the_command_line(tmp_path: Path) -> None:
    names = st.sampled_from(["train.steps", "data.cameras", "data.root", "base.source", "train", "a..b", ".", "train.adam_betas.0", *TEXTS])
    values = st.one_of(ODD.map(str), st.sampled_from(HOSTILE_YAML[1:12]), st.text(max_size=10))

    def check(setting: str) -> None:
        refusal(lambda: config_from_dict(parse_overrides([setting]), "settings").to_dict())

    check_cases("settings", tmp_path, st.builds("{}={}".format, names, values), check)


def test_damaged_pickles(tmp_path: Path) -> None:
    path = tmp_path / "given.pkl"
    path.write_bytes(b"")
    value = {"a": np.arange(6.0).reshape(2, 3), "b": np.float32(1), "c": [1, "x", b"y", {2}, (3, None)], "d": np.array(["x", "yy"])}

    def check(case: tuple[int, bytes]) -> None:
        path.write_bytes(case[1])
        said = refusal(lambda: read_pickle(path))
        assert said is None or "given.pkl" in said

    check_cases("pickle bytes", tmp_path, damaged([pickle.dumps(value, protocol) for protocol in range(6)]), check)


_LAUGHING = b"K\1\x85\x94" + b"".join(b"h%ch%c\x86\x94" % (n, n) for n in range(60))  # each tuple holds the one before twice
HOSTILE_PICKLES = {
    "os.system": b"cos\nsystem\n(S'touch mark'\ntR.",
    "posix.system": b"cposix\nsystem\n(S'touch mark'\ntR.",
    "eval": b'cbuiltins\neval\n(S\'open("mark", "w")\'\ntR.',
    "getattr": b"c__builtin__\ngetattr\n(cos\nsystem\nS'x'\ntR.",
    "instance": b"(S'touch mark'\nios\nsystem\n.",
    "numpy that compiles": b"cnumpy.f2py\ncompile\n(S'x'\ntR.",
    "numpy that loads": b"cnumpy\nload\n(S'x'\ntR.",
    "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.tofile\x93.",
    "huge bytearray": b"cbuiltins\nbytearray\n(L99999999999L\ntR.",
    "huge bytearray of protocol 5": b"\x80\x05\x96" + (2**38).to_bytes(8, "little") + b"x.",
    "huge bytes": b"\x80\x04\x8e" + (2**38).to_bytes(8, "little") + b"x.",
    "huge whole number": b"\x80\x02\x8b\xff\xff\xff\x7f1.",
    "huge ndarray": b"cnumpy\nndarray\n((L99999999999L\nttR.",
    "huge array to fill": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(L99999999999L\ntS'b'\ntR.",
    "huge type": b"cnumpy\ndtype\n(S'V99999999999'\ntR.",
    "bytes for pointers to objects": pickle.dumps(np.array([None, None], object), 2)
    .replace(b"K?t", b"K\0t")  # the flags that say it holds objects
    .replace(b"]q\x11(NNe", b"c_codecs\nencode\nX\x10\0\0\0AAAAAAAABBBBBBBBX\x06\0\0\0latin1\x86R"),
    "type of objects": b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O8'\ntRS'12345678'\ntR.",
    "a tuple that takes for ever to hash": b"\x80\x04}" + _LAUGHING + b"Ns.",
    "copies of copies": b"\x80\x04B\x10\x27\0\0" + b"x" * 10000 + b"\x94" + b"cbuiltins\nbytearray\n\x94" + b"h\1h\0\x85R" * 5000 + b".",
}


def test_a_huge_place_in_the_memory_of_the_reader_takes_none(tmp_path: Path) -> None:
    """pickle's C implementation would set aside 32 GB for these ten bytes."""
    (tmp_path / "given.pkl").write_bytes(b"\x80\x02Nr\xff\xff\xff\x7f.")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_pickle(tmp_path / "given.pkl") is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


@pytest.mark.parametrize("name", HOSTILE_PICKLES)
def test_hostile_pickles_are_refused_at_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "given.pkl").write_bytes(HOSTILE_PICKLES[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = refusal(lambda: read_pickle(tmp_path / "given.pkl"))
    assert said is not None
    assert "given.pkl" in said
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "it took more than 200 MB"
    assert files_under(tmp_path) == [str(tmp_path / "given.pkl")]


# ── datasets ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def dataset(tiny_demonstrations: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_demonstrations, tmp_path / "ball"))


def read_whole_dataset(root: Path) -> None:
    """Every episode and some of its pictures."""
    for episode in read_episodes(root):
        episode.read_rgb([0, episode.num_frames - 1])


def test_odd_descriptions_of_a_dataset(dataset: Path) -> None:
    paths = [dataset / "meta/info.json", dataset / "meta/cameras.json"]
    trees = [json.loads(path.read_text()) for path in paths]
    # What the reader looks at, ten times as often as the descriptions of columns that it does not read.
    read = {key: trees[0][key] for key in ("codebase_version", "fps", "data_path", "video_path")}
    keys = ("observation.state", "episode_index", "observation.images.left")
    read |= {"features": {key: trees[0]["features"][key] for key in keys}}

    def laid_over(tree: dict[str, Any]) -> dict[str, Any]:
        features = tree.get("features")
        both = trees[0]["features"] | features if isinstance(features, dict) else features
        rest = {key: value for key, value in trees[0].items() if key not in read}
        return rest | tree | {"features": both}

    cases = st.one_of(
        *(changed(read).map(lambda tree: (0, laid_over(tree))) for _ in range(3)),
        changed(trees[1]).map(lambda tree: (1, tree)),
        ODD.map(lambda tree: (0, tree)),
    )

    def check(case: tuple[int, Any]) -> None:
        which, tree = case
        paths[which].write_text(json.dumps(tree))
        refusal(lambda: read_whole_dataset(dataset))
        paths[which].write_text(json.dumps(trees[which]))

    check_cases("info and cameras", dataset, cases, check)


@pytest.mark.parametrize("key", ["data_path", "video_path"])
@pytest.mark.parametrize(
    "template",
    [
        *(
            "../../etc/passwd",
            "/etc/passwd",
            "videos/../../x.mp4",
            "{chunk_index.__class__}",
            "{0}",
            "{file_index:9999999999d}",
            "{",
            "a\0b",
        ),
        *("{chunk_index!r}", "data/{secret}.parquet", "..\\..\\x", "file:{chunk_index}", "x" * 300, "a\nb"),
    ],
)
def test_no_path_leaves_the_dataset(dataset: Path, key: str, template: str) -> None:
    info = json.loads((dataset / "meta/info.json").read_text())
    (dataset / "meta/info.json").write_text(json.dumps(info | {key: template}))
    said = refusal(lambda: read_episodes(dataset))
    assert said is not None
    assert "info.json" in said


def test_no_camera_s_name_leaves_the_dataset(dataset: Path) -> None:
    for path in (dataset / "meta/info.json", dataset / "meta/cameras.json"):
        path.write_text(path.read_text().replace("left", "x/../../../../left"))
    table = dataset / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(table)
    pq.write_table(rows.rename_columns([name.replace("left", "x/../../../../left") for name in rows.column_names]), table)
    said = refusal(lambda: read_episodes(dataset))
    assert said is not None
    assert "no path inside the dataset" in said


def test_damaged_tables(dataset: Path) -> None:
    paths = [dataset / "meta/episodes/chunk-000/file-000.parquet", dataset / "data/chunk-000/file-000.parquet"]
    contents = [path.read_bytes() for path in paths]

    def check(case: tuple[int, bytes]) -> None:
        which, content = case
        paths[which].write_bytes(content)
        refusal(lambda: read_episodes(dataset))
        paths[which].write_bytes(contents[which])

    check_cases("parquet bytes", dataset, damaged(contents), check)


def test_odd_columns(dataset: Path) -> None:
    paths = [dataset / "meta/episodes/chunk-000/file-000.parquet", dataset / "data/chunk-000/file-000.parquet"]
    tables = [pq.read_table(path) for path in paths]
    tables[0] = tables[0].select([name for name in tables[0].column_names if not name.startswith("stats/")])
    names = [(which, name) for which, table in enumerate(tables) for name in table.column_names]
    read_only = [pair for pair in names if not pair[1].startswith(("camera.", "timestamp", "index", "meta/", "dataset_"))]
    odd = [None, -1, 2**62, 0.5, float("nan"), float("inf"), "x", "../x", b"\xff", True, [], [None], [1.5, 2.5], ["a\nb"], {"a": 1}]
    cases = st.tuples(st.sampled_from(read_only), st.one_of(st.sampled_from(odd), st.just("no column"), st.just("two columns")))

    def check(case: tuple[tuple[int, str], Any]) -> None:
        (which, name), value = case
        table = tables[which]
        column = table.column_names.index(name)
        if value == "no column":
            changed_table = table.remove_column(column)
        elif value == "two columns":
            changed_table = table.append_column(name, table.column(column))
        else:
            changed_table = table.set_column(column, name, pa.array([value] * len(table)))
        pq.write_table(changed_table, paths[which])
        refusal(lambda: read_whole_dataset(dataset))
        pq.write_table(table, paths[which])

    check_cases("parquet columns", dataset, cases, check)


def test_a_small_table_that_claims_millions_of_rows(dataset: Path) -> None:
    path = dataset / "data/chunk-000/file-000.parquet"
    pq.write_table(pa.table({"index": pa.array(np.zeros(3_000_000, np.int64))}), path)
    said = refusal(lambda: read_episodes(dataset))
    assert said is not None
    assert "claims 3000000 rows" in said


def test_damaged_videos(dataset: Path) -> None:
    path = dataset / "videos/observation.images.left/chunk-000/file-000.mp4"
    content = path.read_bytes()

    def check(case: tuple[int, bytes]) -> None:
        path.write_bytes(case[1])
        said = refusal(lambda: read_whole_dataset(dataset))
        assert said is None or "observation.images.left" in said

    check_cases("video", dataset, damaged([content, content[-3000:], content[:600]]), check)


@pytest.mark.parametrize("text", ["#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "ffconcat version 1.0\nfile '/etc/passwd'\n", "", "RIFF"])
def test_a_play_list_is_no_video(dataset: Path, text: str) -> None:
    (dataset / "videos/observation.images.left/chunk-000/file-000.mp4").write_text(text)
    said = refusal(lambda: read_episodes(dataset))
    assert said is not None
    assert "cannot be decoded" in said


def test_pictures_of_another_size_are_no_pictures_of_the_dataset(dataset: Path) -> None:
    info, cameras = (json.loads((dataset / "meta" / name).read_text()) for name in ("info.json", "cameras.json"))
    for camera in cameras["cameras"]:
        camera |= {"width_px": 96, "height_px": 96}
        info["features"][f"observation.images.{camera['name']}"]["shape"] = [96, 96, 3]
    (dataset / "meta/info.json").write_text(json.dumps(info))
    (dataset / "meta/cameras.json").write_text(json.dumps(cameras))
    said = refusal(lambda: read_whole_dataset(dataset))
    assert said is not None
    assert "pictures of 64 x 64 px, the dataset says 96 x 96" in said


# ── latents and bases ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_damaged_cache_entries(tmp_path: Path) -> None:
    path = tmp_path / "entry.safetensors"
    whole = {"rgb": torch.ones(1, 2, 1, 2, 2), "heat": torch.zeros(1, 2, 1, 2, 2), "heat_valid": torch.ones(1, 1, dtype=torch.bool)}
    write_entry(path, whole)
    content = path.read_bytes()
    read_entry(path, WINDOW)
    header = 8 + int.from_bytes(content[:8], "little")

    def check(case: tuple[int, bytes]) -> None:
        path.write_bytes(case[1])
        said = refusal(lambda: read_entry(path, WINDOW))
        assert said is None or "entry.safetensors" in said
        assert said is not None or case[1][header:] == content[header:], "a changed tensor was taken for a whole one"

    check_cases("cache entry", tmp_path, damaged([content]), check)
    for tensors in ({}, {"rgb": torch.ones(2)}, {"rgb": torch.ones(1), "heat": torch.ones(1), "heat_valid": torch.ones(1)}):
        write_entry(path, tensors)
        assert refusal(lambda: read_entry(path, WINDOW)) is not None


def test_damaged_shards(tmp_path: Path) -> None:
    """Whatever happens to a shard's bytes, an entry is what was written, is refused, or is not there."""
    entries = {
        bytes([number] * 32): {
            "rgb": torch.full((1, 2, 1, 2, 2), float(number)),
            "heat": torch.zeros(1, 2, 1, 2, 2),
            "heat_valid": torch.ones(1, 1, dtype=torch.bool),
        }
        for number in range(3)
    }
    with ShardWriter(tmp_path) as writer:
        for key, tensors in entries.items():
            writer.add(key, tensors)
    (path,) = (tmp_path / "shards").glob("*.safetensors")
    note = path.with_suffix(".checked")  # comes and goes with what is found
    note.unlink()
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    in_data = st.integers(header, len(whole) - 1).map(lambda at: (0, whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]))

    def check(case: tuple[int, bytes]) -> None:
        path.write_bytes(case[1])
        shards = Shards(tmp_path, WINDOW)
        places = shards.find(np.frombuffer(b"".join(entries), np.uint8).reshape(3, 32))
        bad = shards.damaged(places[places >= 0])
        for place, tensors in zip(places.tolist(), entries.values(), strict=True):
            if place < 0:
                continue
            said = refusal(lambda place=place: shards.read(place))
            assert (said is not None) == (place in bad)
            assert said is not None or digest(shards.read(place)) == digest(tensors), "a changed tensor was taken for a whole one"
        note.unlink(missing_ok=True)

    check_cases("cache entry", tmp_path, damaged([whole]) | in_data, check)


def test_odd_configs_of_a_base(tmp_path: Path) -> None:
    stock = make_stock()
    config = {"_class_name": "WanTransformer3DModel", **{name: value for name, value in stock.config.items() if not name.startswith("_")}}
    config["patch_size"] = list(config["patch_size"])
    save_file(stock.state_dict(), tmp_path / "model.safetensors")
    native = {"dim": 48, "num_heads": 2, "ffn_dim": 96, "num_layers": 2, "in_dim": 48, "out_dim": 48, "freq_dim": 32, "text_dim": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    load_transformer(tmp_path)

    def check(tree: Any) -> None:
        (tmp_path / "config.json").write_text(json.dumps(tree))
        refusal(lambda: load_transformer(tmp_path))
        refusal(lambda: load_transformer(tmp_path, device="meta"))

    check_cases("base config", tmp_path, st.one_of(changed(config), changed(config), changed(native), ODD), check)


def test_damaged_weights_of_a_base(tmp_path: Path) -> None:
    stock = make_stock()
    config = {"_class_name": "WanTransformer3DModel", **{name: value for name, value in stock.config.items() if not name.startswith("_")}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    state, name = stock.state_dict(), "blocks.0.attn1.to_q.weight"
    for given_state in (
        {key: value for key, value in state.items() if key != name},
        state | {f"{name}x": state[name].clone()},
        state | {name: state[name].to(torch.int64)},
        state | {name: state[name][:, :7].contiguous()},
    ):
        save_file(given_state, tmp_path / "model.safetensors")
        said = refusal(lambda: load_transformer(tmp_path))
        assert said is not None
        assert name in said
    save_file(state, tmp_path / "model.safetensors")
    save_file({name: state[name]}, tmp_path / "more.safetensors")
    said = refusal(lambda: load_transformer(tmp_path))
    assert said is not None
    assert "both in model.safetensors and in more.safetensors" in said
    for index in ("[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 5}}', '{"weight_map": {"a": "../../model.safetensors.."}}', "{"):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        assert refusal(lambda: load_transformer(tmp_path)) is not None


# ── the command line ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def bad_place(tiny_demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one bad file of each kind."""
    place = tmp_path_factory.mktemp("bad")
    (place / "laughs.yaml").write_text(LAUGHS)
    (place / "tag.yaml").write_text(HOSTILE_YAML[1])
    (place / "nan.yaml").write_text("train: {learning_rate: .nan}")
    (place / "binary.yaml").write_bytes(b"\xff\xfe\0")
    (place / "huge.safetensors").write_bytes(with_header(b"{}", 2**63))
    control = json.dumps({"a\n\x1b[31m": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}).encode()
    (place / "control.safetensors").write_bytes(with_header(control))
    shutil.copytree(tiny_demonstrations, place / "leaving")
    info = json.loads((place / "leaving/meta/info.json").read_text())
    (place / "leaving/meta/info.json").write_text(json.dumps(info | {"video_path": "../../{video_key}.mp4"}))
    (place / "base").mkdir()
    (place / "base/config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel", "num_layers": 10**9}))
    save_file({"a": torch.ones(1)}, place / "base/model.safetensors")
    return place


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--output", "run", "--config", "laughs.yaml"], "aliases"),
        (["train", "--output", "run", "--config", "tag.yaml"], "not a YAML file of settings"),
        (["train", "--output", "run", "--config", "nan.yaml"], "train.learning_rate=nan"),
        (["train", "--output", "run", "--config", "binary.yaml"], "not UTF-8"),
        (["train", "--output", "run", "--set", "train.steps=" + "9" * 5000], "train.steps="),
        (["cache", "--output", "latents", "--set", "data.root='\\n'"], "no such folder"),
        (["cache", "--output", "latents", "--set", "data.root=leaving"], "no path inside the dataset"),
        (["checkpoint", "inspect", "huge.safetensors"], "not a readable safetensors file"),
        (["checkpoint", "inspect", "control.safetensors"], r"a\n\x1b[31m"),
        (["checkpoint", "inspect", "x" * 5000], "no such file"),
        (["params", "--base", "base"], "num_layers='1000000000'"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_bad_input_of_the_command_line(bad_place: Path, arguments: list[str], words: str) -> None:
    before = files_under(bad_place)
    done = subprocess.run(
        [sys.executable, "-m", "mvwan", *arguments], cwd=bad_place, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith("\n")
    assert done.stderr[:-1].isprintable(), done.stderr
    assert words in done.stderr
    assert files_under(bad_place) == before
