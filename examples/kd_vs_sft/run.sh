#!/usr/bin/env bash
# Does distillation pay? One student, five ways to train it, three seeds (run `make quickstart` first):
#     examples/kd_vs_sft/run.sh [SEED ...]                 1 2 3 by default
# The data alone; online from the teacher; from a recording of the teacher; on texts that the teacher wrote and then the
# data; and on-policy, which goes on from the online student. All have the quickstart's 200 steps, but for the last, whose
# 100 more stand beside 100 more on the data. Every 25 steps are evaluated, with the exact KL to the teacher.
# A seed that is finished is left alone.
set -euo pipefail
cd "$(dirname "$0")/../.."
seeds=("$@")
[ $# -gt 0 ] || seeds=(1 2 3)
python=${PYTHON:-python3}
here=examples/kd_vs_sft
quickstart=runs/quickstart
config=examples/quickstart/student.yaml
kept=(checkpoint.every_steps=25 checkpoint.keep_last=8 eval.every_steps=10)
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
step() { echo "+ $*" >&2; "$@"; }
on_2_ranks() { step "$python" -m torch.distributed.run --standalone --nproc-per-node 2 -m megakd "$@"; }
# Words and seconds of a preparation that a way of training needs, launch included.
prepare() {
  local name=$1 began
  shift
  began=$(date +%s.%N)
  on_2_ranks "$@"
  echo "$name $(date +%s.%N) $began" | awk '{printf "{\"name\": \"%s\", \"seconds\": %.1f}\n", $1, $2 - $3}' >>"$out/prepared.jsonl"
}

if [ ! -f $quickstart/teacher/stopped.json ]; then
  echo "there is no $quickstart/teacher: run \`make quickstart\` first" >&2
  exit 1
fi

for seed in "${seeds[@]}"; do
  out=runs/kd_vs_sft/seed$seed
  [ ! -f "$out/finished" ] || continue
  rm -rf "$out"
  mkdir -p "$out"
  say "Seed $seed: the data alone, and online"
  on_2_ranks train $config run.seed="$seed" run.dir="$out/data" teacher=null "${kept[@]}"
  on_2_ranks train $config run.seed="$seed" run.dir="$out/online" "${kept[@]}"

  say "Seed $seed: from a recording"
  prepare recorded cache $config parallel.tp=1 run.seed="$seed" teacher.cache="$out/cache" cache.codec=q8 cache.shard_samples=512
  on_2_ranks train $config run.seed="$seed" run.dir="$out/recorded" teacher.cache="$out/cache" "${kept[@]}"

  say "Seed $seed: on what the teacher wrote, then on the data"
  step "$python" examples/sequence_level/prompts.py $quickstart/data/train.jsonl "$out/prompts.jsonl" 1000
  prepare sequence_level generate --checkpoint $quickstart/teacher --input "$out/prompts.jsonl" \
    --output "$out/completions.jsonl" --temperature 1 --max-new-tokens 64 --batch-size 64 --seed "$seed" --device cpu
  on_2_ranks train $config run.seed="$seed" run.dir="$out/from_teacher" teacher=null train.steps=100 \
    data.train="$out/completions.jsonl" data.workers=1 "${kept[@]}"
  on_2_ranks train $config run.seed="$seed" run.dir="$out/then_data" teacher=null train.steps=100 \
    student.model=null student.checkpoint="$out/from_teacher" "${kept[@]}"

  say "Seed $seed: 100 more steps on-policy, and 100 on the data"
  examples/on_policy/run.sh "$seed" "$out/online" "$out/more"

  say "Seed $seed: everything that was kept, against the teacher on held-out files"
  models=()
  for run in data online recorded from_teacher then_data more/on_policy more/off_policy; do
    for checkpoint in "$out/$run"/checkpoints/step_*; do models+=(--model "$checkpoint"); done
  done
  on_2_ranks evaluate $config --json "${models[@]}" >"$out/figures.jsonl"
  touch "$out/finished"
done

say "Result"
step "$python" $here/report.py runs/kd_vs_sft
