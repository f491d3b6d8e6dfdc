# shellcheck shell=bash
# Sourced by the two launch scripts: the variables that both share, and from them the arrays `launch` (for accelerate) and
# `train` (for heatmap_train_mv.py). Each variable keeps the value that the environment or the calling script gave it.

# The base: a preset, a diffusers folder, a hub id, or Wan-native safetensors
: "${MODEL_BASE_PATH:=wan2.2-ti2v-5b}"

# The switch: train the AdaLN modulation tables and view attention's norm_q / norm_k too. `true` for new models, `false` to stay
# with an old checkpoint (docs/unfreeze.md)
: "${UNFREEZE_MODULATION_AND_NORMS:=false}"

# Windows
: "${STEP_INTERVAL:=1}"
: "${NUM_VIEWS:=3}"
: "${HEIGHT:=256}"
: "${WIDTH:=256}"
: "${DATASET_REPEAT:=1}"
: "${AUGMENTATION_VARIANTS:=4}"
: "${TRANSFORM_AUG_RPY:=5.0,5.0,10.0}"
: "${WAN_TYPE:=5B_TI2V_RGB_HEATMAP_MV}"

# Adapters
: "${LORA_RANK:=32}"
: "${LORA_TARGET_MODULES:=q,k,v,o,ffn.0,ffn.2}"

# Loop
: "${LEARNING_RATE:=1e-4}"
: "${WARMUP_STEPS:=100}"
: "${TRAIN_BATCH_SIZE_PER_GPU:=1}"
: "${GRADIENT_ACCUMULATION_STEPS:=4}"
: "${DATASET_NUM_WORKERS:=0}"
: "${USE_GRADIENT_CHECKPOINTING:=false}"
: "${ENABLE_SWANLAB:=false}"
: "${DEBUG_MODE:=false}"

# Machines
: "${NUM_GPUS:=8}"
: "${NUM_NODES:=1}"
: "${NODE_RANK:=0}"
: "${MASTER_ADDR:=127.0.0.1}"
: "${MASTER_PORT:=29500}"
# auto: bf16 where the machine multiplies it fast; or bf16, or no
: "${MIXED_PRECISION:=auto}"
: "${USE_CPU:=false}"
: "${NUM_CPU_THREADS:=$((($(nproc) + NUM_GPUS - 1) / NUM_GPUS))}"

if ((NUM_NODES > 1)) && [[ -z ${OUTPUT_PATH:-} ]]; then
    echo "NUM_NODES=$NUM_NODES needs OUTPUT_PATH: one folder that all nodes share. Set it to the same on each." >&2
    exit 2
fi

# is_true NAME: whether the variable NAME is true; anything but true and false stops the script.
is_true() {
    case ${!1} in
        true) return 0 ;;
        false) return 1 ;;
        *)
            echo "$1=${!1}: must be true or false." >&2
            exit 2
            ;;
    esac
}

# check_first [FLAGS]: one sentence and exit code 2 for a mistake, before any process is launched.
check_first() {
    WORLD_SIZE=$((NUM_NODES * NUM_GPUS)) python "$here/heatmap_train_mv.py" "${train[@]}" "$@" --check || exit $?
}

launch=(
    --quiet
    --num_processes "$((NUM_NODES * NUM_GPUS))"
    --num_machines "$NUM_NODES"
    --machine_rank "$NODE_RANK"
    --main_process_ip "$MASTER_ADDR"
    --main_process_port "$MASTER_PORT"
    --mixed_precision no # mvwan has its own setting, train.precision
    --num_cpu_threads_per_process "$NUM_CPU_THREADS"
    --dynamo_backend no
)
export -n MASTER_ADDR MASTER_PORT # accelerate sets them itself; to a single process they would promise others
if is_true USE_CPU; then
    # With --cpu accelerate starts one process, however many are asked for.
    if ((NUM_NODES * NUM_GPUS > 1)); then launch+=(--multi_gpu); else launch+=(--cpu); fi
    export ACCELERATE_USE_CPU=true
fi

train=(
    --base "$MODEL_BASE_PATH"
    --wan_type "$WAN_TYPE"
    --use_dual_head
    --step_interval "$STEP_INTERVAL"
    --num_views "$NUM_VIEWS"
    --height "$HEIGHT"
    --width "$WIDTH"
    --dataset_repeat "$DATASET_REPEAT"
    --augmentation_variants "$AUGMENTATION_VARIANTS"
    --transform_augmentation_rpy "$TRANSFORM_AUG_RPY"
    --lora_base_model dit
    --lora_rank "$LORA_RANK"
    --lora_target_modules "$LORA_TARGET_MODULES"
    --learning_rate "$LEARNING_RATE"
    --warmup_steps "$WARMUP_STEPS"
    --train_batch_size "$TRAIN_BATCH_SIZE_PER_GPU"
    --gradient_accumulation_steps "$GRADIENT_ACCUMULATION_STEPS"
    --dataset_num_workers "$DATASET_NUM_WORKERS"
    --set "train.precision=$MIXED_PRECISION"
)
if is_true UNFREEZE_MODULATION_AND_NORMS; then train+=(--unfreeze_modulation_and_norms); fi
if is_true USE_GRADIENT_CHECKPOINTING; then train+=(--use_gradient_checkpointing); fi
if is_true ENABLE_SWANLAB; then train+=(--enable_swanlab); fi
if is_true DEBUG_MODE; then train+=(--debug_mode); fi

# The packages of `make setup`, where they are there.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ -x $here/../.venv/bin/accelerate ]]; then
    PATH=$here/../.venv/bin:$PATH
fi
