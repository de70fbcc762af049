#!/usr/bin/env bash
# Record the quickstart's teacher once, then distil from disk (run `make quickstart` first):
#     examples/cached_distillation/run.sh [CODEC]          fp32, fp16 or q8 (default)
# The teacher is recorded data parallel over 2 ranks, the student reads the cache tensor parallel over 2 ranks; the same
# student distilled online, from the same seed and batches, stands beside it.
set -euo pipefail
cd "$(dirname "$0")/../.."
codec=${1:-q8}
python=${PYTHON:-python3}
quickstart=runs/quickstart
out=runs/cached_distillation
config=examples/quickstart/student.yaml
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
step() { echo "+ $*" >&2; "$@"; }
megakd() { step "$python" -m megakd "$@"; }
on_2_ranks() { step "$python" -m torch.distributed.run --standalone --nproc-per-node 2 -m megakd "$@"; }

if [ ! -f $quickstart/teacher/stopped.json ]; then
  echo "there is no $quickstart/teacher: run \`make quickstart\` first" >&2
  exit 1
fi
rm -rf $out

say "1. Record: what the teacher says about every sample that the student will read (codec $codec)"
on_2_ranks cache $config parallel.tp=1 teacher.cache=$out/cache cache.codec="$codec" cache.shard_samples=512

say "2. What was recorded"
megakd cache stat $out/cache --plot $out/mass.png
megakd cache verify $out/cache

say "3. The student from the cache; the teacher does not run"
on_2_ranks train $config run.dir=$out/cached teacher.cache=$out/cache

say "4. The same student online"
on_2_ranks train $config run.dir=$out/online

say "5. Both against the live teacher on held-out files (K = the whole vocabulary: the exact KL)"
for run in online cached; do
  on_2_ranks evaluate $config run.dir=$out/$run loss.top_k=2048
done

say "6. Result"
step "$python" examples/cached_distillation/report.py $out
