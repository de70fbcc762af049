#!/usr/bin/env bash
# Llama 3.1 70B into 8B, from two Hugging Face folders to a third, on one node of 8 GPUs:
#     TEACHER=/models/Llama-3.1-70B STUDENT=/models/Llama-3.1-8B DATA=/data WORK=/scratch/kd examples/llama3_70b_to_8b/run.sh
#     examples/llama3_70b_to_8b/run.sh --tiny        # the same steps with tiny models, on a CPU
# --cached records the teacher first and trains from the recording; --print says what would be run.
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck disable=SC2034  # steps.sh reads them
tiny_models=llama format=hf
# shellcheck disable=SC2034
tiny=(
  run.device=cpu parallel.tp=2 loss.top_k=32 teacher.allow_weak=true data.sequence_length=64 data.workers=1
  train.epochs=null train.steps=4 train.global_batch_size=8 train.micro_batch_size=4 train.precision=fp32
  schedule.warmup_steps=1 eval.every_steps=null eval.samples=8 checkpoint.every_steps=null log.progress=false
)
# shellcheck source=../full_path/steps.sh
. "$here/../full_path/steps.sh"
