"""What trains, as a table: one row per group with its counts and its cost; as JSON, terminal table, Markdown and banners.

Plain names and numbers: knows no model and no torch. `model/trainable` fills it in.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table

from mvwan.markdown import markdown_table

Mode = Literal["frozen", "full", "lora"]
_Cells = Sequence[Sequence[str]]

_MOMENT_BYTES = 4
"""Of a number that an optimizer keeps; float32."""
NOTHING = "–"
RULE = "=" * 80


def moment_shapes(optimizer: str, name: str, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """{`<moment>/<name>`: shape} of what `train.optimizer` keeps of a trained tensor."""
    shape = tuple(shape)
    if optimizer == "adafactor" and len(shape) > 1:
        kept = {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": (*shape[:-2], shape[-1])}
    elif optimizer == "adafactor":
        kept = {"exp_avg_sq": shape}
    else:
        kept = {"exp_avg": shape, "exp_avg_sq": shape}
    return {f"{moment}/{name}": held for moment, held in kept.items()}


def moment_bytes(optimizer: str, shape: Sequence[int]) -> int:
    """What `train.optimizer` keeps of a trained tensor of that shape."""
    return _MOMENT_BYTES * sum(math.prod(held) for held in moment_shapes(optimizer, "", shape).values())


@dataclass(frozen=True, kw_only=True)
class Row:
    """One group of the table. In mode `lora` it counts the adapters, not the weights they adapt."""

    name: str
    mode: Mode
    parameters: int
    """Numbers, not tensors."""
    dtype: str
    """`float32`, or `bfloat16+float32` where the group holds both."""
    names: tuple[str, ...]
    """Full parameter names in the order of the model."""
    optimizer_bytes: int
    """What the optimizer keeps of them; 0 when frozen."""

    @property
    def trainable(self) -> bool:
        return self.mode != "frozen"

    @property
    def tensors(self) -> int:
        return len(self.names)


@dataclass(frozen=True, kw_only=True)
class TrainableTable:
    """Every parameter of the model in exactly one row, in the order of the rules."""

    rows: tuple[Row, ...]

    @property
    def trainable_rows(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.trainable)

    @property
    def trainable_names(self) -> tuple[str, ...]:
        return tuple(name for row in self.trainable_rows for name in row.names)

    @property
    def frozen_names(self) -> tuple[str, ...]:
        return tuple(name for row in self.rows if not row.trainable for name in row.names)

    @property
    def trainable_parameters(self) -> int:
        return sum(row.parameters for row in self.trainable_rows)

    @property
    def trainable_tensors(self) -> int:
        return sum(row.tensors for row in self.trainable_rows)

    @property
    def total_parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def total_tensors(self) -> int:
        return sum(row.tensors for row in self.rows)

    @property
    def optimizer_bytes(self) -> int:
        return sum(row.optimizer_bytes for row in self.rows)

    def row(self, name: str) -> Row | None:
        """The row of that group, or None when the table has no such group."""
        return next((row for row in self.rows if row.name == name), None)

    def trains(self, name: str) -> bool:
        """Whether that group exists and trains."""
        row = self.row(name)
        return row is not None and row.trainable

    def share_of_lora(self, parameters: int) -> float | None:
        """`parameters` as a share of the group `lora` (1.0 is 100 %), or None when that group has no adapters."""
        lora = self.row("lora")
        return parameters / lora.parameters if lora is not None and lora.mode == "lora" and lora.parameters else None

    def to_json(self, base: str, views: int, fusion: str) -> dict[str, Any]:
        """The table as plain dicts, lists and numbers, ready for `json.dumps`."""
        fields = ("name", "mode", "trainable", "parameters", "tensors", "dtype", "optimizer_bytes")
        return {
            "base": base,
            "views": views,
            "fusion": fusion,
            "groups": [{field: getattr(row, field) for field in fields} for row in self.rows],
            "trainable_parameters": self.trainable_parameters,
            "total_parameters": self.total_parameters,
        }

    def render(self, title: str = "What trains") -> Table:
        """A rich table for `Console.print`."""
        return _rich(title, _HEADER, self._cells(), self._totals(), [row.trainable for row in self.rows])

    def to_markdown(self) -> str:
        """The same table in Markdown."""
        return _markdown(_HEADER, self._cells(), self._totals())

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                row.name,
                row.mode,
                f"{row.parameters:,}",
                f"{row.tensors:,}",
                percent(self.share_of_lora(row.parameters)) if row.trainable else NOTHING,
                row.dtype,
                human_bytes(row.optimizer_bytes),
            )
            for row in self.rows
        ]

    def _totals(self) -> list[tuple[str, ...]]:
        share = percent(self.share_of_lora(self.trainable_parameters))
        dtypes = "+".join(sorted({row.dtype for row in self.trainable_rows}))
        counts = f"{self.trainable_parameters:,}", f"{self.trainable_tensors:,}"
        return [
            ("trainable", "", *counts, share, dtypes, human_bytes(self.optimizer_bytes)),
            ("whole model", "", f"{self.total_parameters:,}", f"{self.total_tensors:,}", "", "", ""),
        ]


_HEADER = ("group", "mode", "parameters", "tensors", "% of LoRA", "dtype", "optimizer bytes")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two tables of the same model side by side, for example the switch off and on."""

    off: TrainableTable
    on: TrainableTable

    @property
    def names(self) -> tuple[str, ...]:
        """Groups that train in either, in the order of the rules."""
        listed = dict.fromkeys(row.name for row in (*self.on.rows, *self.off.rows))
        return tuple(name for name in listed if self.off.trains(name) or self.on.trains(name))

    def to_json(self, base: str, views: int, fusion: str) -> dict[str, Any]:
        """Both tables, and per group what `on` trains beyond `off`."""
        return {
            "off": self.off.to_json(base, views, fusion),
            "on": self.on.to_json(base, views, fusion),
            "difference": {
                "groups": {name: _trained(self.on, name)[0] - _trained(self.off, name)[0] for name in self.names},
                "trainable_parameters": self.on.trainable_parameters - self.off.trainable_parameters,
                "trainable_tensors": self.on.trainable_tensors - self.off.trainable_tensors,
                "optimizer_bytes": self.on.optimizer_bytes - self.off.optimizer_bytes,
            },
        }

    def render(self, title: str = "What trains, switch off and on") -> Table:
        """A rich table for `Console.print`."""
        differs = [_trained(self.on, name) != _trained(self.off, name) for name in self.names]
        return _rich(title, _COMPARE_HEADER, self._cells(), self._totals(), differs)

    def to_markdown(self) -> str:
        """The same table in Markdown."""
        return _markdown(_COMPARE_HEADER, self._cells(), self._totals())

    def _cells(self) -> list[tuple[str, ...]]:
        return [self._line(name, _trained(self.off, name), _trained(self.on, name)) for name in self.names]

    def _totals(self) -> list[tuple[str, ...]]:
        off, on = ((table.trainable_parameters, table.trainable_tensors, table.optimizer_bytes) for table in (self.off, self.on))
        return [self._line("trainable", off, on)]

    def _line(self, name: str, off: tuple[int, int, int], on: tuple[int, int, int]) -> tuple[str, ...]:
        parameters, tensors, kept = on[0] - off[0], on[1] - off[1], on[2] - off[2]
        share = percent(self.on.share_of_lora(parameters)) if parameters else ""
        cost = human_bytes(abs(kept)) if parameters else ""
        sign = "-" if parameters < 0 else "+"
        return (
            name,
            f"{off[0]:,}",
            f"{on[0]:,}",
            f"{parameters:+,}" if parameters else "0",
            f"{tensors:+,}" if tensors else "0",
            share,
            f"{sign}{cost}" if cost else "",
        )


_COMPARE_HEADER = ("group", "trained, off", "trained, on", "difference", "tensors", "% of LoRA", "optimizer bytes")


def compare(off: TrainableTable, on: TrainableTable) -> Comparison:
    """The two tables side by side."""
    return Comparison(off=off, on=on)


def _trained(table: TrainableTable, name: str) -> tuple[int, int, int]:
    """(parameters, tensors, optimizer bytes) that train of that group; zeros where it is frozen or not there."""
    row = table.row(name)
    return (row.parameters, row.tensors, row.optimizer_bytes) if row is not None and row.trainable else (0, 0, 0)


def percent(share: float | None) -> str:
    """`0.2927` -> `29.27 %`; a dash for None."""
    return NOTHING if share is None else f"{100 * share:.2f} %"


def human_bytes(count: int) -> str:
    """`1536` -> `1.50 KiB`; a dash for 0."""
    if count == 0:
        return NOTHING
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{count} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


def _is_text_column(header: str) -> bool:
    return header in ("group", "mode", "dtype")


def _rich(title: str, header: Sequence[str], cells: _Cells, totals: _Cells, bright: Sequence[bool]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in header:
        table.add_column(column, justify="left" if _is_text_column(column) else "right", no_wrap=True)
    for line, is_bright in zip(cells, bright, strict=True):
        table.add_row(*line, style=None if is_bright else "dim")
    table.add_section()
    for line in totals:
        table.add_row(*line, style="bold")
    return table


def _markdown(header: Sequence[str], cells: _Cells, totals: _Cells) -> str:
    bold = [[f"**{cell}**" if cell else "" for cell in line] for line in totals]
    return markdown_table(header, [*cells, *bold], left=[place for place, column in enumerate(header) if _is_text_column(column)])


def modulation_banner(table: TrainableTable) -> str:
    """The notice about the AdaLN tables (group `modulation`), for `print`: a blank line, the block, a blank line."""
    row = table.row("modulation")
    if row is None or not row.trainable:
        return _block(
            "ℹ️  MODULATION PARAMETERS: KEEPING FROZEN (Backward Compatible)",
            [
                "  Modulation parameters will stay frozen (using pretrained values).",
                "  To unfreeze, add --unfreeze_modulation_and_norms flag.",
            ],
        )
    return _block(
        "⚡ MODULATION PARAMETER UNFREEZING",
        [
            "",
            f"✅ Unfroze {row.tensors} modulation parameters:",
            f"  📦 AdaLN modulation: {row.tensors} parameters",
            f"  📊 Total: {row.parameters:,} parameters (~{row.parameters / 1e6:.2f}M)",
            "",
            "💡 训练策略:",
            "  - Modulation: 全量训练（适应新任务的时间步调制模式）",
        ],
    )


_MULTIVIEW_LABELS = {"projector": "Projector", "modulation_mvs": "Modulation_mvs", "lora_mvs": "MVS_Attn", "mvs_norms": "MVS_Attn Norms"}
_MODE_LABELS = {"full": "(全量训练)", "lora": "LoRA (LoRA训练)"}


def multiview_banner(table: TrainableTable) -> str:
    """The notice about the multi-view groups that train, for `print`: a blank line, the block, a blank line.

    "parameters" counts tensors here, as users of the flag know it.
    """
    rows = [row for name in _MULTIVIEW_LABELS if (row := table.row(name)) is not None and row.trainable]
    modes = {row.name: row.mode for row in rows}
    items = [f"  📦 {_MULTIVIEW_LABELS[row.name]} {_MODE_LABELS[row.mode]}: {row.tensors} parameters" for row in rows]
    fresh = [_MULTIVIEW_LABELS[name] for name in ("projector", "modulation_mvs") if modes.get(name) == "full"]
    strategy = [f"  - {' & '.join(fresh)}: 全量训练（从零开始学习）"] if fresh else []
    if modes.get("lora_mvs") == "lora":
        strategy.append("  - MVS_Attn: LoRA微调（利用预训练知识，节省显存）")
    if modes.get("mvs_norms") == "full":
        strategy.append("  - MVS_Attn norm_q/norm_k: 全量训练（适应多视角特征分布）")
    unfrozen = f"✅ Unfroze {sum(row.tensors for row in rows)} parameter(s):"
    return _block("MULTI-VIEW MODULE PARAMETER UNFREEZING", ["", unfrozen, "", *items, "", "💡 训练策略:", *strategy])


def _block(title: str, lines: Sequence[str]) -> str:
    return "\n".join(["", RULE, title, RULE, *lines, RULE, ""])
