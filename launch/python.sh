# Read by the other scripts of this folder: finds Python and runs a module of this checkout with it.
# Takes the active environment's python, else the .venv of this checkout, else python3.
# shellcheck shell=sh

# run_module MODULE [ARGUMENT ...]: in place of the shell, so that signals reach the launcher itself.
run_module() {
    root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        python=python
    elif [ -x "$root/.venv/bin/python" ]; then
        python=$root/.venv/bin/python
    else
        python=python3
    fi
    if ! command -v "$python" > /dev/null; then
        echo "error: launch/${0##*/}: there is no program $python" >&2
        echo "  fix: activate the environment that sft_dist is installed in" >&2
        exit 2
    fi
    # The checkout's own code, installed or not.
    PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
    export PYTHONPATH
    exec "$python" -m "$@"
}
