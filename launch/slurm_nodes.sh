#!/usr/bin/env bash
# One run on several nodes of a SLURM cluster, with all their GPUs. The options of sbatch say how many:
#
#     sbatch --nodes=4 --gpus-per-node=8 launch/slurm_nodes.sh configs/full_mnli.py runs/full_mnli
#
# All nodes read the same data; the first one writes the workdir. Two minutes before the time limit the run saves and
# ends. Submitted again, it resumes there.
#SBATCH --job-name=jpeft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: sbatch launch/slurm_nodes.sh CONFIG WORKDIR [--config.field=value ...]" >&2
  exit 2
fi
config=$1 workdir=$2
shift 2
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
# srun no longer takes the number of cores from sbatch. Without B:, SLURM signals the processes of srun, not this shell.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
# Under SLURM, JAX gives a process one GPU unless it is told which: here all those of its node.
# shellcheck disable=SC2016
exec srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c '
  gpus=${SLURM_GPUS_ON_NODE:-0}
  if [ "$gpus" -gt 0 ]; then export JAX_LOCAL_DEVICE_IDS=$(seq -s , 0 $((gpus - 1))); fi
  exec "$@"' bash \
  "${PYTHON:-.venv/bin/python}" -m jpeft.main --config "$config" --workdir "$workdir" --distributed auto "$@"
