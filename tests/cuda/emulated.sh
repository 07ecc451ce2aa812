#!/usr/bin/env bash
# Everything about cards but the cards: a library that stands in for the driver (emulated.cpp) runs the kernels on the processor, thread
# by thread, and the tests and the program use it as they would a card. Finds wrong results, reads beyond what was allocated, rows that
# depend on others, and what a card that fails or is full does to a network. Does not find what only hardware does: speed, races.
#
#   tests/cuda/emulated.sh
#
# Needs g++ on x86-64 Linux. With a card, and without this: HANSE_TEST_DEVICE=cuda, as docs/gpu.md says.
set -euo pipefail
cd "$(dirname "$0")/../.."

scratch=$(mktemp -d)
started=()
end() {
    for pid in "${started[@]}"; do kill "$pid" 2> /dev/null || true; done
    # They take leave.
    wait
    rm -rf "$scratch"
}
trap end EXIT
say() { printf '== %s\n' "$*"; }
fail() {
    say "FAILED: $*"
    exit 1
}

g++ -std=c++17 -O2 -Wall -Wextra -Werror -Wno-unknown-pragmas -ffp-contract=off -shared -fPIC -fvisibility=hidden \
    -Wl,-soname,libcuda.so.1 -o "$scratch/libcuda.so.1" tests/cuda/emulated.cpp

emulated=(env "LD_LIBRARY_PATH=$scratch${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}")

say "kernels and batcher: the processor's bits"
export HANSE_TEST_DEVICE=cuda HANSE_EMULATED_CARDS=2
"${emulated[@]}" cargo test --quiet -p hanse-model --features cuda --test devices -- --include-ignored
"${emulated[@]}" cargo test --quiet -p hanse-node --features cuda --lib batcher

say "networks of cards whose experts have biases and another activation, or are in several precisions"
"${emulated[@]}" cargo test --quiet -p hanse-tests --features hanse-node/cuda --test parity gpt_oss
"${emulated[@]}" cargo test --quiet -p hanse-tests --features hanse-node/cuda --test precision
unset HANSE_TEST_DEVICE

say "trunks: the processor's bits, and how many launches and copies a layer takes"
HANSE_TEST_TRUNK=cuda:1 "${emulated[@]}" cargo test --quiet -p hanse-model --features cuda --test trunk_on_device -- --include-ignored
HANSE_EMULATED_COUNTS="$scratch/counts" "${emulated[@]}" cargo test --quiet -p hanse-model --features cuda --test trunk_counts -- --include-ignored

cargo build --quiet -p hanse-node --features cuda
hanse="${CARGO_TARGET_DIR:-target}/debug/hanse"
model=examples/models/tiny-moe
# Starts a node and waits until it is ready; its document is in $scratch/node<number>, its messages in $scratch/log<number>.
node() {
    local number=$1
    shift
    "${emulated[@]}" "$hanse" node --model $model --listen /ip4/127.0.0.1/udp/0/quic-v1 --data-dir "$scratch/data$number" --threads 1 --json "$@" \
        > "$scratch/node$number" 2> "$scratch/log$number" &
    started+=($!)
    local tries
    for tries in $(seq 300); do
        if [ -s "$scratch/node$number" ]; then return; fi
        sleep 0.1
    done
    cat "$scratch/log$number"
    fail "node $number is not ready"
}
# A value of a node's document.
value() { grep -oE "\"$2\":(\"[^\"]*\"|\[[^]]*\]|[0-9]+)" "$scratch/node$1" | head -1 | cut -d: -f2-; }
address() { value "$1" addresses | tr -d '[]"' | cut -d, -f1; }
generate() { "$hanse" generate --model $model --prompt 'Once upon a time' --max-tokens 40 --temperature 0 --draft none "$@" 2> "$scratch/error" || cat "$scratch/error"; }
expected=$(generate --local)

say "two cards as one node, chosen by themselves"
node 1 --device auto
[ "$(value 1 devices)" = '["cuda:0","cuda:1"]' ] || fail "devices are $(value 1 devices)"
[ "$(value 1 experts)" = 96 ] || fail "$(value 1 experts) experts"
[ "$(generate --bootstrap "$(address 1)")" = "$expected" ] || fail "other tokens"

say "one of two cards fails in mid-stream, and a processor takes over what it had: the same tokens"
HANSE_EMULATED_FAIL=1:99 node 2 --device cuda
generate --patience 60 --bootstrap "$(address 2)" > "$scratch/text" &
asked=$!
for _ in $(seq 300); do
    if grep -q 'given up' "$scratch/log2"; then break; fi
    sleep 0.1
done
node 3 --device cpu --bootstrap "$(address 2)"
wait $asked
[ "$(cat "$scratch/text")" = "$expected" ] || { cat "$scratch/text"; fail "other tokens"; }
grep -q 'cuda:1 failed at computing: unspecified launch failure (CUDA_ERROR_LAUNCH_FAILED)' "$scratch/log2" || { cat "$scratch/log2"; fail "nothing is said of the card"; }
[ "$(generate --bootstrap "$(address 2)")" = "$expected" ] || fail "other tokens after the card was given up"

say "a card with room for some: the rest is left out, and that is said"
HANSE_EMULATED_CARDS=1 HANSE_EMULATED_BYTES=$((520 << 20)) node 4 --device cuda:0 --bootstrap "$(address 3)"
held=$(value 4 experts)
if [ "$held" -le 0 ] || [ "$held" -ge 96 ]; then fail "$held experts"; fi
grep -q 'not all experts fit' "$scratch/log4" || { cat "$scratch/log4"; fail "nothing is said"; }
[ "$(generate --bootstrap "$(address 4)")" = "$expected" ] || fail "other tokens"
HANSE_EMULATED_CARDS=1 HANSE_EMULATED_BYTES=$((520 << 20)) node 5 --device cuda:0 --memory 1GiB --bootstrap "$(address 3)"
[ "$(value 5 experts)" -le "$held" ] && [ "$(value 5 experts)" -gt 0 ] || fail "$(value 5 experts) experts by memory"

say "trunks on a card: here, beside volunteers on cards, and of a text that is scored"
generate_on() { "${emulated[@]}" "$hanse" generate --model $model --prompt 'Once upon a time' --max-tokens 40 --temperature 0 --draft none "$@" 2> "$scratch/error" || cat "$scratch/error"; }
export HANSE_EMULATED_COUNTS="$scratch/counts"
for device in cuda:1 auto; do
    rm -f "$scratch/counts"
    [ "$(HANSE_EMULATED_CARDS=2 generate_on --local --device $device)" = "$expected" ] || fail "other tokens with the trunk on $device"
    # 6 layers of 3 launches, and the LM head, for each of 40 passes.
    [ "$(cut -d' ' -f1 "$scratch/counts")" -ge 760 ] || fail "$(cat "$scratch/counts") on $device"
done
unset HANSE_EMULATED_COUNTS
[ "$(generate_on --device cuda:0 --bootstrap "$(address 1)")" = "$expected" ] || fail "other tokens with trunk and experts on cards"
score() { "${emulated[@]}" "$hanse" score --model $model --prompt 'Once upon a time there was a little boat' --json --device $1 | grep -o '"logprobs":[^]]*'; }
[ -n "$(score cpu)" ] && [ "$(score cuda:0)" = "$(score cpu)" ] || fail "other scores"

say "a trunk's card that fails in mid-generation, or in the prompt, and one that is too small: the same tokens, and that is said"
for launch in 7 333; do
    [ "$(HANSE_EMULATED_FAIL=0:$launch generate_on --device cuda:0 --bootstrap "$(address 1)")" = "$expected" ] || fail "other tokens when launch $launch fails"
    grep -q 'the trunk is computed on the processor from now on.*cuda:0 failed at computing: unspecified launch failure' "$scratch/error" || { cat "$scratch/error"; fail "nothing is said of the card"; }
    [ "$(grep -c 'failed at computing' "$scratch/error")" = 1 ] || fail "it is said more than once"
done
[ "$(HANSE_EMULATED_BYTES=$((546 << 20)) generate_on --device cuda:0 --local)" = "$expected" ] || fail "other tokens with a card that is too small"
grep -q 'not all of the trunk fits' "$scratch/error" || { cat "$scratch/error"; fail "nothing is said"; }

say "experts in eight bits: the tokens of one process, and more of them on a small card"
"$hanse" quantize $model --to q8_0 --out "$scratch/q8_0" > "$scratch/error" 2>&1 || { cat "$scratch/error"; fail "not written"; }
model="$scratch/q8_0"
expected=$(generate --local)
node 6 --device cuda
[ "$(value 6 devices)" = '["cuda:0","cuda:1"]' ] || fail "devices are $(value 6 devices)"
[ "$(value 6 experts)" = 96 ] || fail "$(value 6 experts) experts"
[ "$(generate --bootstrap "$(address 6)")" = "$expected" ] || fail "other tokens"
HANSE_EMULATED_CARDS=1 HANSE_EMULATED_BYTES=$((520 << 20)) node 7 --device cuda:0 --bootstrap "$(address 6)"
eight_bits=$(value 7 experts)
if [ "$eight_bits" -le "$held" ] || [ "$eight_bits" -ge 96 ]; then fail "$eight_bits experts, and $held in sixteen bits"; fi
[ "$(generate --bootstrap "$(address 7)")" = "$expected" ] || fail "other tokens"

say "all is well ($held of 96 experts fitted, $eight_bits in eight bits)"
