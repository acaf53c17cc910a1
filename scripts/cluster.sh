#!/usr/bin/env bash
# Trains the digits in two stages on two workers: processes on this machine, as
# they would be on two machines. Ends them when it is done, or interrupted.
#
#   scripts/cluster.sh                          # two workers, two stages
#   FDG_WORKERS=4 scripts/cluster.sh --splits=4 # any flag of trainers/digits.py
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

use_venv datasets

# Each job in a process group of its own, so that Ctrl-C comes to this script
# only, which passes it on to who trains; workers end last.
set -m
jobs=()
end_workers() {
    ((${#jobs[@]} == 0)) || kill -TERM "${jobs[@]}" 2>/dev/null || true
    wait || true
}
trap end_workers EXIT

workers="$(python -c "
from fdg_keras import sockets
print(','.join(f'127.0.0.1:{sockets.free_port()}' for _ in range(
    ${FDG_WORKERS:-2})))" 2>/dev/null)"
TF_CONFIG="{\"cluster\": {\"worker\": [\"${workers//,/\", \"}\"]}}"
export TF_CONFIG
echo "Workers: $workers"
for ((task = 0; task < ${FDG_WORKERS:-2}; task++)); do
    python -m fdg_keras.worker --task "$task" >/dev/null &
    jobs+=($!)
done

python -m trainers.digits --cluster "$@" &
chief=$!
trap 'kill -INT "$chief"' INT
trap 'kill -TERM "$chief"' TERM
status=0
# A signal that is passed on ends `wait`, and not what it waits for.
while kill -0 "$chief" 2>/dev/null; do
    status=0
    wait "$chief" || status=$?
done
exit "$status"
