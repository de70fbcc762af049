#!/bin/bash
# Everything from two Hugging Face folders to a distilled one, as a chain of jobs; each starts when the one before it has
# ended well. Run it on a login node, in this folder:
#
#     TEACHER=/models/teacher STUDENT=/models/student CONFIG=kd.yaml WORK=/scratch/kd ./pipeline.sh
#
# CONFIG needs no checkpoints and no cache: they are given here. Sizes of the jobs: NODES of the training, PARTS of the
# recording. SBATCH_ACCOUNT, SBATCH_PARTITION, IMAGE and MOUNTS are read from the environment by every job.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

: "${TEACHER:?a Hugging Face folder, or a .nemo file}" "${STUDENT:?the same of the student}"
: "${CONFIG:?the YAML of the run}" "${WORK:?a folder on a disk that all nodes see}"
NODES=${NODES:-1} PARTS=${PARTS:-4} HERE=$PWD
CACHE=$WORK/cache RUN_DIR=$WORK/run
export CONFIG CACHE PARTS RUN_DIR HERE
mkdir -p "$WORK/logs"

# submit NAME AFTER ARGUMENTS...: prints the job's number. AFTER: job numbers, or nothing.
submit() {
  local name=$1 after=$2
  shift 2
  sbatch --parsable --job-name="megakd-$name" --output="$WORK/logs/%x-%j.log" \
    ${after:+--dependency="afterok:$after" --kill-on-invalid-dep=yes} "$@"
}

teacher=$(submit teacher "" convert.sbatch --from "$TEACHER" --to "$WORK/teacher")
student=$(submit student "" convert.sbatch --from "$STUDENT" --to "$WORK/student")
models=(teacher.checkpoint="$WORK/teacher" student.checkpoint="$WORK/student")
cache=$(submit cache "$teacher:$student" --array="0-$((PARTS - 1))" cache.sbatch "${models[@]}")
merge=$(submit merge "$cache" merge.sbatch)
train=$(submit train "$merge" --nodes="$NODES" train.sbatch "${models[@]}" teacher.cache="$CACHE")
evaluate=$(submit evaluate "$train" evaluate.sbatch "${models[@]}" teacher.cache=null)
export_=$(submit export "$train" convert.sbatch --from "$RUN_DIR" --to "$WORK/distilled")
printf '%s %s\n' teacher "$teacher" student "$student" cache "$cache" merge "$merge" train "$train" \
  evaluate "$evaluate" export "$export_"
