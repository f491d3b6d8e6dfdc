"""A finished stage is not repeated while what it was made from stays the same, and its cost is remembered."""

from pathlib import Path

import pytest
from rich.console import Console

from mvwan.errors import MvwanError
from mvwan.files import read_json, write_json
from mvwan.stages import Stages, prepare_folder


def test_stages_are_keyed_by_settings_and_forerunners(tmp_path: Path) -> None:
    done: list[str] = []

    def play(first: int, second: int, fail: bool = False) -> None:
        stages = Stages(tmp_path, Console(quiet=True))

        def work(name: str, product: Path) -> None:
            product.mkdir(exist_ok=True)
            (product / f"{name}-{len(done)}").touch()
            done.append(name)
            if fail:
                raise KeyboardInterrupt

        stages.run("a", {"value": first}, tmp_path / "a", lambda: work("a", tmp_path / "a"))
        stages.run("b", {"value": second}, tmp_path / "b", lambda: work("b", tmp_path / "b"))

    write_json(tmp_path / "stages.json", {})
    play(1, 1)
    play(1, 1)
    assert done == ["a", "b"]
    play(1, 2)
    assert done == ["a", "b", "b"]
    assert len(list((tmp_path / "b").iterdir())) == 1, "what other settings left is removed"
    play(2, 2)
    assert done[3:] == ["a", "b"], "a stage depends on those before it"
    with pytest.raises(KeyboardInterrupt):
        play(3, 2, fail=True)
    play(3, 2)
    assert done[5:] == ["a", "a", "b"]
    assert len(list((tmp_path / "a").iterdir())) == 2, "an unfinished attempt is gone on with"
    (tmp_path / "b" / "b-7").unlink()
    (tmp_path / "b").rmdir()
    play(3, 2)
    assert done[8:] == ["b"], "a product that is gone is made again"


def test_a_stage_may_stand_on_a_named_one_and_then_others_do_not_matter(tmp_path: Path) -> None:
    done: list[str] = []

    def play(first: int, second: int) -> Stages:
        stages = Stages(tmp_path, Console(quiet=True))
        keys = {}
        for name, value in (("a", first), ("b", second), ("c", 0)):
            after = keys.get({"b": "", "c": "a"}.get(name, ""), stages.start)
            keys[name] = stages.key_of(name, {"value": value}, after)
            is_stale[name] = stages.is_of_others(name, keys[name], tmp_path / name)
            stages.run(
                name, {"value": value}, tmp_path / name, lambda name=name: (done.append(name), (tmp_path / name).touch()), after=after
            )
        return stages

    is_stale: dict[str, bool] = {}
    play(1, 1)
    assert is_stale == {"a": False, "b": False, "c": False}
    play(1, 2)
    assert done == ["a", "b", "c", "b"], "c stands on a alone"
    assert is_stale == {"a": False, "b": True, "c": False}
    play(2, 2)
    assert done[4:] == ["a", "c"]


def test_costs_are_known_again_and_interrupted_attempts_are_counted(tmp_path: Path) -> None:
    def work() -> None:
        if not (tmp_path / "started").exists():
            (tmp_path / "started").touch()
            raise KeyboardInterrupt
        (tmp_path / "product").touch()

    with pytest.raises(KeyboardInterrupt):
        Stages(tmp_path, Console(quiet=True)).run("a", {}, tmp_path / "product", work)
    first, again = Stages(tmp_path, Console(quiet=True)), Stages(tmp_path, Console(quiet=True))
    first.run("a", {}, tmp_path / "product", work)
    assert first.costs["a"]["attempts"] == 2
    assert first.costs["a"]["peak_memory_mb"] > 10
    again = Stages(tmp_path, Console(quiet=True))
    again.run("a", {}, tmp_path / "product", work)
    assert again.costs == first.costs
    assert read_json(tmp_path / "stages.json")["a"]["is_finished"]


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(MvwanError, match="no reproduction of mvwan"):
        prepare_folder(tmp_path, "reproduction", fresh=True, products=("thesis.txt",))
    with pytest.raises(MvwanError, match="a file, not a folder"):
        prepare_folder(tmp_path / "thesis.txt", "reproduction")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
