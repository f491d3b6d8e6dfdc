"""What the checkpoints of a run say of it, all but its groups and its steps. Knows no file and no tensor."""

from pathlib import Path
from typing import Any

from mvwan.config import Config
from mvwan.data.dataset import WindowDataset
from mvwan.model.latents import codec_digest
from mvwan.model.wan import base_digest
from mvwan.training_module import HeatmapWanTrainingModule


def run_manifest(config: Config, num_processes: int, strategy: str, training: WindowDataset) -> dict[str, Any]:
    """What the run on the windows `training` is and all of its settings; of the data its content counts, not where it lies."""
    base, lora = config.base, config.trainable.lora
    return {
        "base": {"id": base.source, "digest": base_digest(base.source, base.random_weights, config.seed)},
        "codec": codec_digest(config.base.codec or config.base.source, config.data.text_tokens),
        "views": config.model.views,
        "view_names": list(training.view_names),
        "fps": training.windows[0].episode.fps / config.data.frame_interval,
        "fusion": config.model.fusion,
        "heads": ["rgb", "heatmap"],
        "action_head": config.model.action_head,
        "view_code": config.model.view_code,
        "unfreeze_modulation_and_norms": config.unfreeze_modulation_and_norms,
        "lora": {"rank": lora.rank, "alpha": float(lora.rank if lora.alpha is None else lora.alpha)},
        "seed": config.seed,
        "items_per_step": config.train.batch_size * config.train.gradient_accumulation * num_processes,
        "strategy": strategy,
        "data": {"root": config.data.root, "fingerprint": training.fingerprint},
        "trainable_changes": [],
        "config": config.to_dict(),
    }


def trainable_changes(own: HeatmapWanTrainingModule, start_from: str | Path | None, step: int) -> list[dict[str, Any]]:
    """What trains otherwise than in the checkpoint that the run starts from: one entry, or none when nothing does."""
    if own.fit is None or own.report.manifest is None:
        return []
    before = own.report.manifest["groups"]
    added = {group: len(names) for group, names in own.fit.missing.items()}
    frozen = {group: len(names) for group, names in own.fit.extra.items() if before.get(group, {}).get("mode") != "frozen"}
    return [{"from": Path(str(start_from)).name, "at_step": step, "added": added, "frozen": frozen}] if added or frozen else []
