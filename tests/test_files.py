"""files: whole or not at all, also when the writer fails or is killed; canonical hashes."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from mvwan import files
from mvwan.errors import MvwanError


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_write_file_makes_the_folder_and_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "note.txt"
    files.write_file(path, "first")
    files.write_file(path, "zweite Zeile: ä")
    assert path.read_bytes() == "zweite Zeile: ä".encode()
    assert names_in(path.parent) == ["note.txt"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    files.write_file(path, "old")
    with suppress(RuntimeError), files.whole_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError("stop")
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["note.txt"]


def test_a_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    files.write_file(tmp_path / "ours", "x")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_whole_directory_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with files.whole_directory(target) as partial:
        (partial / "a").write_text("1")
        assert not target.exists()
    assert names_in(target) == ["a"]
    with suppress(RuntimeError), files.whole_directory(tmp_path / "other") as partial:
        (partial / "a").write_text("1")
        raise RuntimeError("stop")
    assert names_in(tmp_path) == ["folder"]
    with pytest.raises(MvwanError, match="exists already"), files.whole_directory(target):
        raise AssertionError("the block must not run")
    assert (target / "a").read_text() == "1"


def test_a_killed_writer_leaves_only_a_leftover_that_can_be_cleared(tmp_path: Path) -> None:
    code = (
        "import sys, time; from mvwan import files\n"
        "with files.whole_directory(sys.argv[1]) as partial:\n"
        "    (partial / 'a').write_text('1'); print('ready', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "folder")], stdout=subprocess.PIPE, env={**os.environ})
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "folder").exists()
    assert len(files.remove_leftovers(tmp_path)) == 1
    assert names_in(tmp_path) == []


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MvwanError, match="cannot be written"):
        files.write_file(tmp_path / "file" / "below", "x")
    assert names_in(tmp_path) == ["file"]


def test_json_round_trip_and_its_errors(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, True], "a": "ü"}
    files.write_json(tmp_path / "v.json", value)
    assert files.read_json(tmp_path / "v.json") == value
    files.write_json(tmp_path / "nan.json", {"loss": float("nan"), "up": float("inf")})
    assert json.loads((tmp_path / "nan.json").read_text()) == {"loss": "nan", "up": "inf"}
    (tmp_path / "bad.json").write_text('{"a": ')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    for name, words in (
        ("none.json", "no such file"),
        ("bad.json", "not a JSON"),
        ("binary.json", "not a text"),
        ("deep.json", "not a JSON"),
    ):
        with pytest.raises(MvwanError, match=words):
            files.read_json(tmp_path / name)


def test_json_lines_without_the_torn_last_one(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert files.read_json_lines(path) == []
    path.write_text(files.json_line({"a": 1}) + files.json_line({"b": float("inf")}) + '{"c": ')
    assert files.read_json_lines(path) == [{"a": 1}, {"b": "inf"}]
    path.write_text("{\n{}\n")
    with pytest.raises(MvwanError, match="not JSON"):
        files.read_json_lines(path)


def test_flatten_joins_the_keys_of_nested_mappings() -> None:
    assert files.flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": None, "f": {}}, ".") == {"a.b.c": 1, "a.d": [2], "e": None}


def test_hashes_depend_on_content_alone(tmp_path: Path) -> None:
    assert files.sha256_json({"a": 1, "b": [1.5]}) == files.sha256_json({"b": [1.5], "a": 1})
    assert files.sha256_json({"a": 1}) != files.sha256_json({"a": 2})
    (tmp_path / "x").write_bytes(b"abc")
    assert files.sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_commit_mark(tmp_path: Path) -> None:
    assert not files.is_committed(tmp_path)
    files.mark_committed(tmp_path, "digest")
    assert files.is_committed(tmp_path)
    assert (tmp_path / files.COMMIT_MARK).read_text() == "digest"
