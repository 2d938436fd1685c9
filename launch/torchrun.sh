#!/bin/sh
# Trains with torchrun: one process for each GPU of this machine, or one without any.
#
#   launch/torchrun.sh train CONFIG [KEY.PATH=VALUE ...]
#   launch/torchrun.sh --nproc-per-node 2 train CONFIG
#   launch/torchrun.sh --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29400 train CONFIG   # on both nodes
#
# Takes every option of torchrun before the command; `--help` lists them. Works from any directory: paths count from
# the current one. Uses the active environment's python, else the .venv of this checkout, else python3.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    python=python
elif [ -x "$root/.venv/bin/python" ]; then
    python=$root/.venv/bin/python
else
    python=python3
fi

# The checkout's own code, installed or not.
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH

if [ $# -eq 0 ]; then
    set -- --help
fi
exec "$python" -m sft_dist.runtime.torchrun "$@"
