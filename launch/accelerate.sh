#!/bin/sh
# Trains with Accelerate's launcher: one process for each GPU of this machine, or one without any.
#
#   launch/accelerate.sh train CONFIG [--resume auto|PATH|never] [KEY.PATH=VALUE ...]
#   launch/accelerate.sh --config_file FILE.yaml train CONFIG
#   launch/accelerate.sh --use_fsdp --fsdp_version 2 --num_processes 2 train CONFIG
#
# Takes every option of `accelerate launch` before the command; `--help` lists them. Works from any directory: paths
# count from the current one.
set -eu
# shellcheck source=launch/python.sh
. "$(dirname -- "$0")/python.sh"
run_module sft_dist.launch accelerate "$@"
