"""Stages of a long command: what is finished in its folder, from which settings, and at what cost.

Each stage leaves its mark in `stages.json`, beside what the folder is for, with a key of the settings it was made from. A finished
stage is not repeated while its settings and those of the stages it stands on stay the same. Knows nothing of what a stage does.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

import mvwan
from mvwan.errors import MvwanError
from mvwan.files import LOCK, only_worker, read_json, sha256_json, write_json
from mvwan.memory import peak_bytes

MARK = "stages.json"


class Stages:
    """What is finished in a folder, which `own_folder` has prepared."""

    def __init__(self, folder: Path, console: Console) -> None:
        self._path = folder / MARK
        self._console = console
        self._marks: dict[str, Any] = read_json(self._path)
        self._known: dict[str, dict[str, Any]] = self._marks["stages"]
        self._key = self.start = sha256_json(mvwan.__version__)
        self._number = 0
        self._begun: dict[str, dict[str, Any]] = {}
        self._start = time.monotonic()
        self.costs: dict[str, dict[str, Any]] = {}
        """Stage -> `seconds` it took when it was done, now or earlier, the `attempts` it took (`seconds` are the last one's), and the
        `peak_memory_mb` of the command and its processes until then."""

    @property
    def seconds(self) -> dict[str, float]:
        """Stage -> seconds it took when it was done, now or earlier."""
        return {name: cost["seconds"] for name, cost in self.costs.items()}

    @staticmethod
    def key_of(name: str, settings: Mapping[str, Any], after: str) -> str:
        """The key of a stage that stands on the one of key `after`: another one for other settings of any of them."""
        return sha256_json([after, name, dict(settings)])

    def is_of_others(self, name: str, key: str, product: Path) -> bool:
        """Whether a product is there that this stage did not leave: one of other settings, or of which nothing is known."""
        return product.exists() and self._known.get(name, {}).get("key") != key

    def heading(self, title: str) -> None:
        """Nothing; prints the next number and the title."""
        self._number += 1
        self._console.print()
        self._console.rule(f"[bold]{self._number}. {title}", align="left")

    def run(
        self,
        name: str,
        settings: Mapping[str, Any],
        product: Path,
        work: Callable[[], Any],
        keep_stale: bool = False,
        after: str | None = None,
    ) -> None:
        """Does `work`, which makes `product`, unless that is finished already from these settings.

        It stands on the stage of key `after` and on those that one stands on, or on `start` alone; None: on the stage before. What an
        unfinished attempt with the same settings left is kept for `work` to go on with; what other settings left is removed first,
        unless `keep_stale`.
        """
        if self.begin(name, settings, product, keep_stale, after):
            work()
            self.finish(name)

    def begin(self, name: str, settings: Mapping[str, Any], product: Path, keep_stale: bool = False, after: str | None = None) -> bool:
        """Whether the stage is to be done, as `run` decides it; the caller does, and then calls `finish`."""
        self.heading(name)
        key = self._key = self.key_of(name, settings, after or self._key)
        found = self._known.get(name, {})
        is_same = found.get("key") == key
        if is_same and found["is_finished"] and product.exists():
            self.costs[name] = {cost: found[cost] for cost in ("seconds", "attempts", "peak_memory_mb") if cost in found}
            self._console.print(f"[dim]finished earlier, in {found['seconds']:.1f} s: {product}")
            return False
        if not is_same and not keep_stale:
            remove(product)
        attempts = found.get("attempts", 1) + 1 if is_same and not found["is_finished"] else 1
        self._begun[name] = {"key": key, "is_finished": False, "attempts": attempts}
        self._remember(name, self._begun[name])
        self._start = time.monotonic()
        return True

    def finish(self, name: str, cost: Mapping[str, float] | None = None) -> None:
        """Nothing; a stage that was begun is finished. `cost` has its `seconds` and `peak_memory_mb`; None: since the last `begin`."""
        measured = {"seconds": round(time.monotonic() - self._start, 1), "peak_memory_mb": peak_bytes(children=True) // 2**20}
        self.costs[name] = {"attempts": self._begun[name]["attempts"], **(cost or measured)}
        self._remember(name, {**self._begun[name], "is_finished": True, **self.costs[name]})
        self._console.print(f"[dim]{f'{name}: ' if cost else ''}{self.costs[name]['seconds']:.1f} s")

    def _remember(self, name: str, line: dict[str, Any]) -> None:
        self._known[name] = line
        write_json(self._path, self._marks)


@contextmanager
def own_folder(output: Path, what: str, fresh: bool = False, products: Iterable[str] = ()) -> Iterator[None]:
    """While the block lasts the folder is for `what` of this process alone. `fresh` first removes its `products` and the marks.

    Raises `MvwanError` when it holds something that no such command left there, or when another one is at work in it.
    """
    if output.exists() and not output.is_dir():
        raise MvwanError(f"--output {output}: a file, not a folder. Choose another --output.")
    mark, is_used = output / MARK, output.is_dir() and any(path.name != LOCK for path in output.iterdir())
    known = read_json(mark) if mark.is_file() else None
    if is_used and not (isinstance(known, dict) and known.get("of") == what):
        raise MvwanError(f"--output {output}: holds something that is no {what} of mvwan. Choose another --output, or remove it yourself.")
    with only_worker(output, wait=False):
        for name in (*products, MARK) if fresh else ():
            remove(output / name)
        if not mark.is_file():
            write_json(mark, {"of": what, "stages": {}})
        yield


def remove(path: Path) -> None:
    """Nothing; the file or folder is gone, if it was there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
