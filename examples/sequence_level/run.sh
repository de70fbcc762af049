#!/usr/bin/env bash
# Sequence-level distillation: the teacher writes, the student learns what it wrote (run `make quickstart` first):
#     examples/sequence_level/run.sh [PROMPTS]             1,000 by default
# The quickstart's teacher completes prompts cut from the training texts, two copies of it side by side; a student learns
# from those token ids alone, and then, from its newest checkpoint, from the data. The quickstart's student that learnt
# from the data alone, for as many steps, stands beside them.
set -euo pipefail
cd "$(dirname "$0")/../.."
prompts=${1:-1000}
python=${PYTHON:-python3}
here=examples/sequence_level
quickstart=runs/quickstart
out=runs/sequence_level
config=examples/quickstart/student.yaml
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
step() { echo "+ $*" >&2; "$@"; }
on_2_ranks() { step "$python" -m torch.distributed.run --standalone --nproc-per-node 2 -m megakd "$@"; }

if [ ! -f $quickstart/student_ce/stopped.json ]; then
  echo "there is no $quickstart/student_ce: run \`make quickstart\` first" >&2
  exit 1
fi
rm -rf $out
mkdir -p $out

say "1. Prompts: beginnings of lines of the training texts"
step "$python" $here/prompts.py $quickstart/data/train.jsonl $out/prompts.jsonl "$prompts"

say "2. The teacher writes (killed here, the same command would go on)"
on_2_ranks generate --checkpoint $quickstart/teacher --input $out/prompts.jsonl --output $out/completions.jsonl \
  --temperature 1 --max-new-tokens 64 --batch-size 64 --device cpu
head -c 600 $out/completions.jsonl
echo

say "3. The student learns what the teacher wrote: its ids as they are"
on_2_ranks train $config run.dir=$out/from_teacher teacher=null data.train=$out/completions.jsonl \
  train.steps=100 data.workers=1

say "4. From its newest checkpoint it learns from the data"
on_2_ranks train $config run.dir=$out/then_data teacher=null student.model=null \
  student.checkpoint=$out/from_teacher train.steps=100

say "5. All against the teacher on held-out files (K = the whole vocabulary: the exact KL)"
on_2_ranks evaluate $config run.dir=$quickstart/student_ce loss.top_k=2048
for run in from_teacher then_data; do
  on_2_ranks evaluate $config run.dir=$out/$run loss.top_k=2048
done

say "6. Result"
step "$python" $here/report.py $quickstart/student_ce $out/from_teacher $out/then_data
