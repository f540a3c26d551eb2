#!/usr/bin/env bash
# Resolve requirements.in in a fresh environment and write the closure to requirements.lock.
set -euo pipefail
cd "$(dirname "$0")"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.in
{
    echo '# The default environment: the pinned closure of requirements.in, for Linux and Python 3.11 to 3.13. Made by `make lock`.'
    echo '# No local versions, no hashes and nothing that only a GPU build of torch brings, so that it resolves anywhere.'
    # pip is the installer; nvidia-*, cuda-* and triton come with torch's own wheel where it needs them.
    "$work/venv/bin/python" -m pip freeze --all |
        grep -viE '^(pip|wheel|nvidia-.*|cuda-.*|triton)==' |
        sed -E 's/\+[A-Za-z0-9.]+$//' |
        sort -f
} >"$work/lock"
mv "$work/lock" requirements.lock
