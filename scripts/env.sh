# shellcheck shell=bash
# Makes .venv and activates it; sourced by the other scripts, from bash.
#
#   source scripts/env.sh
#   use_venv datasets dev    # the extras of setup.py that the caller needs
#
# Leaves the caller in the root of the checkout. FDG_CUDA=0 or FDG_CUDA=1 in
# the environment overrides the search for an NVIDIA GPU.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

fail() {
    printf '\n%s: %s\n' "$(basename "$0")" "$1" >&2
    shift
    if (($#)); then
        printf '    %s\n' "$@" >&2
    fi
    exit 1
}

# Prints a Python that TensorFlow has wheels for. A candidate is run, because
# a version manager's shim may be found and still refuse to start.
find_python() {
    local candidate
    for candidate in python3.11 python3 python3.12 python3.13; do
        if "$candidate" -c '
import sys
sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

has_nvidia_gpu() {
    case "${FDG_CUDA:-}" in
        0) return 1 ;;
        1) return 0 ;;
    esac
    if [[ "$(nvidia-smi -L 2>/dev/null)" == *"GPU "[0-9]* ]]; then
        return
    fi
    # A container may show the host's driver without giving a device.
    [[ -n "$(ls -A /proc/driver/nvidia/gpus 2>/dev/null)" ]] &&
        compgen -G "/dev/nvidia[0-9]*" >/dev/null
}

make_venv() {
    local python
    if .venv/bin/python -m pip --version >/dev/null 2>&1; then
        return
    fi
    python="$(find_python)" || fail \
        "no suitable Python found; 3.11 is needed (3.12 and 3.13 may work)" \
        "Debian or Ubuntu: apt-get install python3.11 python3.11-venv" \
        "or put a python3.11 on PATH. Found now:" \
        "$(python3 --version 2>/dev/null || echo "no python3 at all")"
    echo "Making .venv with $python"
    rm -rf .venv
    "$python" -m venv .venv || {
        rm -rf .venv
        fail "$python cannot make a virtual environment" \
            "Debian or Ubuntu: apt-get install python3.11-venv"
    }
}

# Installs this checkout, editable, with the extras given, each an argument.
# Does nothing when all of them were installed from the same requirements.
use_venv() {
    local extras=("$@") extra key list quiet=() log_level=3 done=true
    if has_nvidia_gpu; then
        extras+=(cuda)
        # Only here: without a GPU, TensorFlow reports its absence as an error.
        log_level=2
    fi
    export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-$log_level}"

    make_venv
    # An editable installation points at this folder, hence the path.
    key="$({ cat setup.py pyproject.toml && pwd && .venv/bin/python -V; } |
        sha256sum)"
    for extra in "${extras[@]}"; do
        if [[ "$(cat ".venv/installed-$extra" 2>/dev/null)" != "$key" ]]; then
            done=false
        fi
    done
    if ! $done; then
        list="$(IFS=, && echo "${extras[*]}")"
        echo "Installing fdg_keras[$list] into .venv" \
            "(the first time takes some minutes)"
        [[ -t 1 ]] || quiet=(--quiet)
        # Slow registries are waited for, unless the user says otherwise.
        PIP_DEFAULT_TIMEOUT="${PIP_DEFAULT_TIMEOUT:-120}" \
            PIP_RETRIES="${PIP_RETRIES:-10}" \
            PIP_DISABLE_PIP_VERSION_CHECK=1 \
            .venv/bin/python -m pip install "${quiet[@]}" \
            --editable ".[$list]" ||
            fail "pip could not install fdg_keras[$list] (see above)" \
                "Without a network, point pip at a local registry or folder:" \
                "PIP_INDEX_URL=... or PIP_FIND_LINKS=... PIP_NO_INDEX=1" \
                "What was installed so far is kept; run this again to go on."
        for extra in "${extras[@]}"; do
            echo "$key" >".venv/installed-$extra"
        done
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
}
