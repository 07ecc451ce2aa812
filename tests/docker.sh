#!/usr/bin/env bash
# The testnet of docker/compose.yaml, for real: it is brought up, asked, broken in several ways, restarted under load, and brought down.
# Every answer must be the one that came in peace.
#
#   tests/docker.sh [IMAGE]
#
# Needs a running Docker engine, `docker compose` or `docker-compose`, and curl 7.82 or later. IMAGE is one that exists; without it the image is built
# as docker/Dockerfile says, which needs the internet. HANSE_BINARY=FILE puts a program that is built already into it instead; then only
# debian:bookworm-slim is needed. HANSE_FEATURES=cuda has the image for machines with cards, which also runs without. HANSE_PORT is the gateway's port here, 18080 by default.
set -euo pipefail
cd "$(dirname "$0")/.."

project="hanse-test-$$"
scratch=$(mktemp -d)
url="http://127.0.0.1:${HANSE_PORT:=18080}"
export HANSE_LISTEN="127.0.0.1:$HANSE_PORT" HANSE_IMAGE="${1:-$project}" DOCKER_BUILDKIT=1
# A token cannot end an answer, so that each has the same length.
question='"model": "tiny-moe", "prompt": "Once upon a time", "temperature": 0, "logit_bias": {"0": -100}'

if docker compose version > /dev/null 2>&1; then compose=(docker compose); else compose=(docker-compose); fi
compose() { "${compose[@]}" --file docker/compose.yaml --project-name "$project" "$@"; }
say() { printf '%s %s\n' "$(date +%T)" "$*"; }
fail() {
    say "FAILED: $*"
    compose logs --tail 20 > "$scratch/logs" 2>&1 || true
    cat "$scratch/logs"
    exit 1
}

down() {
    trap - EXIT INT TERM
    touch "$scratch/enough"
    wait
    compose down --volumes --timeout 5 > "$scratch/down" 2>&1 || cat "$scratch/down"
    if [ "$HANSE_IMAGE" = "$project" ]; then docker rmi --force "$project" "$project-binary" > /dev/null 2>&1 || true; fi
    rm -rf "$scratch"
}
trap down EXIT
trap 'exit 130' INT TERM

# The text of an answer, or of a stream of pieces.
text() { grep -oE '"text":"(\\.|[^"\\])*"' "$1" | sed -E 's/^"text":"(.*)"$/\1/' | tr -d '\n'; }
ask() { curl --silent --show-error --fail --max-time 60 --no-buffer --json "{$question, $1}" "$url/v1/completions"; }
container() { compose ps --quiet "$1"; }
# Waits until every container is well.
all_healthy() {
    local deadline=$((SECONDS + 120)) service state
    for service in bootstrap volunteer1 volunteer2 volunteer3 volunteer4 gateway; do
        until state=$(docker inspect --format '{{.State.Health.Status}}' "$(container $service)") && [ "$state" = healthy ]; do
            [ $SECONDS -lt $deadline ] || fail "$service is $state"
            sleep 0.5
        done
    done
}
# Waits until the gateway is connected to so many volunteers.
peers() {
    local deadline=$((SECONDS + 90)) now
    until now=$(curl --silent --fail "$url/api/network" | grep -o '"state":"connected"' | wc -l) && [ "$now" -eq "$1" ]; do
        [ $SECONDS -lt $deadline ] || fail "the gateway is connected to $now volunteers, and $1 are there"
        sleep 0.2
    done
}
# Waits until every expert is hosted so often at least: volunteers that start at about the same time may choose alike, and move later.
replicas() {
    local deadline=$((SECONDS + 300)) fewest
    until fewest=$(curl --silent --fail "$url/api/network" | grep -oE '"replicas":\[[0-9,]*\]' | grep -oE '[0-9]+' | sort -n | head -1) \
        && [ "${fewest:-0}" -ge "$1" ]; do
        [ $SECONDS -lt $deadline ] || fail "an expert has $fewest replicas, not $1"
        sleep 0.5
    done
}
# Asks for a stream and does something while it comes; the answer must be what came in peace.
in_mid_stream() {
    local what=$1 try before after
    shift
    for try in 1 2 3 4 5; do
        ask '"stream": true, "max_tokens": 480' > "$scratch/stream" &
        local asked=$!
        until [ "$(wc -l < "$scratch/stream")" -gt 40 ] || ! kill -0 $asked 2> /dev/null; do sleep 0.01; done
        "$@" > /dev/null
        before=$(grep -c '"text"' "$scratch/stream" || true)
        wait $asked || fail "$what: the stream broke"
        after=$(grep -c '"text"' "$scratch/stream" || true)
        [ "$(text "$scratch/stream")" = "$expected" ] || fail "$what: another answer: $(text "$scratch/stream"); at last: $(tail -c 400 "$scratch/stream")"
        if [ "$before" -lt "$after" ]; then
            say "$what after $before of $after pieces at the latest: the same answer"
            return
        fi
        compose up -d --no-build > /dev/null 2>&1
        docker network connect "${project}_default" "$(container volunteer3)" 2> /dev/null || true
        all_healthy
        peers 4
        replicas 2
    done
    fail "$what: the answer was complete each time before it had happened"
}
# Asks again and again until it is told that it is enough; the number of answers is left in a file.
load() {
    local count=0
    until [ -e "$scratch/enough" ]; do
        if ! ask '"max_tokens": 64' > "$scratch/load$1" 2> "$scratch/error$1"; then
            cat "$scratch/error$1" "$scratch/load$1" > "$scratch/failed$1"
            return
        fi
        if [ "$(text "$scratch/load$1")" != "$short" ]; then
            cp "$scratch/load$1" "$scratch/failed$1"
            return
        fi
        count=$((count + 1))
        echo $count > "$scratch/count$1"
    done
}

if [ "$HANSE_IMAGE" = "$project" ]; then
    binary=build
    if [ -n "${HANSE_BINARY:-}" ]; then
        mkdir "$scratch/binary"
        cp "$HANSE_BINARY" "$scratch/binary/hanse"
        cp /etc/ssl/certs/ca-certificates.crt "$scratch/binary/"
        printf 'FROM scratch\nCOPY . /out/\n' | docker build --quiet --tag "$project-binary" --file - "$scratch/binary" > /dev/null
        binary="$project-binary"
    fi
    docker build --quiet --tag "$project" --file docker/Dockerfile --build-arg "BINARY=$binary" --build-arg "FEATURES=${HANSE_FEATURES:-}" . > /dev/null
    say "the image is built"
fi

compose up -d --no-build > "$scratch/up" 2>&1 || { cat "$scratch/up"; fail "up"; }
all_healthy
peers 4
replicas 2
say "a bootstrap, four volunteers and a gateway are up"

for service in bootstrap volunteer1 volunteer2 volunteer3 volunteer4 gateway; do
    user=$(docker exec "$(container $service)" id -u)
    [ "$user" != 0 ] || fail "$service runs as root"
    if docker exec "$(container $service)" touch /nothing 2> /dev/null; then fail "$service can write to its root"; fi
done
ask '"max_tokens": 480' > "$scratch/answer"
expected=$(text "$scratch/answer")
[ "${#expected}" -gt 500 ] || fail "an answer of 480 tokens is expected: $(cat "$scratch/answer")"
ask '"max_tokens": 64' > "$scratch/answer"
short=$(text "$scratch/answer")
docker exec "$(container gateway)" /usr/local/bin/hanse generate --local --model /model --prompt 'Once upon a time' --max-tokens 64 \
    --temperature 0 > "$scratch/alone" 2> /dev/null
printf '%s' "$short" | sed 's/\\n/\n/g; s/\\"/"/g' | diff - <(printf '%s' "$(cat "$scratch/alone")") \
    || fail "the network answers otherwise than one process"
say "the network answers as one process does"

in_mid_stream "killed" docker kill "$(container volunteer2)"
peers 3
compose up -d --no-build > /dev/null 2>&1
peers 4
replicas 2
say "the killed volunteer is back"

in_mid_stream "cut off" docker network disconnect "${project}_default" "$(container volunteer3)"
peers 3
ask '"max_tokens": 64' > "$scratch/answer"
[ "$(text "$scratch/answer")" = "$short" ] || fail "another answer while one is cut off"
docker network connect "${project}_default" "$(container volunteer3)"
peers 4
replicas 2
say "the volunteer that was cut off is back"

for stream in 1 2 3 4; do load $stream & done
for service in volunteer1 volunteer2 volunteer3 volunteer4; do
    compose restart --timeout 30 $service > /dev/null 2>&1
    all_healthy
    peers 4
    replicas 2
    say "$service restarted"
done
touch "$scratch/enough"
wait
for failed in "$scratch"/failed*; do
    if [ -e "$failed" ]; then fail "a request failed during the restarts, or had another answer: $(cat "$failed")"; fi
done
for stream in 1 2 3 4; do [ -e "$scratch/count$stream" ] || fail "stream $stream had no answer during the restarts"; done
answers=$(cat "$scratch"/count* | paste -sd+)
say "all volunteers restarted under load: $((answers)) answers, all the same, no request failed"

down
say "brought down"
left=$(docker ps --all --quiet --filter "name=$project"; docker volume ls --quiet --filter "name=$project"
    docker network ls --quiet --filter "name=$project"; docker images --quiet "$project*")
[ -z "$left" ] || { echo "FAILED: left behind: $left"; exit 1; }
