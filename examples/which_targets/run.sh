#!/usr/bin/env bash
# Which targets, K, tail and weight? The quickstart's student from its teacher in every way of settings.txt (run `make
# quickstart` first):
#     examples/which_targets/run.sh [SEED ...]             1 2 3 by default
# Each run is one rank, JOBS (2) beside each other. What is finished is left alone. Then all are evaluated with the exact
# KL to the teacher, and a table compares them.
set -euo pipefail
cd "$(dirname "$0")/../.."
seeds=("$@")
[ $# -gt 0 ] || seeds=(1 2 3)
here=examples/which_targets
quickstart=runs/quickstart
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHON=${PYTHON:-python3} CONFIG=examples/quickstart/student.yaml

if [ ! -f $quickstart/teacher/stopped.json ]; then
  echo "there is no $quickstart/teacher: run \`make quickstart\` first" >&2
  exit 1
fi

# One run: its folder, its seed, and what it changes.
train() {
  local out=$1 seed=$2
  shift 2
  [ ! -f "$out/figures.jsonl" ] || return 0
  rm -rf "$out"
  "$PYTHON" -m megakd train "$CONFIG" parallel.tp=1 log.progress=false run.seed="$seed" run.dir="$out" eval.every_steps=50 \
    "$@" >"$out.log" 2>&1 || { echo "failed: $out.log" >&2; return 1; }
  "$PYTHON" -m megakd evaluate "$CONFIG" parallel.tp=1 log.progress=false --json --model "$out" 2>>"$out.log" >"$out/figures.new"
  mv "$out/figures.new" "$out/figures.jsonl"
  echo "$out"
}
export -f train

for seed in "${seeds[@]}"; do
  out=runs/which_targets/seed$seed
  mkdir -p "$out"
  "$PYTHON" -m megakd cache "$CONFIG" parallel.tp=1 run.seed="$seed" teacher.cache="$out/cache" cache.codec=q8
  grep -v '^#' $here/settings.txt | while read -r name changes; do
    echo "$out/$name $seed ${changes//CACHE/$out/cache}"
  done | xargs -P "${JOBS:-2}" -I LINE bash -c 'train LINE'
done
"$PYTHON" $here/report.py runs/which_targets
