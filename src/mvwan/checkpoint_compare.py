"""A checkpoint beside its own digests (`verify_checkpoint`), beside its base (`distances`), and beside another one (`diff_checkpoints`).

Tensors are read one at a time. Says what is, not what it means; knows no loss and no run beside its checkpoints.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from mvwan.checkpoint import (
    EMA,
    OLDER_SYSTEM,
    OPTIMIZER,
    READER,
    TRAINED,
    Trained,
    find_checkpoint,
    load_trained,
    read_heat_reader,
    read_manifest,
    read_optimizer,
)
from mvwan.compatibility import check_identity
from mvwan.config import config_from_dict
from mvwan.errors import MvwanError, some
from mvwan.files import sha256_file
from mvwan.model.surgery import adapt
from mvwan.model.trainable import adapted_weight, names_by_group, parameters_by_name, stock_name
from mvwan.model.trainable_table import NOTHING, moment_shapes
from mvwan.model.wan import base_digest, load_transformer
from mvwan.tensors import TensorFile

_Shape = tuple[int, ...]


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _groups(manifest: Mapping[str, Any], names: Iterable[str]) -> dict[str, list[str]]:
    """{group: names}: those of the manifest, or by the built-in rules where it names none."""
    return {name: group["names"] for name, group in manifest["groups"].items()} or names_by_group(names)


# ── is it whole? ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def verify_checkpoint(path: str | Path) -> tuple[Path, str]:
    """(checkpoint that `path` means, a sentence on what was checked). Raises `MvwanError` for the first thing that is not as it should be.

    Checked are the commit mark, the digests of manifest, files and groups, that each tensor is in one group, that the moving average
    and the optimizer's state have the tensors of what trains, and that every number is finite.
    """
    found = find_checkpoint(path)
    trained = load_trained(found)
    if trained.manifest["format_version"] == OLDER_SYSTEM:
        _check_older(found, trained.tensors)
        return found, f"{len(trained.tensors)} tensors, all finite and known; a file of the older system carries no digests to check"
    manifest = read_manifest(found)
    _check_files(found, manifest)
    shapes = _check_groups(found, trained)
    held = {TRAINED: trained.tensors}
    if EMA in manifest["files"]:
        held[EMA] = TensorFile(found / EMA)
        _check_names(found / EMA, held[EMA].shapes, shapes)
    if OPTIMIZER in manifest["files"]:
        held[OPTIMIZER], _ = read_optimizer(found)  # and the state beside it
        trains = [name for group in manifest["groups"].values() if group["mode"] != "frozen" for name in group["names"]]
        optimizer = manifest["config"].get("train", {}).get("optimizer", "adamw")  # which had no name at first
        moments = {moment: shape for name in trains for moment, shape in moment_shapes(optimizer, name, shapes[name]).items()}
        _check_names(found / OPTIMIZER, held[OPTIMIZER].shapes, moments)
    if (reader := read_heat_reader(found)) is not None:
        held[READER] = reader
    for name, file in held.items():
        _check_finite(found / name, file)
    count, num_files = sum(len(file) for file in held.values()), len(manifest["files"])
    groups = len(manifest["groups"])
    return found, f"{count} tensors in {num_files} files, {len(shapes)} trained ones in {groups} groups: all digests match, all finite"


def _check_older(path: Path, tensors: TensorFile) -> None:
    for name in tensors:
        if adapted_weight(name) is not None and _other_half(name) not in tensors:
            raise MvwanError(f"{path}: half an adapter, {name} without {_other_half(name)}. Use another checkpoint.")
    _check_finite(path, tensors)


def _check_files(found: Path, manifest: Mapping[str, Any]) -> None:
    files = manifest.get("files")
    if not isinstance(files, dict) or TRAINED not in files:
        raise MvwanError(f"checkpoint {found}: its manifest vouches for no {TRAINED}. Use another checkpoint.")
    for name, recorded in files.items():
        if sha256_file(found / name) != recorded:
            raise MvwanError(f"{found / name}: damaged, its digest is not the one in the manifest. Use another checkpoint of the run.")


def _check_groups(found: Path, trained: Trained) -> dict[str, _Shape]:
    owner: dict[str, str] = {}
    for name, group in trained.manifest["groups"].items():
        twice = [member for member in group["names"] if member in owner]
        if twice:
            raise MvwanError(f"checkpoint {found}: {twice[0]} is in the groups {owner[twice[0]]} and {name}. Use another checkpoint.")
        owner |= dict.fromkeys(group["names"], name)
    return trained.tensors.shapes


def _check_names(path: Path, shapes: Mapping[str, _Shape], expected: Mapping[str, _Shape]) -> None:
    wrong = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
    if wrong:
        raise MvwanError(f"{path}: its tensors are not those of {TRAINED}: {some(wrong)}. Use another checkpoint of the run.")


def _check_finite(path: Path, tensors: TensorFile) -> None:
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise MvwanError(f"{path}: NaN or infinity in {some(broken)}. Use another checkpoint.")


# ── how far from its base? ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class GroupDistance:
    """How far a group is from the base's initial values; a group of adapters by what they add to the weights they adapt."""

    group: str
    tensors: int
    """Of adapters, the weights that they adapt."""
    moved: int
    """Those that differ from the base in at least one bit."""
    relative_change: float | None
    """Norm of the change over the norm at the start, of the tensors that are not zero in the base; None when all are."""
    change_from_zero: float | None
    """Norm reached by those that are zero in the base; None when none is."""


def distances(path: str | Path, base: str | Path) -> tuple[GroupDistance, ...]:
    """The distance of each group of a checkpoint from `base`. Raises `MvwanError` for another base and for shapes that do not fit."""
    found = find_checkpoint(path)
    tensors, manifest = load_trained(found)
    # Trained tensors start from the base's values in the type in which the run held the base.
    dtype, random_weights, seed, action_head = None, False, 0, manifest.get("action_head", "none")
    if manifest["format_version"] != OLDER_SYSTEM:
        config = config_from_dict(manifest["config"], f"checkpoint {found}: config")
        dtype, random_weights, seed = getattr(torch, config.base.dtype), config.base.random_weights, config.seed
        check_identity(manifest, found, base=base_digest(base, random_weights, seed))
    stock = load_transformer(base, dtype, random_weights=random_weights, seed=seed)
    model, _ = adapt(stock, manifest["views"] or 3, manifest["fusion"], action_head, seed, manifest.get("view_code", "slot"))
    initial = {name: parameter.detach() for name, parameter in parameters_by_name(model).items()}
    _check_shapes(found, tensors.shapes, initial)
    rank, alpha = manifest["lora"]["rank"], manifest["lora"]["alpha"]
    scale = 1.0 if rank is None or alpha is None else alpha / rank
    return tuple(_distance(group, names, tensors, initial, scale) for group, names in _groups(manifest, tensors).items())


def _check_shapes(found: Path, shapes: Mapping[str, _Shape], initial: Mapping[str, torch.Tensor]) -> None:
    problems = []
    for name, shape in shapes.items():
        weight = adapted_weight(name)
        own = initial.get(weight or stock_name(name))
        if own is None:
            problems.append(f"{name} is unknown to it")
            continue
        if (weight is None and tuple(own.shape) != shape) or (weight is not None and not _adapts(name, shape, tuple(own.shape))):
            problems.append(f"{name} is {list(shape)}, which does not fit {list(own.shape)}")
        elif weight is not None and (other := shapes.get(_other_half(name))) is None:
            problems.append(f"{name} is without its {'lora_B' if '.lora_A.' in name else 'lora_A'}")
        elif weight is not None and ".lora_A." in name and other is not None and other[-1] != shape[0]:
            problems.append(f"{name} has rank {shape[0]}, its lora_B {other[-1]}")
    if problems:
        raise MvwanError(f"checkpoint {found} does not fit the base: {some(problems)}. Give the base that it was trained on.")


def _adapts(name: str, shape: _Shape, weight: _Shape) -> bool:
    """Whether an adapter's A [rank, in] or B [out, rank] has the shape for a weight [out, in]."""
    return len(shape) == len(weight) == 2 and (shape[1] == weight[1] if ".lora_A." in name else shape[0] == weight[0])


def _other_half(name: str) -> str:
    return name.replace(".lora_A.", ".lora_B.") if ".lora_A." in name else name.replace(".lora_B.", ".lora_A.")


def _distance(group: str, names: Iterable[str], tensors: TensorFile, initial: Mapping[str, torch.Tensor], scale: float) -> GroupDistance:
    count, moved, start_squares, change_squares, zero_squares = 0, 0, 0.0, 0.0, []
    for name in names:
        weight = adapted_weight(name)
        if weight is not None and ".lora_B." in name:
            continue  # counted with its A
        before = initial[weight or stock_name(name)]
        start = _norm(before)
        if weight is None:
            change = _norm(tensors[name].to(torch.float64) - before.to(torch.float64))
        else:
            change = scale * _product_norm(tensors[name], tensors[_other_half(name)])
        count, moved = count + 1, moved + (change != 0)
        if start == 0:
            zero_squares.append(change**2)
        else:
            start_squares += start**2
            change_squares += change**2
    return GroupDistance(
        group=group,
        tensors=count,
        moved=moved,
        relative_change=math.sqrt(change_squares / start_squares) if start_squares else None,
        change_from_zero=math.sqrt(sum(zero_squares)) if zero_squares else None,
    )


def _product_norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """The norm of B A, from two products of the rank's size: B A itself is as large as the weight."""
    a, b = a.to(torch.float64), b.to(torch.float64)
    return math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))


def distance_table(rows: Iterable[GroupDistance], base: str | Path) -> Table:
    """A rich table for `Console.print`."""
    table = Table(title=f"Distance from {base}", title_justify="left")
    for column in ("group", "relative change", "change from zero", "tensors moved", ""):
        table.add_column(column, justify="left" if column in ("group", "") else "right", no_wrap=True)
    for row in rows:
        numbers = (NOTHING if value is None else f"{value:.2e}" for value in (row.relative_change, row.change_from_zero))
        table.add_row(row.group, *numbers, f"{row.moved}/{row.tensors}", "" if row.moved else "did not move")
    return table


# ── how far from another? ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class GroupDifference:
    """What two checkpoints hold of one group."""

    group: str
    shared: int
    """Tensors on both sides."""
    changed: int
    """Shared ones that differ in at least one bit or in shape."""
    relative_change: float | None
    """Norm of B - A over norm of A, of the shared tensors of one shape; None when A is zero there."""
    difference_norm: float
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    reshaped: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What `diff_checkpoints` found."""

    a: Path
    b: Path
    identity: dict[str, tuple[Any, Any]]
    """What the manifests say differently: {what: (of A, of B)}; None is what an older file does not say."""
    groups: tuple[GroupDifference, ...]

    @property
    def same(self) -> bool:
        """Whether the tensors are the same to the bit."""
        return not any(row.changed or row.only_a or row.only_b for row in self.groups)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for `json.dumps`."""
        identity = {name: {"a": a, "b": b} for name, (a, b) in self.identity.items()}
        return {"a": str(self.a), "b": str(self.b), "same": self.same, "identity": identity, "groups": [asdict(row) for row in self.groups]}

    def render(self) -> list[Table]:
        """Rich tables for `Console.print`: what the manifests say differently (where they do), then the groups."""
        tables = []
        if self.identity:
            said = Table(title="Said differently", title_justify="left")
            for column in ("", "A", "B"):
                said.add_column(column)
            for name, values in self.identity.items():
                said.add_row(name, *("unknown" if value is None else str(value) for value in values))
            tables.append(said)
        table = Table(title=f"A: {self.a}\nB: {self.b}", title_justify="left")
        for column in ("group", "changed", "relative change", "difference norm", "only in A", "only in B"):
            table.add_column(column, justify="left" if column == "group" else "right", no_wrap=True)
        for row in self.groups:
            relative = NOTHING if row.relative_change is None else f"{row.relative_change:.2e}"
            missing = (f"{len(names)}" if names else "" for names in (row.only_a, row.only_b))
            table.add_row(row.group, f"{row.changed}/{row.shared}", relative, f"{row.difference_norm:.2e}", *missing)
        return [*tables, table]


def diff_checkpoints(a: str | Path, b: str | Path) -> Difference:
    """What differs between two checkpoints, each whatever `find_checkpoint` takes. Raises `MvwanError` when one cannot be read."""
    (first, said_first), (second, said_second) = load_trained(a), load_trained(b)
    left, right = ({stock_name(name): name for name in file} for file in (first, second))
    rows = []
    for group, names in _shared_groups(said_first, said_second, left, right).items():
        rows.append(_difference(group, names, (first, left), (second, right)))
    before, after = _said(said_first), _said(said_second)
    identity = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    return Difference(a=find_checkpoint(a), b=find_checkpoint(b), identity=identity, groups=tuple(rows))


def _said(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint is, beside its tensors."""
    names = {"views": "views", "fusion": "fusion", "switch": "unfreeze_modulation_and_norms", "step": "step"}
    base, lora = manifest["base"], manifest["lora"]
    said = {"base": base.get("id"), "base digest": base.get("digest"), "LoRA rank": lora.get("rank"), "LoRA alpha": lora.get("alpha")}
    said |= {"action head": manifest.get("action_head", "none"), "view code": manifest.get("view_code", "slot")}
    return said | {name: manifest[key] for name, key in names.items()}


def _shared_groups(a: Mapping[str, Any], b: Mapping[str, Any], left: Mapping[str, str], right: Mapping[str, str]) -> dict[str, list[str]]:
    """{group: names before LoRA injection} of all tensors of both; where the two put a tensor into different groups, A's counts."""
    groups: dict[str, list[str]] = {}
    placed: set[str] = set()
    for manifest, held in ((a, left), (b, right)):
        for group, names in _groups(manifest, held).items():
            new = [name for name in map(stock_name, names) if name not in placed]
            groups.setdefault(group, []).extend(new)
            placed.update(new)
    return {group: names for group, names in groups.items() if names}


def _difference(
    group: str, names: Iterable[str], a: tuple[TensorFile, Mapping[str, str]], b: tuple[TensorFile, Mapping[str, str]]
) -> GroupDifference:
    (first, left), (second, right) = a, b
    names = list(names)
    shared = [name for name in names if name in left and name in right]
    reshaped = tuple(name for name in shared if first.shapes[left[name]] != second.shapes[right[name]])
    changed, squares, difference_squares = len(reshaped), 0.0, 0.0
    for name in shared:
        if name in reshaped:
            continue
        before, after = first[left[name]], second[right[name]]
        changed += before.dtype != after.dtype or not torch.equal(_bits(before), _bits(after))
        squares += _norm(before) ** 2
        difference_squares += _norm(after.to(torch.float64) - before.to(torch.float64)) ** 2
    return GroupDifference(
        group=group,
        shared=len(shared),
        changed=changed,
        relative_change=math.sqrt(difference_squares / squares) if squares else None,
        difference_norm=math.sqrt(difference_squares),
        only_a=tuple(name for name in names if name not in right),
        only_b=tuple(name for name in names if name not in left),
        reshaped=reshaped,
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
