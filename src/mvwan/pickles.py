"""Pickles of strangers: numpy arrays and plain Python values come out, and nothing is imported or run on the way.

What a pickle names is looked up here and nowhere else, and none of it is the real thing: each stand-in checks sizes before it makes
anything. Objects of classes that the caller names become records of what they held; all other classes are refused. pickle's Python
implementation is used because the C one sets memory aside for numbers that a file merely claims. Knows no dataset.
"""

import io
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mvwan.errors import MvwanError
from mvwan.files import read_bytes

_DTYPE = re.compile(r"[?biufcSUO]\d{0,9}")
_HEAVIEST_TUPLE = 10**6
_NDARRAY = object()
"""`numpy.ndarray`, which pickles name as an argument only."""


def _new_array(kind: Any, shape: Any, _code: Any) -> np.ndarray:
    """The empty array that the pickle fills afterwards."""
    if kind is not _NDARRAY or shape != (0,):
        raise _RefusedError("an array that is made in an unusual way")
    return np.ndarray((0,), np.int8)


def _new_dtype(text: Any, _align: Any = False, _copy: Any = True) -> np.dtype[Any]:
    if not isinstance(text, str) or not _DTYPE.fullmatch(text):
        raise _RefusedError(f"numbers of the type {text!r}")
    return np.dtype(text, copy=True)


def _scalar(dtype: Any, raw: Any) -> Any:
    if not isinstance(dtype, np.dtype) or dtype.kind == "O" or not isinstance(raw, bytes) or len(raw) != dtype.itemsize:
        raise _RefusedError("a scalar whose bytes do not fit its type")
    return np.frombuffer(raw, dtype, 1)[0]


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(raw, bytes | bytearray) or not isinstance(dtype, np.dtype) or dtype.kind == "O" or order not in ("C", "F"):
        raise _RefusedError("an array that is made in an unusual way")
    _check_shape(shape, dtype, len(raw))
    return np.frombuffer(raw, dtype).reshape(shape, order=order)


def _check_shape(shape: Any, dtype: np.dtype[Any], num_bytes: int) -> None:
    if not isinstance(shape, tuple) or not all(type(side) is int and side >= 0 for side in shape) or not dtype.itemsize:
        raise _RefusedError(f"an array of shape {shape!r}")
    if math.prod(shape) * dtype.itemsize != num_bytes:
        raise _RefusedError(f"an array of shape {shape!r} in {num_bytes} bytes")


def _bytearray(content: Any = b"", encoding: Any = "latin1") -> bytearray:
    if isinstance(content, str) and encoding in ("latin-1", "latin1"):
        return bytearray(content, encoding)
    if not isinstance(content, bytes):
        raise _RefusedError("a bytearray that is not made of bytes")
    return bytearray(content)


def _encode(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin-1", "latin1"):
        raise _RefusedError("bytes in an unusual encoding")
    return text.encode(encoding)


_STAND_INS: dict[tuple[str, str], Any] = {
    ("builtins", "bytes"): lambda: b"",
    ("builtins", "bytearray"): _bytearray,
    ("builtins", "complex"): complex,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _new_dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _new_array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


class _RefusedError(ValueError):
    """What a pickle holds that is not read."""


@dataclass(frozen=True)
class _Named:
    """A class that the caller lets pickles name. It cannot be called."""

    module: str
    name: str


@dataclass(kw_only=True, eq=False, repr=False, slots=True)
class Record:
    """An object of a class that the caller named: what it held, and nothing that it could do. Two records are never equal."""

    kind: str
    """The class as the pickle names it, `module.name`."""
    state: dict[str, Any] = field(default_factory=dict)
    """Its attributes."""


_OBJECT = object()
"""The base class `object`, which pickles of objects name as an argument."""


def _new_record(kind: Any, base: Any, state: Any = None) -> Record:
    """The empty record that the pickle fills afterwards."""
    if not isinstance(kind, _Named) or base is not _OBJECT or state is not None:
        raise _RefusedError("an object that is made in an unusual way")
    return Record(kind=f"{kind.module}.{kind.name}")


_RECORD_MAKERS: dict[tuple[str, str], Any] = {
    ("builtins", "object"): _OBJECT,
    ("copyreg", "_reconstructor"): _new_record,
    ("copy_reg", "_reconstructor"): _new_record,
}


class _PlainUnpickler(pickle._Unpickler):
    """Builds plain values and arrays. Every other operation of the pickle language is unknown to it."""

    stack: list[Any]
    read: Callable[[int], bytes]

    def __init__(self, data: bytes, records: Sequence[tuple[str, str]]) -> None:
        super().__init__(io.BytesIO(data))
        self._known = _STAND_INS | (_RECORD_MAKERS | {name: _Named(*name) for name in records} if records else {})
        self._weights: dict[int, int] = {}
        self._copied, self._most_copied = 0, 10 * len(data)

    def find_class(self, module_name: str, global_name: str) -> Any:
        found = self._known.get(("builtins" if module_name == "__builtin__" else module_name, global_name))
        if found is None:
            raise _RefusedError(f"it names {module_name}.{global_name}")
        return found

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, np.dtype) and isinstance(state, tuple) and len(state) >= 5:
            # Of the pickled state only the byte order is used: false flags would let bytes pass for pointers to objects.
            if state[1] not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
                raise _RefusedError("an array of records")
            own: Any = target.__reduce__()
            target.__setstate__((own[2][0], state[1], *own[2][2:]))  # pyright: ignore[reportAttributeAccessIssue]
        elif isinstance(target, np.ndarray) and isinstance(state, tuple) and len(state) == 5 and isinstance(state[2], np.dtype):
            _, shape, dtype, fortran, raw = state
            raw = raw.encode("latin1") if isinstance(raw, str) else raw
            if not isinstance(raw, list if dtype.kind == "O" else bytes):
                raise _RefusedError("an array without its bytes")
            _check_shape(shape, dtype, len(raw) * (dtype.itemsize if dtype.kind == "O" else 1))
            self._count(len(raw))
            target.__setstate__((1, shape, dtype, bool(fortran), raw))  # pyright: ignore[reportArgumentType]
        elif isinstance(target, Record):
            if type(state) is not dict or target.state:
                raise _RefusedError(f"a {target.kind} whose state is no dict, or is given twice")
            self._count(len(state))
            if not all(type(name) is str for name in state):
                raise _RefusedError(f"a {target.kind} with an attribute that has no name")
            target.state = state
        else:
            raise _RefusedError(f"a {type(target).__name__} with a state of its own")

    def load_newobj(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if type(arguments) is not tuple or arguments:
            raise _RefusedError("an object that is made with arguments")
        self.stack.append(_new_record(kind, _OBJECT))

    def _weigh(self) -> None:
        """Refuses a tuple that holds the same tuples over and over: its hash would take for ever."""
        made = self.stack[-1]
        weight = 1 + sum(self._weights.get(id(item), 1) if isinstance(item, tuple) else 1 for item in made)
        if weight > max(_HEAVIEST_TUPLE, len(made) + 1):
            raise _RefusedError("a tuple that holds itself too many times")
        self._weights[id(made)] = weight

    def load_bytearray8(self) -> None:
        size = int.from_bytes(self.read(8), "little")
        self.stack.append(bytearray(self.read(size)))

    def load_reduce(self) -> None:
        self._count(sum(len(part) for part in self.stack[-1] if isinstance(part, Sized)))
        super().load_reduce()  # pyright: ignore[reportAttributeAccessIssue]

    def _count(self, num_copied: int) -> None:
        """Refuses a pickle that copies the same bytes over and over."""
        self._copied += num_copied
        if self._copied > self._most_copied:
            raise _RefusedError("the same values too many times")

    def _weighed(self, load: Any) -> None:
        load(self)
        self._weigh()


def _operations() -> dict[int, Any]:
    """Code of each operation that is known -> what does it."""
    plain = pickle._Unpickler.dispatch
    unknown = (pickle.PERSID, pickle.BINPERSID, pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2)
    unknown += (pickle.EXT4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)
    known = {code: load for code, load in plain.items() if bytes([code]) not in unknown}
    for code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
        known[code[0]] = partial(lambda load, self: self._weighed(load), plain[code[0]])
    ours = _PlainUnpickler
    known |= {pickle.BUILD[0]: ours.load_build, pickle.NEWOBJ[0]: ours.load_newobj}
    return known | {pickle.BYTEARRAY8[0]: ours.load_bytearray8, pickle.REDUCE[0]: ours.load_reduce}


_PlainUnpickler.dispatch = _operations()


def read_pickle(path: str | Path, records: Sequence[tuple[str, str]] = ()) -> Any:
    """The value in a pickle that may come from a stranger: numpy arrays, and plain Python numbers, strings and containers.

    Objects of the classes in `records`, (module, name) each, are read as `Record`. What is read may hold itself, or the same list a
    thousand times over: whoever walks through it must know where to stop. `MvwanError` when the file is missing, is damaged, or names
    anything else; nothing that it names is imported or run, and it takes no more memory than a few times its size.
    """
    try:
        return _PlainUnpickler(read_bytes(path), records).load()
    except MvwanError:
        raise
    except _RefusedError as error:
        raise MvwanError(f"{path}: refused, {error}; only numpy arrays and plain Python values are read from pickles") from None
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises nearly anything
        raise MvwanError(f"{path}: not a readable pickle ({type(error).__name__})") from None
