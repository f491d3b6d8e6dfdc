"""pickles: arrays and plain values of every protocol come back; whatever else a pickle may say is refused and never done."""

import os
import pickle
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mvwan.errors import MvwanError
from mvwan.pickles import Record, read_pickle


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_arrays_and_plain_values_are_read(tmp_path: Path, protocol: int) -> None:
    value = {
        "points": np.arange(12, dtype=np.float64).reshape(4, 3),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3)),
        "texts": np.array(["ä", "xyz"]),
        "other order": np.arange(3, dtype=">f4"),
        "anything": np.array([1, "x", None], dtype=object),
        "empty": np.zeros((0, 3)),
        "scalar": np.float32(1.5),
        "plain": [1, 2.0, "three", b"four", True, None, (5,), {6}, OrderedDict(a=1)],
    }
    (tmp_path / "v.pkl").write_bytes(pickle.dumps(value, protocol))
    read = read_pickle(tmp_path / "v.pkl")
    assert np.array_equal(read["points"], value["points"])
    assert np.array_equal(read["fortran"], value["fortran"])
    assert read["scalar"] == value["scalar"]
    for name in ("texts", "other order", "anything", "empty"):
        assert read[name].dtype.newbyteorder("=") == value[name].dtype.newbyteorder("=")
        assert read[name].shape == value[name].shape
        assert read[name].tolist() == value[name].tolist()
    assert read["plain"] == value["plain"]


def test_a_pickle_of_old_numpy_is_read(tmp_path: Path) -> None:
    old = pickle.dumps(np.arange(3), 2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "v.pkl").write_bytes(old)
    assert np.array_equal(read_pickle(tmp_path / "v.pkl"), np.arange(3))


class _RunsCode:
    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.pkl"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        bad.write_bytes(pickle.dumps([np.arange(2), _RunsCode(tmp_path / "mark")], protocol))
        with pytest.raises(MvwanError, match="only numpy arrays and plain"):
            read_pickle(bad)
    bad.write_bytes(b"cbuiltins\neval\n(V__import__('os').mkdir('x')\ntR.")
    with pytest.raises(MvwanError, match=r"builtins\.eval"):
        read_pickle(bad)
    assert not (tmp_path / "mark").exists()


def test_a_damaged_pickle_is_one_sentence(tmp_path: Path) -> None:
    whole = pickle.dumps(np.arange(100))
    generator = np.random.default_rng(0)
    start = time.monotonic()
    for _ in range(100):
        data = bytearray(whole[: generator.integers(0, len(whole))])
        (tmp_path / "v.pkl").write_bytes(data)
        with pytest.raises(MvwanError):
            read_pickle(tmp_path / "v.pkl")
    assert time.monotonic() - start < 20


class _Held:
    """An object of a class that a caller may name."""


class _Other:
    """One that no caller names."""


HELD = (__name__, "_Held")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_objects_of_named_classes_are_read_as_records_of_what_they_held(tmp_path: Path, protocol: int) -> None:
    held, empty = _Held(), _Held()
    held.points, held.inner, held.itself = np.arange(3), [empty], held  # pyright: ignore[reportAttributeAccessIssue]
    (tmp_path / "v.pkl").write_bytes(pickle.dumps({"held": held, "twice": held, empty: 1}, protocol))
    read = read_pickle(tmp_path / "v.pkl", (HELD,))
    record = read["held"]
    assert type(record) is Record and record.kind == ".".join(HELD)
    assert np.array_equal(record.state["points"], np.arange(3))
    assert read["twice"] is record and record.state["itself"] is record
    (inner,) = record.state["inner"]
    assert inner.state == {} and read[inner] == 1, "a record may be a key: it is equal to itself alone"
    for names in ((), ((__name__, "_Other"),)):
        with pytest.raises(MvwanError, match="refused, it names"):
            read_pickle(tmp_path / "v.pkl", names)


def test_a_class_that_is_not_named_is_refused_beside_one_that_is(tmp_path: Path) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for stranger in (_Other(), Path("x"), _RunsCode(tmp_path / "mark")):
            (tmp_path / "v.pkl").write_bytes(pickle.dumps([_Held(), stranger], protocol))
            with pytest.raises(MvwanError, match=r"refused, it names (tests\.test_pickles\._Other|copyreg|pathlib|posix)"):
                read_pickle(tmp_path / "v.pkl", (HELD,))
    assert not (tmp_path / "mark").exists()


NAME = f"c{HELD[0]}\n{HELD[1]}\n".encode()
MADE = NAME + b")\x81"
RAW = b"ccopyreg\n_reconstructor\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (NAME + b"(K\x01t\x81.", "made with arguments"),
        (NAME + b"]\x81.", "made with arguments"),
        (NAME + b"}\x92.", "not a readable pickle"),  # NEWOBJ_EX
        (b"ccollections\nOrderedDict\n)\x81.", "made in an unusual way"),
        (b"N)\x81.", "made in an unusual way"),
        (MADE + b")\x81.", "made in an unusual way"),
        (NAME + b"(tR.", "not a readable pickle"),  # called
        (NAME + b"}b.", "a _Named with a state of its own"),
        (MADE + b"(tR.", "not a readable pickle"),
        (MADE + b"]b.", "whose state is no dict"),
        (MADE + b"N}\x86b.", "whose state is no dict"),
        (MADE + b"N}X\x01\x00\x00\x00aNs\x86b.", "whose state is no dict"),
        (MADE + b"ccollections\nOrderedDict\n)Rb.", "whose state is no dict"),
        (MADE + b"}X\x01\x00\x00\x00aNsb}b.", "given twice"),
        (MADE + b"}K\x01Nsb.", "an attribute that has no name"),
        (MADE + b"X\x01\x00\x00\x00aNs.", "not a readable pickle"),  # an item of it
        (MADE + b"Na.", "not a readable pickle"),  # appended to it
        (RAW + b"(" + NAME + b"cbuiltins\nobject\nK\x01tR.", "made in an unusual way"),
        (RAW + b"(" + NAME + b"cbuiltins\nset\nNtR.", "made in an unusual way"),
        (RAW + b"(cbuiltins\nset\ncbuiltins\nobject\nNtR.", "made in an unusual way"),
        (b"cbuiltins\nobject\n(tR.", "not a readable pickle"),
        (b"i" + NAME[1:] + b".", "not a readable pickle"),  # INST
        (b"(" + NAME + b"o.", "not a readable pickle"),  # OBJ
        (b"(" + b"ctests.test_pickles\n_Other\n" + b")\x81.", r"names tests\.test_pickles\._Other"),
    ],
)
def test_records_are_made_in_the_two_plain_ways_alone(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "v.pkl").write_bytes(b"\x80\x04" + data)
    with pytest.raises(MvwanError, match=message):
        read_pickle(tmp_path / "v.pkl", (HELD,))


def test_records_do_not_let_a_small_pickle_take_time_or_memory(tmp_path: Path) -> None:
    """Folded lists, records around records, and one large state that thousands of records are given."""
    folded = b"]\x94" + b"".join(b"](h" + bytes([place]) + b"h" + bytes([place]) + b"e\x94" for place in range(100))
    nested = b"".join(MADE + b"}X\x01\x00\x00\x00a" for _ in range(5000)) + b"N" + b"sb" * 5000
    state = b"}(" + b"".join(b"X\x04\x00\x00\x00" + f"{place:04d}".encode() + b"N" for place in range(5000)) + b"u\x94"
    shared = NAME + b"\x94" + state + b"".join(b"h\x00)\x81h\x01b" for _ in range(20000))
    start = time.monotonic()
    for data, refused in ((folded, False), (nested, False), (shared, True)):
        (tmp_path / "v.pkl").write_bytes(b"\x80\x04" + data + b".")
        if refused:
            with pytest.raises(MvwanError, match="the same values too many times"):
                read_pickle(tmp_path / "v.pkl", (HELD,))
        else:
            read_pickle(tmp_path / "v.pkl", (HELD,))
    assert time.monotonic() - start < 5
