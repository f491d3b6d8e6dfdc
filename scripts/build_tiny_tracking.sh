#!/usr/bin/env bash
# Makes the checkpoint `tiny-tracking`: the tiny Wan learns from many Meta-World tasks to see with three cameras and to track the tool point.
#
# None of the tasks that results are reported on is among them. On two cores with AVX2 alone recording took 30 minutes, and the second
# training 90 after 14 of encoding; what is finished is not repeated, and a training that was cut off goes on. Run it in the repository
# after `make setup`.
#
# Example: scripts/build_tiny_tracking.sh runs/tracking
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-runs/tracking}
shipped=src/mvwan/assets/tiny-tracking
export OMP_NUM_THREADS=1
export PATH="$PWD/.venv/bin:$PATH"

mapfile -t tasks < <(python - <<'PYTHON'
import json
from mvwan.model.wan import TINY_FOLDER
from mvwan.sim.tasks import INSTRUCTIONS

never = {f"{name}-v3" for name in json.loads((TINY_FOLDER / "quality.json").read_text())["settings"]["tasks_never_used"]}
print("\n".join(f"--task={name}" for name in sorted(INSTRUCTIONS) if name not in never))
PYTHON
)
[[ -d $folder/demonstrations ]] || mvwan record "${tasks[@]}" --episodes 12 --seed 5000 --output "$folder/demonstrations"

# go NAME SETTING…: one training on those demonstrations into the folder NAME, every window encoded before it.
go() {
    local name=$1 settings=(--preset tiny-pretrain --set data.root="$folder/demonstrations")
    shift
    mvwan cache "${settings[@]}" "$@" --workers 1 --output "$folder/latents"
    accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no -m mvwan \
        train "${settings[@]}" "$@" --set data.cache="$folder/latents" --set train.batch_size=4 --set train.compile=true \
        --output "$folder/$name" --resume
}

# At every noise, narrow spots; then as the preset has it, at the noise where it shows what comes, spots that are learned faster. The
# preset's heat reader came after both.
go first --set flow.sigma_min=0 --set data.heatmap_sigma_px=4 --set train.heat_reader_weight=0
go second --set train.from_checkpoint="$folder/first" --set train.heat_reader_weight=0
rm -rf "$shipped.new"
mvwan checkpoint export "$folder/second" --format mvwan --output "$shipped.new"
rm -rf "$shipped"
mv "$shipped.new" "$shipped"
