#!/usr/bin/env bash
# Fine-tunes the multi-view RGB + heatmap Wan on robot demonstrations seen by three cameras.
#
# Every variable here and in launch_training.sh may come from the environment; arguments go on to heatmap_train_mv.py:
#   HEATMAP_DATA_ROOT=data/drawer UNFREEZE_MODULATION_AND_NORMS=true scripts/Wan2.2-TI2V-5B_heatmap_rgb_mv_3.sh --max_steps 100
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

: "${HEATMAP_DATA_ROOT:=data/demonstrations}"
: "${OUTPUT_BASE:=runs/finetune}"
: "${SEQUENCE_LENGTH:=24}"
: "${NUM_HISTORY_FRAMES:=1}"
: "${HEATMAP_SIGMA:=1.5}"
: "${NUM_EPOCHS:=100}"
: "${SAVE_EPOCHS_INTERVAL:=10}"
: "${RGB_LOSS_WEIGHT:=0.08}"

# Start from the checkpoint of the pretraining script
: "${LOAD_PRETRAINED_CHECKPOINT:=false}"
: "${PRETRAINED_CHECKPOINT:=}"

# Of the trail format alone: which demonstrations of each task (empty: all), the scene x0,y0,z0,x1,y1,z1 in metres, and whether each
# view shows the clouds of all sensors
: "${TRAIL_START:=}"
: "${TRAIL_END:=}"
: "${SCENE_BOUNDS:=}"
: "${USE_MERGED_POINTCLOUD:=false}"

# Refused with the reason: leave them as they are (MIN_TRAIL_LENGTH: refused above the length of a window)
: "${MIN_TRAIL_LENGTH:=}"
: "${TRANSFORM_AUG_XYZ:=}"
: "${USE_DIFFERENT_PROJECTION:=false}"

# shellcheck source=scripts/launch_training.sh
source "$here/launch_training.sh"
: "${OUTPUT_PATH:=$OUTPUT_BASE/Wan2.2-TI2V-5B_heatmap_rgb_mv_3_unfreeze_$UNFREEZE_MODULATION_AND_NORMS/$(date +%Y%m%d_%H%M%S)}"

train+=(
    --heatmap_data_root "$HEATMAP_DATA_ROOT"
    --output_path "$OUTPUT_PATH"
    --sequence_length "$SEQUENCE_LENGTH"
    --num_history_frames "$NUM_HISTORY_FRAMES"
    --heatmap_sigma "$HEATMAP_SIGMA"
    --num_epochs "$NUM_EPOCHS"
    --save_steps 0
    --save_epochs_interval "$SAVE_EPOCHS_INTERVAL"
    --rgb_loss_weight "$RGB_LOSS_WEIGHT"
)
if is_true LOAD_PRETRAINED_CHECKPOINT; then
    if [[ -z $PRETRAINED_CHECKPOINT ]]; then
        echo "LOAD_PRETRAINED_CHECKPOINT=true needs a checkpoint. Set PRETRAINED_CHECKPOINT to its folder or file." >&2
        exit 2
    fi
    train+=(--lora_checkpoint "$PRETRAINED_CHECKPOINT")
fi
if [[ -n $MIN_TRAIL_LENGTH ]]; then train+=(--min_trail_length "$MIN_TRAIL_LENGTH"); fi
if [[ -n $TRAIL_START ]]; then train+=(--trail_start "$TRAIL_START"); fi
if [[ -n $TRAIL_END ]]; then train+=(--trail_end "$TRAIL_END"); fi
if [[ -n $SCENE_BOUNDS ]]; then train+=("--scene_bounds=$SCENE_BOUNDS"); fi
if [[ -n $TRANSFORM_AUG_XYZ ]]; then train+=("--transform_augmentation_xyz=$TRANSFORM_AUG_XYZ"); fi
if is_true USE_MERGED_POINTCLOUD; then train+=(--use_merged_pointcloud); fi
if is_true USE_DIFFERENT_PROJECTION; then train+=(--use_different_projection); fi
check_first "$@"
exec accelerate launch "${launch[@]}" "$here/heatmap_train_mv.py" "${train[@]}" "$@"
