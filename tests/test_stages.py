"""A finished stage is not repeated while what it was made from stays the same, and its cost is remembered."""

from pathlib import Path

import pytest
from rich.console import Console

from mvwan.errors import MvwanError
from mvwan.files import read_json
from mvwan.stages import Stages, own_folder


def test_stages_are_keyed_by_settings_and_forerunners(tmp_path: Path) -> None:
    done: list[str] = []

    def play(first: int, second: int, fail: bool = False) -> None:
        def work(name: str, product: Path) -> None:
            product.mkdir(exist_ok=True)
            (product / f"{name}-{len(done)}").touch()
            done.append(name)
            if fail:
                raise KeyboardInterrupt

        with own_folder(tmp_path, "reproduction"):
            stages = Stages(tmp_path, Console(quiet=True))
            stages.run("a", {"value": first}, tmp_path / "a", lambda: work("a", tmp_path / "a"))
            stages.run("b", {"value": second}, tmp_path / "b", lambda: work("b", tmp_path / "b"))

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
    with own_folder(tmp_path, "reproduction"):
        pass
    play(1, 1)
    assert is_stale == {"a": False, "b": False, "c": False}
    play(1, 2)
    assert done == ["a", "b", "c", "b"], "c stands on a alone"
    assert is_stale == {"a": False, "b": True, "c": False}
    play(2, 2)
    assert done[4:] == ["a", "c"]


def test_a_product_of_which_nothing_is_known_is_taken_for_that_of_others(tmp_path: Path) -> None:
    with own_folder(tmp_path, "reproduction"):
        stages = Stages(tmp_path, Console(quiet=True))
        (tmp_path / "a").mkdir()
        assert stages.is_of_others("a", stages.key_of("a", {}, stages.start), tmp_path / "a")
        assert not stages.is_of_others("b", stages.key_of("b", {}, stages.start), tmp_path / "b")


def test_costs_are_known_again_and_interrupted_attempts_are_counted(tmp_path: Path) -> None:
    def work() -> None:
        if not (tmp_path / "started").exists():
            (tmp_path / "started").touch()
            raise KeyboardInterrupt
        (tmp_path / "product").touch()

    with own_folder(tmp_path, "reproduction"):
        pass
    with pytest.raises(KeyboardInterrupt):
        Stages(tmp_path, Console(quiet=True)).run("a", {}, tmp_path / "product", work)
    first, again = Stages(tmp_path, Console(quiet=True)), Stages(tmp_path, Console(quiet=True))
    first.run("a", {}, tmp_path / "product", work)
    assert first.costs["a"]["attempts"] == 2
    assert first.costs["a"]["peak_memory_mb"] > 10
    again = Stages(tmp_path, Console(quiet=True))
    again.run("a", {}, tmp_path / "product", work)
    assert again.costs == first.costs
    assert read_json(tmp_path / "stages.json")["stages"]["a"]["is_finished"]


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(MvwanError, match="no reproduction of mvwan"), own_folder(tmp_path, "reproduction", True, ("thesis.txt",)):
        pass
    with pytest.raises(MvwanError, match="a file, not a folder"), own_folder(tmp_path / "thesis.txt", "reproduction"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"] and (tmp_path / "thesis.txt").read_text() == "years of work"
    with own_folder(tmp_path / "tables", "reproduction"):
        for what, said in (("demo", "no demo of mvwan"), ("reproduction", "another command is at work")):
            with pytest.raises(MvwanError, match=said), own_folder(tmp_path / "tables", what, True, ("stages.json",)):
                pass
    assert read_json(tmp_path / "tables" / "stages.json") == {"of": "reproduction", "stages": {}}
