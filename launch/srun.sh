#!/bin/sh
# Trains without a launcher: every task that srun starts is one process of the training, one for each GPU.
#
#   srun --ntasks-per-node=8 launch/srun.sh train CONFIG [--resume auto|PATH|never] [KEY.PATH=VALUE ...]
#
# In a job of SLURM, on one node or on several. Works from any directory: paths count from the current one.
set -eu
# shellcheck source=launch/python.sh
. "$(dirname -- "$0")/python.sh"
run_module sft_dist.launch srun "$@"
