#!/usr/bin/env bash
# Slices and trains random models until something is wrong.
#
#   scripts/fuzz.sh                # 2,000 examples, new ones each time: hours
#   FDG_FUZZ_EXAMPLES=100 scripts/fuzz.sh
#   FDG_FUZZ_SEED=17 scripts/fuzz.sh        # the examples of an earlier run
#
# Arguments go to pytest. Goes on after a failure, says how to repeat it, and
# in the end exits with 1 if there was any.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

use_venv datasets dev

examples="${FDG_FUZZ_EXAMPLES:-2000}"
seed="${FDG_FUZZ_SEED:-$((RANDOM * 32768 + RANDOM))}"
[[ "$examples" =~ ^[1-9][0-9]*$ ]] || fail \
    "FDG_FUZZ_EXAMPLES must be a positive number, not '$examples'"
[[ "$seed" =~ ^[0-9]+$ ]] || fail "FDG_FUZZ_SEED must be a number, not '$seed'"

# A process keeps the graphs of all it has compiled, and may die of an example:
# so there are many, of this many examples each.
size=50
failures=()

for ((done = 0; done < examples; done += size, seed += 1)); do
    count="$((examples - done < size ? examples - done : size))"
    echo "== examples $((done + 1)) to $((done + count)) of $examples," \
        "seed $seed"
    status=0
    FDG_FUZZ_EXAMPLES="$count" python -m pytest tests/test_random_graphs.py \
        --hypothesis-profile=fuzz --hypothesis-seed="$seed" \
        -o timeout=3600 --show-capture=no --quiet "$@" || status=$?
    # Interrupted, or used in a wrong way: the next would fare no better.
    ((status != 2 && status != 4 && status != 130)) || exit "$status"
    if ((status)); then
        failures+=("FDG_FUZZ_SEED=$seed FDG_FUZZ_EXAMPLES=$count $0")
        echo "FAILED. To repeat it: ${failures[-1]}"
    fi
done

if ((${#failures[@]})); then
    echo "FAILED, to be repeated by"
    printf '    %s\n' "${failures[@]}"
    exit 1
fi
echo "No failure in $examples examples"
