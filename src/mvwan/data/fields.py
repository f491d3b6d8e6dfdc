"""One field, path or column of a stranger's dataset, of the right kind, or an `MvwanError` that names it.

Knows JSON objects, parquet tables, unpickled values and folders; what the fields are for, the format's own file knows.
"""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mvwan.errors import MvwanError

AGAIN = "Record or copy the dataset again."
_COUNTS_END = 2**53
_ROWS_PER_BYTE = 8
"""More rows than that in a parquet file are not numbers that were measured; reading them would fill the memory."""
_ARROW_NAMES = {"float": "float32", "double": "float64", "halffloat": "float16"}
_WORDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("a text", lambda value: isinstance(value, str) and bool(value)),
    "count": ("a whole number of at least 0", lambda value: type(value) is int and 0 <= value < _COUNTS_END),
    "number": ("a number of at least 0", lambda value: type(value) in (int, float) and 0 <= value < _COUNTS_END),
    "list": ("a list", lambda value: isinstance(value, list)),
    "object": ("an object", lambda value: isinstance(value, dict)),
    "texts": ("a list of texts", lambda value: isinstance(value, list) and value != [] and all(isinstance(item, str) for item in value)),
    "shape": ("a list of sizes", lambda value: isinstance(value, list) and all(type(item) is int and 0 < item < 2**31 for item in value)),
}


def get(values: Any, key: str, kind: str, where: str | Path) -> Any:
    """`values[key]`, which is a `text`, `count`, `number`, `list`, `object`, `texts` or `shape`. `where` starts the message."""
    if not isinstance(values, Mapping) or key not in values:
        raise MvwanError(f"{where}: lacks {key!r}, which the format has. {AGAIN}")
    words, fits = _WORDS[kind]
    if not fits(values[key]):
        raise MvwanError(f"{where}: {key}={str(values[key])[:80]!r}, needs {words}. {AGAIN}")
    return values[key]


@lru_cache(maxsize=1024)
def inside(root: Path, template: str, where: str | Path, **values: str | int) -> Path:
    """`root` joined with the filled template, which may name `values` only and never leaves the folder."""
    try:
        for _, name, form, conversion in Formatter().parse(template):
            if name is not None and (name not in values or conversion or not re.fullmatch(r"(0?[1-9])?d?", form or "")):
                raise ValueError(f"{{{name}}} is not one of {', '.join(values)}")
        filled = template.format(**values)
    except (ValueError, LookupError) as error:
        raise MvwanError(f"{where}: {template!r} is no path template ({error}). {AGAIN}") from None
    parts = re.split(r"[/\\]", filled)
    if os.path.isabs(filled) or ".." in parts or ":" in parts[0] or not filled.isprintable() or max(map(len, parts)) > 255:
        raise MvwanError(f"{where}: {filled!r} is no path inside the dataset. {AGAIN}")
    return root / filled


def read_table(path: Path, leave_out: str | None = None) -> pa.Table:
    """The parquet table at `path`, without the columns whose names start with `leave_out`."""
    try:
        file = pq.ParquetFile(path)
        if file.metadata.num_rows > _ROWS_PER_BYTE * path.stat().st_size:
            raise MvwanError(f"{path}: claims {file.metadata.num_rows} rows in {path.stat().st_size} bytes. {AGAIN}")
        names = [name for name in file.schema_arrow.names if leave_out is None or not name.startswith(leave_out)]
        if len(set(names)) < len(names):
            raise MvwanError(f"{path}: two columns have one name. {AGAIN}")
        table = file.read(columns=names, use_threads=False)
        table.validate(full=True)
        return table
    except FileNotFoundError:
        raise MvwanError(f"{path}: no such file. {AGAIN}") from None
    except MvwanError:
        raise
    except (pa.ArrowException, OSError, ValueError, TypeError, LookupError, NotImplementedError) as error:
        raise MvwanError(f"{path}: not a whole parquet file ({(str(error).splitlines() or ['damaged'])[0]}). {AGAIN}") from None


def rows_of(table: pa.Table, path: Path) -> list[dict[str, Any]]:
    """A dict per row."""
    try:
        return table.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError, TypeError) as error:  # text that is not UTF-8, a date beyond the calendar
        raise MvwanError(f"{path}: holds a value that cannot be read ({type(error).__name__}). {AGAIN}") from None


def numbers(table: pa.Table, key: str, dtype: str, shape: Sequence[int], path: Path) -> np.ndarray:
    """[rows] or [rows *shape] values of a column of numbers, which has exactly that type and that many values per row."""
    if key not in table.column_names:
        raise MvwanError(f"{path}: lacks the column {key!r}, which the dataset's description lists. {AGAIN}")
    values = table.column(key).combine_chunks()
    if isinstance(values, pa.ChunkedArray):
        values = pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], values.type)
    nested = pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type)
    flat = values.flatten() if nested else values
    held = _ARROW_NAMES.get(str(flat.type), str(flat.type))
    if held != dtype or not (pa.types.is_floating(flat.type) or pa.types.is_integer(flat.type) or pa.types.is_boolean(flat.type)):
        raise MvwanError(f"{path}: the column {key!r} is {held}, the dataset's description says {dtype}. {AGAIN}")
    if values.null_count or flat.null_count:
        raise MvwanError(f"{path}: the column {key!r} has empty places. {AGAIN}")
    if len(flat) != len(table) * math.prod(shape):
        raise MvwanError(
            f"{path}: the column {key!r} has {len(flat)} values in {len(table)} rows, the dataset's description says {list(shape)} "
            f"per row. {AGAIN}"
        )
    found = flat.to_numpy(zero_copy_only=False)
    return found.reshape(len(table), *shape) if nested else found


def array_in(value: Any, shape: Sequence[int | None], where: str | Path, kinds: str = "iuf", words: str = "numbers") -> np.ndarray:
    """The numbers of these kinds in an unpickled value: an array of that shape (None: any size), or lists where each size is given.

    `where` starts the message. Lists are measured before numpy sees them: lists of one list over and over would keep it busy for ever.
    """
    array = value if isinstance(value, np.ndarray) else np.asarray(value) if _is_nested(value, shape) else np.array(None)
    fits = array.dtype.kind in kinds and array.ndim == len(shape)
    if not fits or any(wanted not in (None, given) for wanted, given in zip(shape, array.shape, strict=True)):
        sizes = " x ".join("any" if side is None else str(side) for side in shape)
        held = f"{array.dtype} {array.shape}" if isinstance(value, np.ndarray) else shown(value)
        raise MvwanError(f"{where}: holds {held}, needs {f'{sizes} {words}' if shape else words}. {AGAIN}")
    return array


def _is_nested(value: Any, shape: Sequence[int | None]) -> bool:
    if not shape:
        return isinstance(value, int | float | np.generic)
    return isinstance(value, list | tuple) and len(value) == shape[0] and all(_is_nested(item, shape[1:]) for item in value)


def shown(value: Any) -> str:
    """An unpickled value in a message: a text or number as it is, of everything else its type, since what is inside may have no end."""
    if value is None or isinstance(value, str | float | np.generic) or (isinstance(value, int) and abs(value) < _COUNTS_END):
        return repr(value)[:60]
    return f"{type(value).__name__} of length {len(value)}" if isinstance(value, list | tuple | dict) else type(value).__name__
