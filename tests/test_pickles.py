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
from mvwan.pickles import read_pickle


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
