"""The proof that training moves what the table trains, and nothing else: a snapshot before, a check a few steps later.

Trained tensors lie in a temporary file until the check; frozen ones are remembered by an exact checksum of their bits. Of tensors that
are spread over processes each process remembers its part, and what it finds is added up. Knows no optimizer and no loop: the caller
says how many steps lie between snapshot and check.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from rich.table import Table
from torch import nn

from mvwan.errors import MvwanError
from mvwan.model.quantized import stored_parts
from mvwan.model.trainable import parameters_by_name
from mvwan.model.trainable_table import NOTHING, Row, TrainableTable
from mvwan.sharding import FlatPart, is_spread, local_part, sum_of_parts

MINIMUM_STEPS = 2
"""After one step nothing before the zero-initialised projector, and no LoRA A before its zero B, has seen a gradient."""
_CHUNK_WORDS = 2**20
Gradient = torch.Tensor | FlatPart | None
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, kw_only=True)
class GroupMovement:
    """How far one trained group went."""

    group: str
    tensors: int
    tensors_moved: int
    """Tensors in which at least one bit changed."""
    relative_change: float | None
    """Norm of the change over the norm at the start, of the tensors that were not zero at the start; None when all were."""
    change_from_zero: float | None
    """Norm reached by the tensors that were zero at the start; None when none was."""
    gradient_norm: float
    """Norm of the group's gradient at the last step before the check."""


@dataclass(frozen=True, kw_only=True)
class MovementReport:
    """The passed proof."""

    steps: int
    """Optimizer updates between snapshot and check."""
    rows: tuple[GroupMovement, ...]
    frozen_tensors: int
    """Frozen tensors found unchanged, bit for bit."""

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> "MovementReport":
        """What `to_json` gave."""
        rows = tuple(GroupMovement(**row) for row in plain["groups"])
        return cls(steps=plain["steps"], rows=rows, frozen_tensors=plain["frozen_tensors_unchanged"])

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for `json.dumps`."""
        return {"steps": self.steps, "frozen_tensors_unchanged": self.frozen_tensors, "groups": [asdict(row) for row in self.rows]}

    def render(self, whose: str = "") -> Table:
        """A rich table for `Console.print`; `whose` is for its title."""
        caption = f"{self.frozen_tensors:,} frozen tensors unchanged, bit for bit"
        title = f"Movement after {self.steps} steps{', ' if whose else ''}{whose}"
        table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
        for column in ("group", "relative change", "change from zero", "gradient norm", "tensors moved"):
            table.add_column(column, justify="left" if column == "group" else "right", no_wrap=True)
        for row in self.rows:
            numbers = (row.relative_change, row.change_from_zero, row.gradient_norm)
            cells = (NOTHING if value is None else f"{value:.2e}" for value in numbers)
            table.add_row(row.group, *cells, f"{row.tensors_moved}/{row.tensors}")
        return table


def gradient_norms(
    model: nn.Module, table: TrainableTable, gradient_of: Callable[[nn.Parameter], Gradient] = lambda parameter: parameter.grad
) -> dict[str, float]:
    """Group -> norm of its gradient now, 0 where no tensor has one. Call it before `optimizer.step`, in every process."""
    parameters = parameters_by_name(model)
    norms: dict[str, float] = {}
    held: list[torch.Tensor | FlatPart] = []
    for row in table.trainable_rows:
        gradients = [gradient for name in row.names if (gradient := gradient_of(parameters[name])) is not None]
        parts = [torch.linalg.vector_norm(local_part(gradient), dtype=torch.float32) for gradient in gradients]
        norms[row.name] = float(torch.linalg.vector_norm(torch.stack(parts))) if parts else 0.0
        held += gradients
    if not any(map(is_spread, held)):
        return norms
    squares = sum_of_parts(torch.tensor(list(norms.values()), dtype=torch.float64).square(), held)
    return dict(zip(norms, squares.sqrt().tolist(), strict=True))


class MovementProof:
    """`snapshot()` before the first step, `check(...)` after the second or a later one."""

    def __init__(self, model: nn.Module, table: TrainableTable) -> None:
        self.model = model
        self.table = table
        self._trained: _TensorsOnDisk | None = None
        self._frozen: dict[str, list[tuple[int, int]]] = {}

    def snapshot(self, folder: Path | None = None) -> None:
        """Remember every trained tensor (in a file without a name on the disk of `folder`) and every frozen one (its checksum)."""
        parameters = parameters_by_name(self.model)
        self._trained = _TensorsOnDisk(folder)
        for name in self.table.trainable_names:
            self._trained.add(name, local_part(parameters[name]))
        self._frozen = {name: _checksums(parameters[name]) for name in self.table.frozen_names}

    def check(self, model: nn.Module, step: int, gradient_norms: Mapping[str, float]) -> MovementReport:
        """The report, after comparing `model` with the snapshot, which is dropped.

        `step` counts optimizer updates since the snapshot, `gradient_norms` comes from the function of that name. Raises
        `MvwanError` naming each trained group that stood still and each frozen tensor that moved, or when `step` is under 2.
        """
        if step < MINIMUM_STEPS:
            raise MvwanError(
                f"movement proof after {step} step(s): too early, the parts before a zero-initialised projector get no gradient in the "
                f"first step. Set train.movement_step to {MINIMUM_STEPS} or more."
            )
        assert self._trained is not None, "snapshot() comes before check()"
        parameters = parameters_by_name(model)
        rows = tuple(self._movement(row, parameters, gradient_norms) for row in self.table.trainable_rows)
        changed = [float(_checksums(parameters[name]) != before) for name, before in self._frozen.items()]
        anywhere = sum_of_parts(torch.tensor(changed), parameters.values()).tolist()
        moved = [name for name, parts in zip(self._frozen, anywhere, strict=True) if parts]
        problems = [_stood_still(row, step) for row in rows if row.tensors_moved == 0]
        if moved:
            more = f" and {len(moved) - 3} more" if len(moved) > 3 else ""
            problems.append(f"frozen tensors moved: {', '.join(moved[:3])}{more}; something beside this optimizer writes to them")
        if problems:
            raise MvwanError("; ".join(problems))
        report = MovementReport(steps=step, rows=rows, frozen_tensors=len(self._frozen))
        self._trained.close()
        self._trained, self._frozen = None, {}
        return report

    def _movement(self, row: Row, parameters: Mapping[str, nn.Parameter], norms: Mapping[str, float]) -> GroupMovement:
        assert self._trained is not None
        held = [self._squares(name, local_part(parameters[name])) for name in row.names]
        found = sum_of_parts(torch.tensor(held, dtype=torch.float64), [parameters[name] for name in row.names]).tolist()
        start_squares = sum(start for start, _, _ in found)
        change_squares = sum(change for start, change, _ in found if start)
        zero_squares = [change for start, change, _ in found if not start]
        return GroupMovement(
            group=row.name,
            tensors=row.tensors,
            tensors_moved=sum(parts > 0 for _, _, parts in found),
            relative_change=math.sqrt(change_squares / start_squares) if start_squares else None,
            change_from_zero=math.sqrt(sum(zero_squares)) if zero_squares else None,
            gradient_norm=norms.get(row.name, 0.0),
        )

    def _squares(self, name: str, part: torch.Tensor) -> tuple[float, float, float]:
        """(square of the norm before, square of the change, 1 if any bit changed) of this process's part of a trained tensor."""
        assert self._trained is not None
        before, now = self._trained.read(name, like=part), part.to("cpu")
        start, change = (float(torch.linalg.vector_norm(values, dtype=torch.float64)) for values in (before, now - before))
        return start**2, change**2, float(not torch.equal(before, now))


class _TensorsOnDisk:
    """Tensors in a temporary file that has no name, so that nothing of it is left however the process ends."""

    def __init__(self, folder: Path | None) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open until the check
        self._starts: dict[str, int] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self._starts[name] = self._file.tell()
        self._file.write(_bytes_of(tensor.to("cpu").contiguous()))

    def read(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """The tensor of that name, which had the shape and type of `like`, on the CPU."""
        tensor = torch.empty_like(like, device="cpu", memory_format=torch.contiguous_format)
        self._file.seek(self._starts[name])
        self._file.readinto(_bytes_of(tensor))  # pyright: ignore[reportAttributeAccessIssue]
        return tensor

    def close(self) -> None:
        self._file.close()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _stood_still(row: GroupMovement, step: int) -> str:
    if row.gradient_norm == 0:
        why = "it gets no gradient: the forward pass does not use it, or it is detached"
    else:
        norm = f"its gradient norm is {row.gradient_norm:.2e}"
        why = f"{norm}: the optimizer does not hold it, or its warm-up keeps the learning rate too small"
    return f"the group {row.group!r} trains but none of its {row.tensors} tensors moved in {step} steps; {why}"


def _checksums(parameter: torch.Tensor) -> list[tuple[int, int]]:
    """Of this process's part of a frozen tensor; of a quantised one, of each tensor that it consists of."""
    return [checksum(part) for part in stored_parts(local_part(parameter))]


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> tuple[int, int]:
    """Two sums over the bits of a tensor read as integers, plain and weighted by position, modulo 2^64. Works in chunks.

    Weights are odd, so a change of any single word changes both sums; an exchange of two words changes the second.
    """
    assert not tensor.is_meta, "the meta device holds no bits"
    plain, weighted, offset = 0, 0, 0
    longest = min(_CHUNK_WORDS, tensor.numel())
    odd = 2 * torch.arange(longest, dtype=torch.int64, device=tensor.device) + 1
    for words in _words(tensor.detach()):
        total = int(words.sum())
        plain += total
        weighted += _dot(words, odd[: len(words)]) + 2 * offset * total
        offset += len(words)
    return plain % 2**64, weighted % 2**64


def _dot(words: torch.Tensor, weights: torch.Tensor) -> int:
    # The CPU has an integer dot product, three times as fast as product and sum; CUDA has none.
    return int(torch.dot(words, weights) if words.device.type == "cpu" else (words * weights).sum())


def _words(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The bits in chunks of int64: eight-byte words as many as fit, then each element left over as one."""
    integers = tensor.reshape(-1).view(_INTEGERS[tensor.element_size()])
    per_word = 8 // tensor.element_size()
    whole = len(integers) - len(integers) % per_word
    is_aligned = integers.storage_offset() % per_word == 0
    for chunk in integers[:whole].split(_CHUNK_WORDS * per_word):
        yield (chunk if is_aligned else chunk.clone()).view(torch.int64)
    yield integers[whole:].to(torch.int64)
