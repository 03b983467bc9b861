#!/bin/sh
# Train on every GPU of this machine, a process each:
#     sh docs/torchrun.sh distill recipes/vit-b-32-manual.yaml
# PROCESSES says how many instead; without GPUs it must be given. What torchrun waits for after a Ctrl-C or SIGTERM
# must cover a step and a checkpoint.
exec torchrun --standalone --nproc-per-node "${PROCESSES:-gpu}" --shutdown-timeout 300 -m tinyclip "$@"
