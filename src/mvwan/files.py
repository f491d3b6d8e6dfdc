"""Files that are whole or not there: atomic writes, JSON, hashes, commit marks, one worker at a time.

A write goes to a hidden sibling first and takes its name in one rename, after its bytes are on the disk: a killed process leaves
the old file, or a hidden `.<name>.<random>.partial` that `remove_leftovers` clears. Knows nothing of what is in the files.
"""

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mvwan.errors import MvwanError

COMMIT_MARK = "COMMITTED"
LOCK = ".lock"
"""In a folder where one process works at a time."""
_PARTIAL = ".partial"
_DEEPEST_JSON = 100
_DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
}


def write_file(path: str | Path, data: str | bytes) -> None:
    """Nothing; `path` then holds `data` (text as UTF-8), or what it held before when this raises. Makes the folder."""
    with whole_file(path) as partial:
        partial.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the block ends well and disappears when it raises.

    Raises `MvwanError` when the disk is full or the place cannot be written.
    """
    path = Path(path)
    partial = _partial_name(path)
    try:
        with plain_words(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            _sync(partial)
            os.replace(partial, path)
            _sync(path.parent)
    finally:
        with suppress(OSError):
            partial.unlink()


@contextmanager
def whole_directory(path: str | Path) -> Iterator[Path]:
    """A new folder to fill, which becomes `path` when the block ends well and disappears when it raises.

    Raises `MvwanError` when `path` exists, the disk is full or the place cannot be written.
    """
    path = Path(path)
    if path.exists():
        raise MvwanError(f"{path}: exists already. Remove it or choose another folder.")
    partial = _partial_name(path)
    try:
        with plain_words(path):
            partial.mkdir(parents=True)
            yield partial
            for folder, _, names in os.walk(partial):
                for name in names:
                    _sync(Path(folder) / name)
                _sync(Path(folder))
            os.rename(partial, path)
            _sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def only_worker(folder: Path, *, wait: bool) -> Iterator[None]:
    """While the block lasts nobody else is in such a block for `folder`; with `wait` after whoever is there now, else `MvwanError`.

    Where the file system knows no locks, as on some clusters, everybody is let in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MvwanError(f"{folder}: another command is at work in it. Wait for it, or work in another folder.") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        yield


def remove_leftovers(folder: str | Path) -> list[str]:
    """Names of the partial files and folders that killed writers left in `folder`, now removed. Call it as the only writer there."""
    leftovers = sorted(Path(folder).glob(f".*{_PARTIAL}"))
    for leftover in leftovers:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    return [leftover.name for leftover in leftovers]


def remove_directory(path: str | Path) -> None:
    """Nothing; the folder is gone whole, so that a kill on the way leaves a leftover and never half a folder under its name."""
    path = Path(path)
    going = _partial_name(path)
    os.rename(path, going)
    shutil.rmtree(going)


def _partial_name(path: Path) -> Path:
    return path.parent / f".{path.name}.{secrets.token_hex(6)}{_PARTIAL}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def plain_words(path: str | Path) -> Iterator[None]:
    """Turns the disk's refusals in the block (full, read-only, not permitted) into a `MvwanError` that names the file, else `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise MvwanError(
            f"{error.filename or path}: cannot be written ({error.strerror}). Free some space or choose a folder that you may write to."
        ) from error


def write_json(path: str | Path, value: Any) -> None:
    """Nothing; `path` then holds `value` as indented JSON, whole or not at all. NaN and infinity become "nan", "inf", "-inf"."""
    write_file(path, json_text(value))


def json_text(value: Any) -> str:
    """`value` as indented JSON with its newline; NaN and infinity as in `write_json`."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def json_line(value: Any) -> str:
    """`value` as JSON on one line with its newline; NaN and infinity as in `write_json`."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if type(value) in (str, int):
        return value
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, dict):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def flatten(values: Mapping[str, Any], separator: str) -> dict[str, Any]:
    """Nested mappings as one, keys joined with `separator`. An empty mapping leaves nothing."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = flatten(value, separator) if isinstance(value, Mapping) else {"": value}
        flat |= {f"{name}{separator}{key}" if key else name: item for key, item in inner.items()}
    return flat


def read_json(path: str | Path) -> Any:
    """The value in a JSON file. `MvwanError` when the file is missing, cannot be read, or is not JSON."""
    try:
        return _json_value(read_text(path))
    except (_NotJsonError, RecursionError) as error:
        raise MvwanError(f"{path}: not a JSON file ({error})") from None


def read_json_lines(path: str | Path) -> list[Any]:
    """The values in a file of JSON lines, none when it is missing; a last line that a killed writer left unfinished is left out."""
    if not os.path.isfile(path):
        return []
    whole, _, _ = read_text(path).rpartition("\n")
    try:
        return [_json_value(line) for line in whole.split("\n") if line]
    except (_NotJsonError, RecursionError) as error:
        raise MvwanError(f"{path}: a line is not JSON ({error})") from None


class _NotJsonError(ValueError):
    """Why a text is no JSON value."""


def _json_value(text: str) -> Any:
    """The value in `text`, by the letter of JSON: no NaN, no name twice in an object; and nested no deeper than recursion reaches."""
    try:
        value = json.loads(text, object_pairs_hook=_named_once, parse_constant=_no_number)
    except ValueError as error:  # also for a whole number of too many digits
        raise _NotJsonError(error) from None
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_DEEPEST_JSON):
        nested = (outer.values() if isinstance(outer, dict) else outer for outer in level)
        level = [item for items in nested for item in items if isinstance(item, dict | list)]
        if not level:
            return value
    raise _NotJsonError(f"nested deeper than {_DEEPEST_JSON} levels")


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise _NotJsonError(f"an object has {Counter(name for name, _ in pairs).most_common(1)[0][0]!r} twice")
    return values


def _no_number(constant: str) -> Any:
    raise _NotJsonError(f"{constant} is no number of JSON")


def read_text(path: str | Path) -> str:
    """The UTF-8 text of a file. `MvwanError` when the file is missing or is not text."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise MvwanError(f"{path}: not a text file (its bytes are not UTF-8)") from None


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a file. `MvwanError` when the file is missing or cannot be read."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise MvwanError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise MvwanError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from None


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits. `MvwanError` when the file is missing."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise MvwanError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from None


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value, 64 hex digits; independent of the order of keys and of how the file was written."""
    text = json.dumps(_finite(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def mark_committed(folder: str | Path, text: str = "") -> None:
    """Nothing; writes the file that says the folder is complete. Call it last, with `text` as its content."""
    write_file(Path(folder) / COMMIT_MARK, text)


def is_committed(folder: str | Path) -> bool:
    """Whether the folder carries its commit mark."""
    return os.path.isfile(Path(folder) / COMMIT_MARK)
