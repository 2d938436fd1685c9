#!/bin/sh
# Trains with DeepSpeed's launcher: one process for each GPU of this machine, or one without any.
#
#   launch/deepspeed.sh train CONFIG [--resume auto|PATH|never] [KEY.PATH=VALUE ...]
#   launch/deepspeed.sh --num_gpus 2 train CONFIG                       # without GPUs too: 2 processes
#   launch/deepspeed.sh --hostfile FILE train CONFIG                    # all machines of the file, over ssh
#
# Takes every option of `deepspeed` before the command; `--help` lists them. Works from any directory: paths count from
# the current one.
set -eu
# shellcheck source=launch/python.sh
. "$(dirname -- "$0")/python.sh"
run_module sft_dist.launch deepspeed "$@"
