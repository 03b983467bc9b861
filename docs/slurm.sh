#!/bin/bash
# Train on several nodes under SLURM, and go on after preemption or the time limit:
#     sbatch docs/slurm.sh recipes/vit-b-32-manual.yaml
# The recipe's `output` must be on a disk that all nodes share; `data` is read on every node.
#SBATCH --job-name=tinyclip
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

# A job that SLURM has started again goes on with its run. A new job for an old run is told so with --resume; one that
# was stopped before its run began says that there is none, and is submitted again.
resume=
[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && resume=--resume

# 300 s before the end SLURM sends SIGTERM here; passed on, it makes the run save itself and stop.
job= stopped=
trap 'stopped=yes; [ -z "$job" ] || kill -TERM "$job"' TERM

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" --shutdown-timeout 240 \
    -m tinyclip distill "$@" $resume &
job=$!
[ -z "$stopped" ] || kill -TERM "$job" # it came before there was a job
wait "$job"
code=$?
if [ -n "$stopped" ]; then
    wait "$job"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
