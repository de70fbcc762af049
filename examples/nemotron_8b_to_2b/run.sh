#!/usr/bin/env bash
# Nemotron-3 8B into GPT-2B-001, from two .nemo archives to a third, on one node of 8 GPUs:
#     TEACHER=/models/Nemotron-3-8B.nemo STUDENT=/models/GPT-2B-001.nemo DATA=/data WORK=/scratch/kd examples/nemotron_8b_to_2b/run.sh
#     examples/nemotron_8b_to_2b/run.sh --tiny        # the same steps with tiny models, on a CPU
# --cached records the teacher first and trains from the recording; --print says what would be run.
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck disable=SC2034  # steps.sh reads them
tiny_models=nemotron format=nemo
# shellcheck disable=SC2034
tiny=(
  run.device=cpu parallel.tp=2 loss.top_k=32 teacher.allow_weak=true data.sequence_length=64 data.workers=1
  train.epochs=null train.steps=4 train.global_batch_size=8 train.micro_batch_size=4 train.precision=fp32
  schedule.warmup_steps=1 eval.every_steps=null eval.samples=8 checkpoint.every_steps=null log.progress=false
)
# shellcheck source=../full_path/steps.sh
. "$here/../full_path/steps.sh"
