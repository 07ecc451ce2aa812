#!/usr/bin/env bash
# Everything about cards but the cards: a library that stands in for the driver (emulated.cpp) runs the kernels on the processor, thread
# by thread, and the tests and the program use it as they would a card. Metal's kernels are run so as well, by CUDA's stand-in. Finds wrong results, reads beyond what was allocated, rows that
# depend on others, and what a card that fails, is full, or is taken by another program does to a network. Does not find what only
# hardware does: speed, races.
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
    say "FAILED: $*" >&2
    exit 1
}

library() {
    local name=$1
    shift
    g++ -std=c++17 -O2 -Wall -Wextra -Werror -Wno-unknown-pragmas -ffp-contract=off -shared -fPIC -fvisibility=hidden \
        -Wl,-soname,"${name##*/}" -o "$scratch/$name" "$@"
}
library libcuda.so.1 tests/cuda/emulated.cpp
mkdir "$scratch/metal"
library metal/libcuda.so.1 -DHANSE_METAL -Itests/cuda/metal -Wno-attributes tests/cuda/emulated.cpp

emulated=(env "LD_LIBRARY_PATH=$scratch${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}")
emulated_metal=(env "LD_LIBRARY_PATH=$scratch/metal${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}")

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

say "Metal's kernels: the processor's bits, and where subnormal floats count as zero the same but for that"
export HANSE_TEST_DEVICE=cuda:0 HANSE_TEST_TRUNK=cuda:0
for flush in "" HANSE_EMULATED_FLUSH=1; do
    "${emulated_metal[@]}" $flush cargo test --quiet -p hanse-model --features cuda --test devices -- --include-ignored
    "${emulated_metal[@]}" $flush cargo test --quiet -p hanse-model --features cuda --test trunk_on_device every -- --include-ignored
done
unset HANSE_TEST_DEVICE HANSE_TEST_TRUNK

cargo build --quiet -p hanse-node --features cuda
hanse="${CARGO_TARGET_DIR:-target}/debug/hanse"
model=examples/models/tiny-moe
# Starts a node and waits until it is ready; its document is in $scratch/node<number>, its messages in $scratch/log<number>.
node() {
    local number=$1
    shift
    "${emulated[@]}" "$hanse" node --model "${node_model:-$model}" --listen /ip4/127.0.0.1/udp/0/quic-v1 --data-dir "$scratch/data$number" --threads 1 --json "$@" \
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
generate() { "$hanse" generate --model $model --prompt 'Once upon a time' --max-tokens "${tokens:-40}" --temperature 0 --draft none "$@" 2> "$scratch/error" || cat "$scratch/error"; }
expected=$(generate --local)
if grep -q '^error' <<< "$expected"; then fail "$expected"; fi

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
published=$model
model="$scratch/q8_0"
answer=$(generate --local)
node 10 --device cuda
[ "$(value 10 devices)" = '["cuda:0","cuda:1"]' ] || fail "devices are $(value 10 devices)"
[ "$(value 10 experts)" = 96 ] || fail "$(value 10 experts) experts"
[ "$(generate --bootstrap "$(address 10)")" = "$answer" ] || fail "other tokens"
HANSE_EMULATED_CARDS=1 HANSE_EMULATED_BYTES=$((520 << 20)) node 11 --device cuda:0 --bootstrap "$(address 10)"
eight_bits=$(value 11 experts)
if [ "$eight_bits" -le "$held" ] || [ "$eight_bits" -ge 96 ]; then fail "$eight_bits experts, and $held in sixteen bits"; fi
[ "$(generate --bootstrap "$(address 11)")" = "$answer" ] || fail "other tokens"
model=$published

say "giving a card to others is asked for where nobody tells what they do"
if HANSE_EMULATED_CARDS=1 "${emulated[@]}" "$hanse" node --model $model --data-dir "$scratch/data0" --yield-to-others 2> "$scratch/error"; then
    fail "it started"
fi
grep -q 'NVML.*does not start' "$scratch/error" || { cat "$scratch/error"; fail "that is not what it says"; }
library libnvidia-ml.so.1 tests/cuda/emulated_nvml.cpp "$scratch/libcuda.so.1"

# From here on a context takes 300 MiB and a desktop has 300 MiB of each card. What others do: card, MiB and percent.
export HANSE_EMULATED_CONTEXT=$((300 << 20)) HANSE_EMULATED_OTHERS=$scratch/others
others() {
    printf '%s\n' "$@" | while read -r card mib percent; do echo "$card $((mib << 20)) $percent"; done > "$scratch/others.new"
    mv "$scratch/others.new" "$scratch/others"
}
now() { date +%s%3N; }
# Waits until a node's emulated card has `none` or `some` of its memory in use, for the nth time; when that was, in milliseconds.
memory() {
    local number=$1 card=$2 what=$3 nth=$4
    for _ in $(seq 200); do
        if [ "$(grep -c "^$card $what" "$scratch/card$number")" -ge "$nth" ]; then
            grep "^$card $what" "$scratch/card$number" | sed -n "${nth}p" | cut -d' ' -f3
            return
        fi
        sleep 0.05
    done
    fail "card $card of node $number: never $what for the ${nth}th time"
}
# Waits until a node says of itself what it should.
says() {
    for _ in $(seq 200); do
        if "$hanse" ready --data-dir "$scratch/data$1" 2> /dev/null | grep -q "$2"; then return; fi
        sleep 0.1
    done
    "$hanse" ready --data-dir "$scratch/data$1" || true
    fail "node $1 does not say $2"
}
# Waits until an answer has begun that is asked for in the background, and has a processor serve as well from then on.
mid_stream() {
    for _ in $(seq 200); do
        if [ "$(wc -c < "$scratch/text")" -gt 100 ]; then break; fi
        sleep 0.05
    done
    "$hanse" resume --data-dir "$scratch/data6" > /dev/null
    kill -0 "$1" || fail "the answer was too short to take anything in its middle"
}
in_time() {
    local took=$(($2 - $1))
    if [ $took -gt 2000 ]; then fail "$3 took $took ms"; fi
    say "$3 took $took ms"
}

say "a game takes a card while tokens are generated: all its memory is free within two seconds, and it comes back"
others '0 300 5' '1 300 5'
"${emulated[@]}" "$hanse" doctor --data-dir "$scratch/data0" --json > "$scratch/doctor" 2> /dev/null || true
grep -q 'used by game (300.0 MiB)' "$scratch/doctor" || { cat "$scratch/doctor"; fail "the doctor does not say who uses the card"; }
node 6 --device cpu
other=$(address 6)
HANSE_EMULATED_CARDS=1 HANSE_EMULATED_LOG=$scratch/card7 node 7 --device cuda --yield-to-others --yield-quiet 2 --bootstrap "$other"
long() { tokens=480 generate --ignore-eos "$@"; }
long --local > "$scratch/expected"
[ "$(wc -c < "$scratch/expected")" -gt 1000 ] || { cat "$scratch/expected"; fail "that is no answer"; }
# Only the card serves, until the moment at which it is taken.
"$hanse" pause --data-dir "$scratch/data6" > /dev/null
long --patience 60 --bootstrap "$other" > "$scratch/text" &
asked=$!
mid_stream $asked
others '0 2300 5'
taken=$(now)
in_time "$taken" "$(memory 7 0 none 1)" "giving the memory back to a game"
says 7 'paused: another program took 2.0 GiB of the card'
"$hanse" status --model $model --json --bootstrap "$other" > "$scratch/status"
grep -q '"why_draining":"other programs use its cards"' "$scratch/status" || { cat "$scratch/status"; fail "others are not told why"; }
wait $asked
cmp -s "$scratch/expected" "$scratch/text" || { cat "$scratch/text"; fail "other tokens"; }
others '0 320 5'
memory 7 0 some 2 > /dev/null
says 7 '^serving$'
"$hanse" pause --data-dir "$scratch/data6" > /dev/null
[ "$(generate --patience 60 --bootstrap "$other")" = "$expected" ] || fail "other tokens after the card came back"
"$hanse" resume --data-dir "$scratch/data6" > /dev/null

say "a job computes on it, and again one does while its experts are loaded"
others '0 320 80'
taken=$(now)
in_time "$taken" "$(memory 7 0 none 2)" "giving the memory back to a job"
says 7 'paused: another program computes on the card 80 % of the time'
others '0 320 5'
memory 7 0 some 3 > /dev/null
others '0 900 80'
taken=$(now)
in_time "$taken" "$(memory 7 0 none 3)" "giving the memory back to one that came at once"
others '0 320 5'
says 7 '^serving$'
[ "$(generate --bootstrap "$other")" = "$expected" ] || fail "other tokens"

say "one of two cards is taken in mid-stream, of a node in a container: the other one serves on"
others '0 300 5' '1 300 5'
HANSE_EMULATED_PID=4242 HANSE_EMULATED_CARDS=2 HANSE_EMULATED_LOG=$scratch/card8 node 8 --device cuda --yield-to-others --yield-quiet 2 --bootstrap "$other"
for number in 6 7; do "$hanse" pause --data-dir "$scratch/data$number" > /dev/null; done
[ "$(value 8 experts)" = 96 ] || fail "$(value 8 experts) experts"
long --patience 60 --bootstrap "$other" > "$scratch/text" &
asked=$!
mid_stream $asked
others '0 300 5' '1 300 60'
taken=$(now)
in_time "$taken" "$(memory 8 1 none 1)" "giving one of two cards back"
says 8 'serving, without cuda:1: another program computes on the card 60 % of the time'
if grep -q '^0 none' "$scratch/card8"; then fail "the other card was given back as well"; fi
wait $asked
cmp -s "$scratch/expected" "$scratch/text" || { cat "$scratch/text"; fail "other tokens with one of two cards"; }
others '0 300 5' '1 300 5'
memory 8 1 some 2 > /dev/null
says 8 '^serving$'
"$hanse" pause --data-dir "$scratch/data6" > /dev/null
[ "$(generate --patience 60 --bootstrap "$other")" = "$expected" ] || fail "other tokens with both cards again"
"$hanse" resume --data-dir "$scratch/data6" > /dev/null

say "a node without a folder keeps the files of what it gave back, and loads them again although nobody gives them any more"
node_model=$(value 6 model_id | tr -d '"')
HANSE_EMULATED_CARDS=1 HANSE_EMULATED_LOG=$scratch/card9 node 9 --experts 0-1 --cache-dir "$scratch/cache" --yield-to-others --yield-quiet 2 --bootstrap "$other"
[ "$(value 9 experts)" = 32 ] || fail "$(value 9 experts) experts"
others '0 300 60'
says 9 '^paused'
in_use=$(cat "$scratch"/cache/users/* | tr -d ' ' | grep -c .)
[ "$in_use" -ge 32 ] || fail "$in_use files are kept"
"$hanse" pause --data-dir "$scratch/data6" > /dev/null
others '0 300 5'
says 9 '^serving$'
for _ in $(seq 100); do
    "$hanse" status --model $model --json --bootstrap "$(address 9)" > "$scratch/status"
    if grep -q '"experts":32,' "$scratch/status"; then break; fi
    sleep 0.1
done
grep -q '"experts":32,' "$scratch/status" || { cat "$scratch/status"; fail "not all experts came back"; }

say "all is well ($held of 96 experts fitted, $eight_bits in eight bits)"
