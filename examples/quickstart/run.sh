#!/usr/bin/env bash
# The whole of megakd in a few minutes on a laptop CPU, without a download:
#     examples/quickstart/run.sh [SEED]          (or: make quickstart SEED=1)
# A tokenizer and a teacher are trained on Python's own standard library; a student is distilled from the teacher with
# both split over 2 ranks, and once more from a recording of the teacher; the same student learns from the data alone; a
# table and a picture compare them.
set -euo pipefail
cd "$(dirname "$0")/../.."
seed=${1:-1}
python=${PYTHON:-python3}
here=examples/quickstart
out=runs/quickstart
data=$out/data
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
started=$SECONDS

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
step() { echo "+ $*" >&2; "$@"; }
megakd() { step "$python" -m megakd "$@"; }
on_2_ranks() { step "$python" -m torch.distributed.run --standalone --nproc-per-node 2 -m megakd "$@"; }

rm -rf "$out/teacher" "$out/student_kd" "$out/student_recorded" "$out/student_ce" "$out/cache"

say "1. Data: a corpus, a tokenizer of 2,048 pieces, token files"
step "$python" $here/corpus.py $data
megakd prepare tokenizer --input $data/train.jsonl --output $data/tokenizer.model --vocab-size 2048 --max-bytes 3000000
megakd prepare text --input $data/train.jsonl --tokenizer $data/tokenizer.model --output $data/train
megakd prepare text --input $data/validation.jsonl --tokenizer $data/tokenizer.model --output $data/validation

say "2. The teacher, data parallel over 2 ranks"
on_2_ranks train $here/teacher.yaml run.seed="$seed"

say "3. The student distilled from it: both tensor parallel over 2 ranks (the teacher is resharded as it loads)"
on_2_ranks train $here/student.yaml run.seed="$seed"

say "4. The same from a recording: what the teacher says is written down once, and the teacher does not run"
recording=$SECONDS
on_2_ranks cache $here/student.yaml parallel.tp=1 run.seed="$seed" teacher.cache=$out/cache cache.codec=q8
echo $((SECONDS - recording)) >$out/recording_seconds
on_2_ranks train $here/student.yaml run.seed="$seed" run.dir=$out/student_recorded teacher.cache=$out/cache

say "5. The same student, seed and batches, from the data alone"
on_2_ranks train $here/student.yaml run.seed="$seed" run.dir=$out/student_ce teacher=null

say "6. All against the teacher on held-out files (K = the whole vocabulary: the exact KL)"
for student in student_kd student_recorded student_ce; do
  on_2_ranks evaluate $here/student.yaml run.dir=$out/$student loss.top_k=2048
done

say "7. One prompt, greedily"
prompt=$'def __init__(self, name):\n    '
for model in teacher student_kd student_recorded student_ce; do
  megakd generate --checkpoint $out/$model --prompt "$prompt" --max-new-tokens 48 --device cpu >$out/$model/completion.txt
done

say "8. Result (seed $seed)"
step "$python" $here/report.py $out
echo "all of it took $((SECONDS - started)) s"
