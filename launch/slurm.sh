#!/usr/bin/env bash
# One run on one GPU of a SLURM cluster:
#
#     sbatch launch/slurm.sh configs/fishpal_mnli.py runs/fishpal_mnli --config.model=roberta-base
#
# Two minutes before the time limit the run saves and ends. Submitted again, it resumes there.
#SBATCH --job-name=jpeft
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: sbatch launch/slurm.sh CONFIG WORKDIR [--config.field=value ...]" >&2
  exit 2
fi
config=$1 workdir=$2
shift 2
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
# The signal reaches this shell alone, so Python takes its place.
exec "${PYTHON:-.venv/bin/python}" -m jpeft.main --config "$config" --workdir "$workdir" "$@"
