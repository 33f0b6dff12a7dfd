#!/usr/bin/env bash
# One run on all workers of a TPU pod slice:
#
#     launch/tpu_pod.sh my-pod us-central2-b configs/full_mnli.py /mnt/shared/runs/full_mnli --config.train.dtype=bfloat16
#
# Worker 0 writes the workdir. Put it on a disk that survives the pod and that every worker mounts, such as a Filestore
# share; then the same command resumes on a new pod. Each worker has jpeft, with `.[tpu]`, in the folder JPEFT_DIR of its
# home, `jpeft` by default, and there the interpreter PYTHON, `.venv/bin/python` by default.
#
# Ctrl-C here ends the connections, not the run. This makes it save and end:
#
#     gcloud compute tpus tpu-vm ssh my-pod --zone us-central2-b --worker=0 --command "pkill -TERM -f '[j]peft.main'"
set -euo pipefail
if [ $# -lt 4 ]; then
  echo "usage: launch/tpu_pod.sh NAME ZONE CONFIG WORKDIR [--config.field=value ...]" >&2
  exit 2
fi
name=$1 zone=$2 config=$3 workdir=$4
shift 4
run=("${PYTHON:-.venv/bin/python}" -m jpeft.main --config "$config" --workdir "$workdir" --distributed auto "$@")
command="cd $(printf '%q' "${JPEFT_DIR:-jpeft}") && exec$(printf ' %q' "${run[@]}")"
exec gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$command"
