#!/usr/bin/env bash
# Hugging Face in, Hugging Face out: a Llama-shaped teacher and a smaller student, as transformers saves them, are
# distilled over 2 tensor parallel ranks; the student goes back into a folder that transformers loads. On a laptop CPU:
#     examples/hf_distillation/run.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
here=examples/hf_distillation
out=runs/hf_distillation
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
started=$SECONDS

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
step() { echo "+ $*" >&2; "$@"; }

rm -rf $out

say "1. Stand-ins for a download: a corpus, a tokenizer, a teacher that was trained on it, a student that was not"
step "$python" examples/quickstart/corpus.py $out/data
step "$python" $here/make_models.py $out/data/train.jsonl $out/models

say "2. Token files, with the models' own tokenizer"
for split in train validation; do
  step "$python" -m megakd prepare text --input $out/data/$split.jsonl --tokenizer $out/models/teacher/tokenizer.json \
    --output $out/data/$split
done

say "3. Distil; both folders are converted and verified when the run opens them"
step "$python" -m torch.distributed.run --standalone --nproc-per-node 2 -m megakd train $here/student.yaml

say "4. Back to Hugging Face, verified at the layout it was trained with"
step "$python" -m megakd convert --from $out/run --to $out/exported --tp 2

say "5. transformers alone"
prompt='def __init__(self,'
for model in models/teacher models/student exported; do
  step "$python" $here/complete.py $out/$model "$prompt"
done
echo "all of it took $((SECONDS - started)) s"
