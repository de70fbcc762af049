# shellcheck shell=bash
# From a teacher and a student to a distilled student: sourced by run.sh of an example. See its README.md.
set -euo pipefail
: "${here:?the folder of the example}" "${tiny_models:?what make_tiny.py is to make}"
: "${format:?of what is given and of what comes out: hf or nemo}"  # and tiny=(...): what makes kd.yaml small

mode=real recorded=
for word in "$@"; do
  case $word in
    --tiny) mode=tiny ;;
    --cached) recorded=yes ;;
    --print) print=yes ;;
    *) echo "unknown: $word; expected --tiny, --cached, --print" >&2; exit 2 ;;
  esac
done
python=${PYTHON:-python3}

say() { printf '\n%s\n' "$*"; }
step() {
  printf '+'
  printf ' %q' "$@"
  echo
  [ -n "${print:-}" ] || "$@"
}
megakd() { step "$python" -m megakd "$@"; }
on_ranks() { step "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" -m megakd "$@"; }

suffix=
[ "$format" = hf ] || suffix=.$format
if [ "$mode" = tiny ]; then
  work=${WORK:-runs/$(basename "$here")_tiny} ranks=2 size=(--nodes 1 --gpus-per-node 2 --gpu-memory 1GB)
  export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
  say "0. Stand-ins for a download: two tiny models of these architectures, and a little data"
  step "$python" "$(dirname "$here")/full_path/make_tiny.py" "$tiny_models" "$work"
  if [ "$format" = nemo ]; then
    for model in teacher student; do
      megakd convert --from "$work/hf/$model" --to "$work/$model.nemo" --format nemo --no-verify
    done
    from=$work
  else
    from=$work/hf
  fi
  TEACHER=$from/teacher$suffix STUDENT=$from/student$suffix DATA=$work
else
  : "${TEACHER:?the large model: a Hugging Face folder or a .nemo file}" "${STUDENT:?the small one}"
  : "${DATA:?a folder with train.jsonl and validation.jsonl}" "${WORK:?a folder on a disk that has room}"
  work=$WORK ranks=${GPUS:-8} size=(--gpus-per-node "${GPUS:-8}" --gpu "${GPU:-h100}") tiny=()
fi
config=(
  "$here/kd.yaml" run.dir="$work/run" teacher.checkpoint="$work/teacher" student.checkpoint="$work/student"
  data.train="$DATA/train.jsonl" data.validation="$DATA/validation.jsonl" "${tiny[@]}"
)

say "1. Both models as megakd's checkpoints, judged by their logits"
megakd convert --from "$TEACHER" --to "$work/teacher"
megakd convert --from "$STUDENT" --to "$work/student"

if [ -n "$recorded" ]; then
  say "2. The teacher recorded, once for all runs"
  on_ranks cache "${config[@]}" teacher.cache="$work/cache"
  config+=(teacher.cache="$work/cache")
fi

say "3. Does it fit?"
megakd check "${config[@]}" "${size[@]}"

say "4. Distil; at its end the student is exported (export.format in kd.yaml)"
on_ranks train "${config[@]}"

say "5. The student before and after, on held-out data"
on_ranks evaluate "${config[@]}" teacher.cache=null --model "$work/student" --model "$work/run"
