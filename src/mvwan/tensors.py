"""Tensors in safetensors files: written, read one at a time, and vouched for by digests of their bits. Nothing is unpickled.

Knows no parameter name and no folder; who writes makes the file whole (`files.whole_file`, `files.whole_directory`).
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mvwan.errors import MvwanError

_UNREADABLE = (SafetensorError, OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError)
"""What a damaged file makes safetensors and torch raise: a type that this torch lacks is an AttributeError, an impossible shape a
RuntimeError."""
_BYTES_PER_MAPPING = 2**23
"""Read of an open file before it is opened anew: it keeps all pages that were ever read, and opening reads the whole header."""
_DTYPE_NAMES = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint", "C": "complex"}


def dtype_name(dtype: Any) -> str:
    """`float32` for torch.float32 and for the `F32` of a safetensors header alike."""
    text = str(dtype).removeprefix("torch.")
    kind, bits = text.rstrip("0123456789"), text[len(text.rstrip("0123456789")) :]
    return f"{_DTYPE_NAMES[kind]}{bits}" if kind in _DTYPE_NAMES else text.lower()


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Nothing; the file `path` holds the tensors. Raises `MvwanError` when the disk does not take them.

    Equal tensors give equal bytes as long as `metadata` has one entry: safetensors writes several in any order.
    """
    content = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    try:
        save_file(content, path, metadata=dict(metadata or {"format": "pt"}))
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes it private; like any new file instead
    except (SafetensorError, OSError) as error:
        raise MvwanError(f"{path}: cannot be written ({error}). Free some space or choose another folder.") from None


class TensorFile(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors file by name, each read when it is asked for, so that no second copy of a model is ever in memory.

    Raises `MvwanError` for a file that is missing, cut short or no safetensors file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not os.path.isfile(self.path):
            raise MvwanError(f"{path}: no such file")
        try:
            with safe_open(self.path, "pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                self.shapes: dict[str, tuple[int, ...]] = {name: tuple(part.get_shape()) for name, part in slices.items()}
                self.dtypes: dict[str, str] = {name: dtype_name(part.get_dtype()) for name, part in slices.items()}
                self.metadata: dict[str, str] = file.metadata() or {}
        except _UNREADABLE as error:
            raise self._unreadable(error) from None
        self._stored = {name: name for name in self.shapes}
        self._open: Any = None
        self._bytes_left = 0

    def renamed(self, names: Mapping[str, str]) -> "TensorFile":
        """The same file with the tensors under other names: `names` is {stored: new}, for every tensor, without repeats."""
        other = TensorFile(self.path)
        other._stored = {names[name]: name for name in self.shapes}
        assert len(other._stored) == len(self.shapes), "two tensors under one name"
        other.shapes = {names[name]: shape for name, shape in self.shapes.items()}
        other.dtypes = {names[name]: dtype for name, dtype in self.dtypes.items()}
        return other

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self._stored[name]
        try:
            if (file := self._open) is None:  # a name of its own, since another thread may close it
                file, self._bytes_left = safe_open(self.path, "pt"), _BYTES_PER_MAPPING
            tensor = file.get_tensor(stored)
        except _UNREADABLE as error:
            raise self._unreadable(error) from None
        self._bytes_left -= tensor.nbytes
        self._open = file if self._bytes_left > 0 else None
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def _unreadable(self, error: Exception) -> MvwanError:
        return MvwanError(f"{self.path}: not a readable safetensors file ({error}). Give a run's folder or a .safetensors checkpoint.")


def read_row(path: Path, row: int) -> dict[str, torch.Tensor]:
    """Name -> `tensor[row]` of every tensor in a safetensors file, of which nothing else is read. `MvwanError` when that cannot be.

    The bits may lie in the file still: copy what is kept.
    """
    if not os.path.isfile(path):
        raise MvwanError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name)[row : row + 1][0] for name in file.keys()}  # noqa: SIM118
    except (*_UNREADABLE, IndexError) as error:
        raise MvwanError(f"{path}: row {row} cannot be read ({error})") from None


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """`sha256:…` of names, dtypes, shapes and bits, whatever the order."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        total.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{total.hexdigest()}"
