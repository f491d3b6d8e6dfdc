"""The notices about what was unfrozen, to the character."""

import pytest

from mvwan.config import GroupConfig, TrainableConfig
from mvwan.model.surgery import adapt
from mvwan.model.trainable import apply, resolve_groups
from mvwan.model.trainable_table import Row, TrainableTable, modulation_banner, multiview_banner
from mvwan.model.wan import load_transformer

FROZEN = """
================================================================================
ℹ️  MODULATION PARAMETERS: KEEPING FROZEN (Backward Compatible)
================================================================================
  Modulation parameters will stay frozen (using pretrained values).
  To unfreeze, add --unfreeze_modulation_and_norms flag.
================================================================================
"""

UNFROZEN = """
================================================================================
⚡ MODULATION PARAMETER UNFREEZING
================================================================================

✅ Unfroze 30 modulation parameters:
  📦 AdaLN modulation: 30 parameters
  📊 Total: 552,960 parameters (~0.55M)

💡 训练策略:
  - Modulation: 全量训练（适应新任务的时间步调制模式）
================================================================================
"""

MULTIVIEW_OFF = """
================================================================================
MULTI-VIEW MODULE PARAMETER UNFREEZING
================================================================================

✅ Unfroze 330 parameter(s):

  📦 Projector (全量训练): 60 parameters
  📦 Modulation_mvs (全量训练): 30 parameters
  📦 MVS_Attn LoRA (LoRA训练): 240 parameters

💡 训练策略:
  - Projector & Modulation_mvs: 全量训练（从零开始学习）
  - MVS_Attn: LoRA微调（利用预训练知识，节省显存）
================================================================================
"""

MULTIVIEW_ON = """
================================================================================
MULTI-VIEW MODULE PARAMETER UNFREEZING
================================================================================

✅ Unfroze 390 parameter(s):

  📦 Projector (全量训练): 60 parameters
  📦 Modulation_mvs (全量训练): 30 parameters
  📦 MVS_Attn LoRA (LoRA训练): 240 parameters
  📦 MVS_Attn Norms (全量训练): 60 parameters

💡 训练策略:
  - Projector & Modulation_mvs: 全量训练（从零开始学习）
  - MVS_Attn: LoRA微调（利用预训练知识，节省显存）
  - MVS_Attn norm_q/norm_k: 全量训练（适应多视角特征分布）
================================================================================
"""


def table_5b(trainable: TrainableConfig, switch: bool) -> TrainableTable:
    model, _ = adapt(load_transformer("wan2.2-ti2v-5b", device="meta"), views=3, fusion="channel")
    return apply(model, resolve_groups(trainable, switch), rank=32)


@pytest.mark.parametrize(("switch", "modulation", "multiview"), [(False, FROZEN, MULTIVIEW_OFF), (True, UNFROZEN, MULTIVIEW_ON)])
def test_banners_at_5b(switch: bool, modulation: str, multiview: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = table_5b(TrainableConfig(), switch)
    assert modulation_banner(table) == modulation
    assert multiview_banner(table) == multiview
    print(modulation_banner(table))
    lines = capsys.readouterr().out.split("\n")
    assert lines[0] == lines[-2] == ""  # a blank line before and after the block
    assert lines[1] == lines[-3] == "=" * 80


def test_small_models_keep_two_decimals_of_a_million() -> None:
    row = Row(name="modulation", mode="full", parameters=15_360, dtype="float32", names=("a", "b"), optimizer_bytes=122_880)
    table = TrainableTable(rows=(row,))
    assert "  📊 Total: 15,360 parameters (~0.02M)" in modulation_banner(table)
    assert "✅ Unfroze 2 modulation parameters:" in modulation_banner(table)


def test_the_multiview_banner_names_only_what_trains() -> None:
    modes = {"projector": GroupConfig(mode="frozen"), "lora_mvs": GroupConfig(mode="full")}
    text = multiview_banner(table_5b(TrainableConfig(groups=modes), False))
    assert "Projector" not in text
    assert "  📦 MVS_Attn (全量训练): 120 parameters" in text
    assert "  - Modulation_mvs: 全量训练（从零开始学习）" in text
    assert "LoRA" not in text
