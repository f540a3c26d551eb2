#!/usr/bin/env bash
# Run by Snakemake in the new conda environment, in the folder of the Snakefile.
set -euo pipefail
python -m pip install -r envs/requirements.lock
python -m pip install --no-deps --no-build-isolation -e .
