"""Entries of tensors in shard files: found by key, read one at a time, added, and written again where they are damaged.

    <folder>/shards/abcdef….safetensors    keys and digests [N 32] uint8, and each tensor of the N entries stacked to [N ...]
    <folder>/shards/abcdef….checked        size and time of that file when all its digests were found true

A shard has few entries and bytes, appears whole, and is named after its keys. No entry ever leaves it or changes its row, so that
other processes may read on while one is written again. In memory an entry is its key and its place. Reading one touches its bytes
alone and compares their digest, each time: it takes a fraction of what a step takes, and disks and other writers do not stand still.
Whole shards are compared only after they changed, or after an entry in them was found damaged. Knows no window and no codec.
"""

import time
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from mvwan.errors import MvwanError
from mvwan.files import read_text, whole_file
from mvwan.tensors import TensorFile, digest, read_row, write_tensors

SHARD_ENTRIES = 256
SHARD_BYTES = 128 * 2**20
SHARD_SECONDS = 60
"""A shard is written when it has so many entries or bytes, or when its first entry is so old: a kill costs no more than that."""
KEY_BYTES = 32
AGAIN = "Start the run again: it encodes the entry anew."
_KEYS, _DIGESTS = "keys", "digests"

Kinds = Mapping[str, tuple[str, int]]
"""Name -> type and number of axes of each tensor of an entry."""


class Shards:
    """The entries that lay in `folder` when this was made; a place is the number of an entry among them."""

    def __init__(self, folder: Path, kinds: Kinds) -> None:
        self.unreadable: dict[Path, str] = {}
        """Damaged shard -> why nothing in it can be read."""
        self._paths: list[Path] = []
        keys = [np.zeros((0, KEY_BYTES), np.uint8)]
        for path in sorted((folder / "shards").glob("[!.]*.safetensors")):
            try:
                found = _keys_of(path, kinds)
            except MvwanError as error:
                self.unreadable[path] = str(error)
                continue
            if found is not None:
                keys.append(found)
                self._paths.append(path)
        self._ends = np.cumsum([len(part) for part in keys])[1:]
        flat = _as_values(np.concatenate(keys))
        self._order = np.argsort(flat)
        self._sorted = flat[self._order]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """[N] int64 places of the entries with keys [N 32] uint8, -1 where there is none."""
        if not len(self._sorted):
            return np.full(len(keys), -1)
        wanted = _as_values(keys)
        found = np.minimum(np.searchsorted(self._sorted, wanted), len(self._sorted) - 1)
        return np.where(self._sorted[found] == wanted, self._order[found], -1)

    def forget_keys(self) -> None:
        """Nothing; `find` finds nothing any more, and the memory of the keys is free."""
        self._order, self._sorted = self._order[:0], self._sorted[:0]

    def read(self, place: int) -> dict[str, torch.Tensor]:
        """The entry at `place`. `MvwanError` when it is damaged."""
        path, row = self._at(place)
        try:
            return _read(path, row)
        except MvwanError:
            with suppress(OSError):
                _note_of(path).unlink()  # whoever starts next compares the whole shard
            raise

    def damaged(self, places: np.ndarray) -> set[int]:
        """Those of `places` whose entry cannot be read. Reads shards that changed since they were last compared, and no others."""
        found: set[int] = set()
        for shard in np.unique(np.searchsorted(self._ends, places, side="right")).tolist():
            path, end = self._paths[shard], int(self._ends[shard])
            if _is_checked(path):
                continue
            start = int(self._ends[shard - 1]) if shard else 0
            bad = {place for place in range(start, end) if not _is_whole(path, place - start)}
            found |= bad
            if not bad:
                _note_checked(path)
        return found & set(places.tolist()) if found else found

    def replace(self, place: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Nothing; the entry at `place` now holds `tensors`, of the same shapes. The others are what they were."""
        path, row = self._at(place)
        stacked = dict(TensorFile(path))
        for name, tensor in {**tensors, _DIGESTS: _digest_row(tensors)}.items():
            stacked[name][row] = tensor
        with whole_file(path) as partial:
            write_tensors(partial, stacked)

    def remove_unreadable(self) -> None:
        """Nothing; shards of which nothing can be read are gone."""
        for path in self.unreadable:
            path.unlink(missing_ok=True)

    def _at(self, place: int) -> tuple[Path, int]:
        shard = int(np.searchsorted(self._ends, place, side="right"))
        return self._paths[shard], place - (int(self._ends[shard - 1]) if shard else 0)


class ShardWriter:
    """Adds entries; a context manager. What is not yet in a shard is written at the end of the block, also when that raises."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "shards"
        self._pending: dict[bytes, dict[str, torch.Tensor]] = {}
        self._bytes, self._since = 0, 0.0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._write()

    def add(self, key: bytes, tensors: Mapping[str, torch.Tensor]) -> None:
        """Nothing; the entry is in a shard once that is full or the block ends. `MvwanError` when the disk does not take it."""
        if not self._pending:
            self._since = time.monotonic()
        self._pending[key] = dict(tensors)
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())
        old = time.monotonic() - self._since >= SHARD_SECONDS
        if old or len(self._pending) >= SHARD_ENTRIES or self._bytes >= SHARD_BYTES:
            self._write()

    def _write(self) -> None:
        entries, self._pending, self._bytes = self._pending, {}, 0
        if not entries:
            return
        stacked = {name: torch.stack([entry[name] for entry in entries.values()]) for name in next(iter(entries.values()))}
        stacked[_KEYS] = torch.tensor(np.frombuffer(b"".join(entries), np.uint8).reshape(len(entries), KEY_BYTES))
        stacked[_DIGESTS] = torch.stack([_digest_row(entry) for entry in entries.values()])
        path = self._folder / f"{sha256(b''.join(entries)).hexdigest()}.safetensors"
        with whole_file(path) as partial:
            write_tensors(partial, stacked)
        _note_checked(path)


def _keys_of(path: Path, kinds: Kinds) -> np.ndarray | None:
    """[N 32] uint8, None for a file that holds other entries than such. `MvwanError` when it is damaged."""
    file = TensorFile(path)
    held = {name: (file.dtypes[name], len(shape) - 1) for name, shape in file.shapes.items()}
    needed = {**kinds, _KEYS: ("uint8", 1), _DIGESTS: ("uint8", 1)}
    rows = {shape[:1] for shape in file.shapes.values()}
    if held != needed or len(rows) != 1 or {file.shapes[name][1] for name in (_KEYS, _DIGESTS)} != {KEY_BYTES}:
        return None
    return file[_KEYS].numpy().copy()


def _as_values(keys: np.ndarray) -> np.ndarray:
    """[N] of keys [N 32], each one value that can be sorted."""
    return np.ascontiguousarray(keys).view(f"V{KEY_BYTES}")[:, 0]


def _read(path: Path, row: int) -> dict[str, torch.Tensor]:
    try:
        tensors = read_row(path, row)
    except MvwanError as error:
        raise MvwanError(f"latent cache entry {error}. {AGAIN}") from None
    tensors.pop(_KEYS, None)
    written = tensors.pop(_DIGESTS, None)
    if written is None or not torch.equal(written, _digest_row(tensors)):
        raise MvwanError(f"latent cache entry {row} of {path}: damaged, its bits are not those that were written. {AGAIN}")
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _is_whole(path: Path, row: int) -> bool:
    try:
        _read(path, row)
    except MvwanError:
        return False
    return True


def _digest_row(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[32] uint8."""
    return torch.tensor(list(bytes.fromhex(digest(tensors).removeprefix("sha256:"))), dtype=torch.uint8)


def _note_of(path: Path) -> Path:
    return path.with_suffix(".checked")


def _stamp(path: Path) -> str:
    found = path.stat()
    return f"{found.st_size} bytes, {found.st_mtime_ns} ns\n"


def _note_checked(path: Path) -> None:
    with suppress(OSError):  # without a note, or with half of one, the shard is compared again next time
        _note_of(path).write_text(_stamp(path), encoding="utf-8")


def _is_checked(path: Path) -> bool:
    try:
        return read_text(_note_of(path)) == _stamp(path)
    except (MvwanError, OSError):
        return False
