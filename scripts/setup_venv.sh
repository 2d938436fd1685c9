#!/bin/sh
# Makes or updates .venv with everything the project needs. Does nothing when it is up to date.
#
# Needs python3 (3.11 or newer; $PYTHON chooses another) and, for most packages, a network or a local package index.
# Several calls at once wait for each other (where flock exists).
set -eu

cd "$(dirname -- "$0")/.."
python=${PYTHON:-python3}
venv=.venv
log=.build/setup.log

fail() {
    printf 'error: %s\n  fix: %s\n' "$1" "$2" >&2
    exit 1
}

command -v "$python" >/dev/null 2>&1 || fail "$python is not installed" "install Python 3.11 or newer, or set PYTHON"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "$python does not start" "set PYTHON"
case $version in
    2.* | 3.? | 3.10) fail "$python is Python $version" "install Python 3.11 or newer, or set PYTHON to one" ;;
esac

mkdir -p .build
if [ "${SETUP_LOCKED:-}" != 1 ] && command -v flock >/dev/null 2>&1; then
    SETUP_LOCKED=1 exec flock .build/setup.lock sh "scripts/$(basename -- "$0")"
fi

# The stamp holds what decides the content of the environment; it is written last, so a broken set-up starts again.
wanted="$version $(cksum <pyproject.toml) $(cksum <scripts/setup_venv.sh) $PWD"
stamp=$venv/.set-up
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && [ -x "$venv/bin/python" ]; then
    exit 0
fi

# Runs one step quietly; shows the end of its output if it fails. Usage: step TITLE COMMAND...
step_number=0
: >"$log"
step() {
    title=$1
    shift
    step_number=$((step_number + 1))
    printf 'set-up %d/6: %s\n' "$step_number" "$title"
    printf '\n== %s: %s\n' "$title" "$*" >>"$log"
    if ! "$@" >>"$log" 2>&1; then
        tail -n 20 "$log" | sed 's/^/    /' >&2
        fail "the step '$title' failed" "see the lines above (all of them: $log), then run the same command again"
    fi
}

# --no-compile: pip would compile one file after the other; all of them are compiled at the end, on every core.
pip() {
    "$venv/bin/python" -m pip --disable-pip-version-check --no-input install --quiet --no-compile "$@"
}

# A CPU build of torch where one can be had: the plain package brings several GB of CUDA libraries.
install_torch() {
    if nvidia-smi -L >/dev/null 2>&1; then
        pip 'torch>=2.11,<2.14'
    else
        pip 'torch==2.13.0+cpu' || pip 'torch==2.13.0'
    fi
}

# From here on the installed torch stays: a second one would cost GBs and the ops compiled against the first.
keep_torch() {
    "$venv/bin/python" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' >.build/constraints.txt
}

install_project() {
    if nvidia-smi -L >/dev/null 2>&1; then
        pip -c .build/constraints.txt --no-build-isolation -e '.[dev,gpu]'
    else
        pip -c .build/constraints.txt --no-build-isolation -e '.[dev]'
    fi
}

# Where bytecode is not written (PYTHONDONTWRITEBYTECODE, usual in containers), each process would compile what it
# imports: that more than doubles the start of each rank. Packages may carry files that are no Python; those stay.
compile_packages() {
    env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -m compileall -q -j 0 "$venv/lib" || true
}

if [ -d "$venv" ] && ! "$venv/bin/python" -c '' >/dev/null 2>&1; then
    rm -rf "$venv" # the Python it was made with is gone
fi
step "virtual environment in $venv (Python $version)" "$python" -m venv "$venv"
step "torch, the largest download" install_torch
keep_torch
step "build tools" pip -c .build/constraints.txt 'setuptools>=77' wheel ninja py-cpuinfo numpy
step "deepspeed" pip -c .build/constraints.txt --no-build-isolation 'deepspeed>=0.19.8'
step "sft_dist and the rest" install_project
step "bytecode" compile_packages
printf '%s' "$wanted" >"$stamp"
echo "set-up: done, $("$venv/bin/python" -c 'import importlib.metadata as m; print("torch", m.version("torch"), "- deepspeed", m.version("deepspeed"))')"
