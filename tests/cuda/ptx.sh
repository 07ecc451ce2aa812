#!/usr/bin/env bash
# Makes model/src/cards/cuda/kernels.ptx of model/src/cards/cuda/kernels.cu, to be committed with it. Needs python3 with pip, x86-64 Linux and
# PyPI; no card, no driver, no toolkit. With "assemble" it also has ptxas translate the result for cards of every generation, and
# shows what that takes of registers; nothing may be spilled.
#
#   tests/cuda/ptx.sh [assemble]
#
# The compiler is an old one on purpose: a driver reads what compilers up to its own age made, and later cards only need a later driver.
set -euo pipefail
cd "$(dirname "$0")/../.."

tools="${HANSE_CUDA_TOOLS:-$HOME/.cache/hanse}/cuda-tools"
if [ ! -e "$tools/ready" ]; then
    rm -rf "$tools"
    python3 -m pip install --quiet --no-deps --target "$tools" blake3 nvidia-cuda-nvrtc-cu11==11.8.89 nvidia-cuda-nvcc-cu12==12.8.93
    chmod +x "$tools/nvidia/cuda_nvcc/bin/ptxas"
    touch "$tools/ready"
fi

source=model/src/cards/cuda/kernels.cu
ptx=model/src/cards/cuda/kernels.ptx
made=$(mktemp)
trap 'rm -f "$made"' EXIT
hash=$(PYTHONPATH="$tools" python3 -c 'import sys, blake3; print(blake3.blake3(open(sys.argv[1], "rb").read()).hexdigest())' "$source")
echo "// Made of kernels.cu, BLAKE3 $hash, by tests/cuda/ptx.sh." > "$made"
# The library finds its other half by this path.
LD_LIBRARY_PATH="$tools/nvidia/cuda_nvrtc/lib" python3 tests/cuda/ptx.py "$tools/nvidia/cuda_nvrtc/lib/libnvrtc.so.11.2" "$source" compute_60 >> "$made"
cp "$made" "$ptx"
echo "$ptx: $(wc -c < "$ptx") bytes"

if [ "${1:-}" = assemble ]; then
    for card in 60 61 70 75 80 86 89 90 100 120; do
        "$tools/nvidia/cuda_nvcc/bin/ptxas" --verbose --warn-on-spills --gpu-name "sm_$card" --output-file /dev/null "$ptx" > "$made" 2>&1 || { cat "$made"; exit 1; }
        if grep --quiet 'spill' "$made" && grep 'spill' "$made" | grep --quiet --invert-match '0 bytes spill stores, 0 bytes spill loads'; then
            cat "$made"
            exit 1
        fi
        echo "sm_$card: $(grep -oE 'Used [0-9]+ registers' "$made" | grep -oE '[0-9]+' | sort -n | paste -sd' ') registers, nothing spilled"
    done
fi
