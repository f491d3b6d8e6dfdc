#!/usr/bin/env bash
# Pretrains the multi-view RGB + heatmap Wan on multi-view tracking clips: MVTrack, or LeRobot v3 with cameras.
#
# Every variable here and in launch_training.sh may come from the environment; arguments go on to heatmap_train_mv.py:
#   MVTRACK_DATA_ROOT=data/tracking UNFREEZE_MODULATION_AND_NORMS=true scripts/Wan2.2-TI2V-5B_mvtrack_pretrain.sh --max_steps 100
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

: "${MVTRACK_DATA_ROOT:=data/mvtrack}"
: "${OUTPUT_BASE:=runs/pretrain}"
: "${SEQUENCE_LENGTH:=12}"
: "${STEP_INTERVAL:=2}"
: "${HEATMAP_SIGMA:=2}"
: "${NUM_EPOCHS:=30}"
: "${SAVE_EPOCHS_INTERVAL:=2}"
: "${RGB_LOSS_WEIGHT:=0.5}"

# Refused above the length of a window: leave it as it is
: "${MIN_SEQUENCE_LENGTH:=}"

# shellcheck source=scripts/launch_training.sh
source "$here/launch_training.sh"
: "${OUTPUT_PATH:=$OUTPUT_BASE/Wan2.2-TI2V-5B_mvtrack_pretrain_unfreeze_$UNFREEZE_MODULATION_AND_NORMS/$(date +%Y%m%d_%H%M%S)}"

train+=(
    --mvtrack_data_root "$MVTRACK_DATA_ROOT"
    --output_path "$OUTPUT_PATH"
    --sequence_length "$SEQUENCE_LENGTH"
    --heatmap_sigma "$HEATMAP_SIGMA"
    --num_epochs "$NUM_EPOCHS"
    --save_steps 0
    --save_epochs_interval "$SAVE_EPOCHS_INTERVAL"
    --rgb_loss_weight "$RGB_LOSS_WEIGHT"
)
if [[ -n $MIN_SEQUENCE_LENGTH ]]; then train+=(--min_sequence_length "$MIN_SEQUENCE_LENGTH"); fi
check_first "$@"
exec accelerate launch "${launch[@]}" "$here/heatmap_train_mv.py" "${train[@]}" "$@"
