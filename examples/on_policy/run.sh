#!/usr/bin/env bash
# On-policy distillation (run `make quickstart` first):
#     examples/on_policy/run.sh [SEED [STUDENT [OUT]]]
# A distilled student (the quickstart's) goes on for 100 steps twice, with the reverse KL both times: on what it writes
# itself behind prompts of the training texts, and on these texts themselves, 1,024 supervised tokens a step. Then each
# completes prompts of held-out texts, and the exact KL to the teacher is taken where it went, and on the held-out texts.
set -euo pipefail
cd "$(dirname "$0")/../.."
quickstart=runs/quickstart
seed=${1:-1}
student=${2:-$quickstart/student_kd}
out=${3:-runs/on_policy/seed$seed}
python=${PYTHON:-python3}
here=examples/on_policy
config=$here/student.yaml
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
step() { echo "+ $*" >&2; "$@"; }
on_2_ranks() { step "$python" -m torch.distributed.run --standalone --nproc-per-node 2 -m megakd "$@"; }

if [ ! -f "$student/stopped.json" ]; then
  echo "there is no trained $student: run \`make quickstart\` first" >&2
  exit 1
fi
rm -rf "$out"
mkdir -p "$out"

say "1. Prompts: beginnings of lines of the training texts, and of held-out ones"
step "$python" examples/sequence_level/prompts.py $quickstart/data/train.jsonl "$out/prompts.jsonl" 2000
step "$python" examples/sequence_level/prompts.py $quickstart/data/validation.jsonl "$out/held_out_prompts.jsonl" 250

say "2. On-policy: the student writes, the teacher scores, the student learns"
on_2_ranks train $config run.seed="$seed" run.dir="$out/on_policy" student.checkpoint="$student" \
  rollouts.prompts="$out/prompts.jsonl" eval.generate.prompts="$out/held_out_prompts.jsonl"

say "3. Off-policy: the same student, loss, steps and tokens, on the data"
on_2_ranks train $config run.seed="$seed" run.dir="$out/off_policy" student.checkpoint="$student" rollouts=null \
  eval.generate.prompts="$out/held_out_prompts.jsonl" data.train=$quickstart/data/train \
  train.micro_batch_size=4 train.global_batch_size=8

say "4. All three complete held-out prompts, and are compared with the teacher there, and on held-out texts (exact KL)"
for run in before on_policy off_policy; do
  checkpoint=$out/$run
  [ $run = before ] && checkpoint=$student
  on_2_ranks generate --checkpoint "$checkpoint" --input "$out/held_out_prompts.jsonl" \
    --output "$out/$run.completions.jsonl" --temperature 1 --max-new-tokens 64 --batch-size 64 --device cpu
  for texts in "$out/$run.completions.jsonl" $quickstart/data/validation; do
    on_2_ranks evaluate $config --json --model "$checkpoint" rollouts=null data.train=$quickstart/data/train \
      data.validation="$texts" data.workers=1 eval.samples=250 train.micro_batch_size=4 train.global_batch_size=8 \
      >>"$out/$run.figures.jsonl"
  done
done

say "5. Result (seed $seed)"
step "$python" $here/report.py "$out"
