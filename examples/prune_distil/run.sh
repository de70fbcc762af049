#!/usr/bin/env bash
# A student cut out of its teacher, and distilled (run `make quickstart` first):
#     examples/prune_distil/run.sh [SEED...]             1 2 3 by default
# Three students of one size learn from the same batches: the pruned one from the teacher's whole distribution, one of
# random weights likewise, and the pruned one from the data alone. Seeds draw batches, calibration data and the random
# weights; the teacher is one. STEPS=N makes it shorter.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
here=examples/prune_distil
out=runs/prune_distil
config=$here/student.yaml
steps=${STEPS:-100}
random='{num_layers: 3, hidden_size: 192, ffn_hidden_size: 344, num_attention_heads: 6, num_query_groups: 2, max_sequence_length: 128, init_std: 0.06}'
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
step() { echo "+ $*" >&2; "$@"; }
on_2_ranks() { step "$python" -m torch.distributed.run --standalone --nproc-per-node 2 -m megakd "$@"; }

if [ ! -f runs/quickstart/teacher/stopped.json ]; then
  echo "there is no runs/quickstart/teacher: run \`make quickstart\` first" >&2
  exit 1
fi
[ $# -gt 0 ] || set -- 1 2 3

for seed in "$@"; do
  folder=$out/seed_$seed
  rm -rf "$folder"
  mkdir -p "$folder"
  same=(run.seed="$seed" train.steps="$steps" student.checkpoint="$folder/start")

  say "Seed $seed: the sizes"
  step "$python" -m megakd prune $config "${same[@]}" --dry-run

  say "Seed $seed: importances at tp 2, and the cut"
  on_2_ranks prune $config "${same[@]}" parallel.tp=2

  say "Seed $seed: before the first step"
  on_2_ranks evaluate $config "${same[@]}" --json --model runs/quickstart/teacher --model "$folder/start" \
    >"$folder/before.jsonl"

  for arm in pruned_kd random_kd pruned_ce; do
    more=(run.dir="$folder/$arm")
    case $arm in
      random_kd) more+=(student.checkpoint=null student.model="$random") ;;
      pruned_ce) more+=(loss.kd_weight=0.0 loss.ce_weight=1.0) ;;
    esac
    say "Seed $seed: $arm, its first steps one by one, and on"
    on_2_ranks train $config "${same[@]}" "${more[@]}" eval.every_steps=1 run.stop_after=$((steps / 20))
    on_2_ranks train $config "${same[@]}" "${more[@]}"
  done
done

say "Result"
step "$python" $here/report.py $out
