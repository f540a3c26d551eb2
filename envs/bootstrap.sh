#!/usr/bin/env bash
# Make .venv what envs/requirements.lock says, with this checkout's package installed in it. Safe to kill and run again: an
# environment that was not finished is made anew, a finished one of an older lock is brought up to date.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
started=$venv/.bootstrap-started
stamp=$venv/.bootstrap-done
# The editable install points into this folder, so a moved checkout needs it again.
wanted="$(cat envs/requirements.lock pyproject.toml | sha256sum | cut -d' ' -f1) $PWD"

fail() {
    echo "bootstrap: $1" >&2
    exit 1
}

finished() {
    [ -x $venv/bin/python ] && [ ! -e $started ] && [ "$(cat $stamp 2>/dev/null)" = "$wanted" ]
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 to 3.13 found; install one, or name it: make PYTHON=/path/to/python"
}

finished && exit 0
command -v flock >/dev/null || fail "flock not found; install util-linux"
exec 9<envs/requirements.lock
flock -n 9 || { echo "bootstrap: waiting for another one in this folder ..." >&2; flock 9; }
finished && exit 0

if [ -e $started ]; then
    echo "bootstrap: the last one was interrupted, starting anew"
    find $venv -mindepth 1 -not -path $started -delete # the mark goes last, in case this is interrupted too
fi
mkdir -p $venv
touch $started
if [ ! -x $venv/bin/python ] || ! $venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "bootstrap: making .venv with $("$python" --version)"
    "$python" -m venv $venv || fail "$python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"
fi
echo "bootstrap: installing envs/requirements.lock (PyTorch is large: minutes, by network)"
$venv/bin/python -m pip install --quiet --disable-pip-version-check -r envs/requirements.lock ||
    fail "pip could not install envs/requirements.lock; what it said is above"
$venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e . ||
    fail "pip could not install this package; what it said is above"
echo "$wanted" >$stamp
rm $started
echo "bootstrap: done"
