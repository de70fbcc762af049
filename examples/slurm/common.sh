# shellcheck shell=bash
# What the job scripts of this folder share; each sources it. Nothing here names a site: see README.md for the variables.
set -euo pipefail
: "${SLURM_JOB_ID:?submit it: sbatch ... $0}"

PYTHON=${PYTHON:-python3}          # in the image, or of an environment that all nodes see
SAVE_SECONDS=${SAVE_SECONDS:-240}  # what a step and its checkpoint take at most; below the lead of --signal
MAX_REQUEUES=${MAX_REQUEUES:-20}   # of this job by itself, so that one that gets nowhere ends

# With IMAGE set, every step runs in a container (pyxis); without, the same command runs on the node.
container=()
if [ -n "${IMAGE:-}" ]; then
  container=(
    --container-image="$IMAGE"              # registry#name:tag, or a .sqsh file
    --container-mounts="${MOUNTS:?with IMAGE: MOUNTS=/data:/data,/runs:/runs, writable where the run writes}"
    --container-workdir="${WORKDIR:-$PWD}"
    --no-container-mount-home               # nothing of a home directory leaks into the job
    # What is exported below: else the image's own values win over this job's.
    --container-env="XDG_CACHE_HOME,HF_HOME,TRITON_CACHE_DIR,OMP_NUM_THREADS,NCCL_DEBUG,CUDA_DEVICE_MAX_CONNECTIONS"
  )
fi

# A file system for caches that a container may write to: its own root is read-only. On the node's disk or in memory.
export XDG_CACHE_HOME=${XDG_CACHE_HOME:-/tmp/megakd-cache-$SLURM_JOB_ID}
export HF_HOME=${HF_HOME:-$XDG_CACHE_HOME/huggingface}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$XDG_CACHE_HOME/triton}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}      # of each rank; torchrun would say 1
export PYTHONUNBUFFERED=1                         # lines of the log when they are written
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}             # NCCL names what it cannot reach
# Tensor parallel communication is overlapped only so; megakd sets it too, and images may say otherwise.
export CUDA_DEVICE_MAX_CONNECTIONS=1

read -ra more <<< "${SRUN_MORE:-}"                 # what else a site wants, such as --mpi=pmix
common_arguments=(
  --kill-on-bad-exit=1                            # one node's end is the end of all
  --label                                         # lines of the log say which node
  ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"}  # sbatch's is not srun's
  "${more[@]}"
)

# tool VERB ARGUMENTS...: one process, until it is done. It takes no checkpoint and loses nothing when it is killed: what
# it makes gets its name when it is whole.
tool() { exec srun --ntasks=1 "${common_arguments[@]}" "${container[@]}" "$PYTHON" -m megakd "$@"; }

# start VERB ARGUMENTS...: the ranks of `megakd VERB`, as step 0 of the job, in the background.
# --ntasks-per-node=1: one torchrun on each node starts the ranks there. More: every task is a rank.
start() {
  local ranks=(-m megakd "$@")
  if [ "${SLURM_NTASKS_PER_NODE:-1}" = 1 ]; then
    local head
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    ranks=(
      -m torch.distributed.run
      --nnodes="$SLURM_JOB_NUM_NODES"
      --nproc-per-node="${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:?--gpus-per-node, or RANKS_PER_NODE}}"
      --max-restarts=0                            # a job that failed is started again by Slurm, whole
      --shutdown-timeout="$SAVE_SECONDS"          # torchrun's own 30 s may be less than a checkpoint takes
      --rdzv-backend=c10d
      --rdzv-endpoint="$head:$((29500 + SLURM_JOB_ID % 1000))"
      --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
      "${ranks[@]}"
    )
  fi
  # srun starts Python itself, with no shell in between: a signal of Slurm reaches the task alone, and a shell would die
  # of it and take the ranks along before they have written anything.
  srun "${common_arguments[@]}" "${container[@]}" "$PYTHON" "${ranks[@]}" &
  srun_pid=$!
}

cancelled=0 asked=0
# Time is nearly up: the ranks stop after this step and write a checkpoint. Signals go to step 0 by scancel: srun itself
# answers a SIGTERM by killing its tasks at once.
trap 'asked=1; scancel --signal=TERM "$SLURM_JOB_ID.0" || true' USR1
trap 'cancelled=1' TERM  # scancel, or a requeue that somebody else decided on: the ranks were told as well

# Whether there is more to do. Exit codes do not tell: torchrun's is 1 after every signal.
if_stopped() { grep -qs '"finished": false' "$1/stopped.json"; }  # rank 0 writes it when all else is on the disk
unless_there() { [ "$asked" = 1 ] && [ ! -e "$1" ]; }              # of a file that gets its name when it is whole
never() { false; }

# finish WHEN [PATH]: wait for the ranks; requeue the job if WHEN PATH says so.
finish() {
  local code=0
  while true; do
    wait "$srun_pid" && code=0 || code=$?
    kill -0 "$srun_pid" 2> /dev/null || break  # a signal of ours ends `wait`, too
  done
  if [ "$cancelled" = 0 ] && "$@"; then
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_REQUEUES" ]; then
      echo "stopped, and not requeued: $SLURM_RESTART_COUNT times is MAX_REQUEUES" >&2
    elif scontrol requeue "$SLURM_JOB_ID"; then
      sleep 300  # until Slurm ends this script
    fi
  fi
  exit "$code"
}
