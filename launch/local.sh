#!/usr/bin/env bash
# Many runs on this machine, one after the other: those of a file as launch/slurm_array.sh reads it.
#
#     launch/local.sh runs.txt
#
# A run that fails does not hold up the others; the failures are listed at the end. Ctrl-C or SIGTERM lets the present
# run save and stops. The same command resumes, and finished runs stay as they are.
set -euo pipefail
if [ $# -ne 1 ]; then
  echo "usage: launch/local.sh FILE" >&2
  exit 2
fi
file=$1
if [ ! -f "$file" ]; then
  echo "error: no file '$file': expected one with a line CONFIG WORKDIR [--config.field=value ...] for each run" >&2
  exit 2
fi
count=$(grep -cvE '^[[:space:]]*(#|$)' -- "$file") || {
  echo "error: '$file' has no runs" >&2
  exit 2
}
script=$(cd "$(dirname "$0")" && pwd)/slurm_array.sh
child="" stopped=""
stop() {
  stopped=$1
  if [ -n "$child" ]; then kill -TERM "$child" 2> /dev/null || true; fi
}
trap 'stop 130' INT
trap 'stop 143' TERM
failed=()
for ((number = 1; number <= count && !stopped; number++)); do
  # In the background, since bash hears no signal while it waits for what is in front.
  SLURM_SUBMIT_DIR=$PWD SLURM_ARRAY_TASK_ID=$number bash "$script" "$file" &
  child=$!
  if [ -n "$stopped" ]; then kill -TERM "$child" 2> /dev/null || true; fi  # it came just before
  code=0
  wait "$child" || code=$?
  while [ -n "$stopped" ] && kill -0 "$child" 2> /dev/null; do wait "$child" || true; done  # it saves
  child=""
  if [ -z "$stopped" ] && [ "$code" -ne 0 ]; then failed+=("run $number of $count failed with exit code $code"); fi
done
if [ -n "$stopped" ]; then
  echo "stopped; the same command resumes" >&2
  exit "$stopped"
fi
if [ ${#failed[@]} -gt 0 ]; then
  printf '%s\n' "${failed[@]}" >&2
  exit 1
fi
