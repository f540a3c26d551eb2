#!/usr/bin/env bash
# snakemake with the arguments given, under a lock of this folder that dies with its holder. Snakemake's own lock survives a
# kill -9; with ours in hand it can be cleared, unless a Snakemake that was started without make still runs here.
set -euo pipefail
cd "$(dirname "$0")/.."

here=$PWD
others() {
    local entry
    for entry in /proc/[0-9]*; do
        [ "$(readlink "$entry/cwd" 2>/dev/null)" = "$here" ] || continue
        tr '\0' '\n' <"$entry/cmdline" 2>/dev/null | grep -qE '(^|/)snakemake$' && echo "${entry#/proc/}"
    done
    return 0
}

mkdir -p .snakemake
exec 9>.snakemake/make.lock
if ! flock -w 3 9; then
    echo "make: another make runs the workflow in this folder; wait for it to end" >&2
    exit 1
fi
if [ -n "$(ls -A .snakemake/locks 2>/dev/null)" ]; then
    running=$(others | tr '\n' ' ')
    if [ -n "$running" ]; then
        echo "make: Snakemake already runs in this folder (process ${running% }); wait for it to end" >&2
        exit 1
    fi
    echo "make: clearing the lock of a run that was killed"
    rm -f .snakemake/locks/*
fi
exec snakemake "$@"
