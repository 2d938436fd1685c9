#!/bin/sh
# Trains with torchrun: one process for each GPU of this machine, or one without any.
#
#   launch/torchrun.sh train CONFIG [--resume auto|PATH|never] [KEY.PATH=VALUE ...]
#   launch/torchrun.sh --nproc-per-node 2 train CONFIG
#   launch/torchrun.sh --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29400 train CONFIG   # on both nodes
#
# Takes every option of torchrun before the command; `--help` lists them. Works from any directory: paths count from
# the current one.
set -eu
# shellcheck source=launch/python.sh
. "$(dirname -- "$0")/python.sh"
run_module sft_dist.launch torchrun "$@"
