#!/usr/bin/env bash
# Many runs on a SLURM cluster, one GPU each. Every line of a text file is a run:
#
#     # CONFIG WORKDIR [--config.field=value ...], quoted as in a shell
#     configs/lora_mrpc.py runs/lora
#     fishpal,mrpc         runs/fishpal --config.seeds="(1, 2, 3)"
#
# Empty lines and those that begin with # do not count. Submitted from the root of the repository:
#
#     sbatch --array=1-$(grep -cvE '^[[:space:]]*(#|$)' runs.txt) launch/slurm_array.sh runs.txt
#
# Two minutes before the time limit a run saves and ends. Submitted again, unfinished runs resume.
#SBATCH --job-name=jpeft
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
set -euo pipefail
fail() {
  echo "error: $1" >&2
  exit 2
}
[ $# -eq 1 ] || fail "expected one FILE: sbatch --array=1-COUNT launch/slurm_array.sh FILE"
cd "${SLURM_SUBMIT_DIR:-.}"
file=$1 number=${SLURM_ARRAY_TASK_ID:-}
[ -f "$file" ] || fail "no file '$file': expected one with a line CONFIG WORKDIR [--config.field=value ...] for each run"
[[ $number =~ ^[0-9]{1,9}$ ]] || fail "SLURM_ARRAY_TASK_ID is '$number', expected a number from 1: submit with --array=1-COUNT"
runs=$(grep -vE '^[[:space:]]*(#|$)' -- "$file" | tr -d '\r') || fail "'$file' has no runs"
count=$(wc -l <<< "$runs")
number=$((10#$number)) count=$((count))
((1 <= number && number <= count)) || fail "no run $number in '$file', which has $count: submit with --array=1-$count"
line=$(sed -n "${number}p" <<< "$runs")
# xargs reads quotes as a shell does, and nothing else of a shell's: no line of the file is a program.
words=$(xargs -n 1 printf '%s\n' <<< "$line" 2> /dev/null) || fail "run $number of '$file' has a quote without its other: $line"
run=()
while IFS= read -r word; do run+=("$word"); done <<< "$words"
[ ${#run[@]} -ge 2 ] || fail "run $number of '$file' is '$line', expected CONFIG WORKDIR [--config.field=value ...]"
# The signal reaches this shell alone, so Python takes its place.
exec "${PYTHON:-.venv/bin/python}" -m jpeft.main --config "${run[0]}" --workdir "${run[1]}" "${run[@]:2}"
