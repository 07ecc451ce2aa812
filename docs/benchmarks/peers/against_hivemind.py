"""Calls of experts: Hanse beside hivemind's MoE server, on this machine, one compute thread each, taking turns.

    cargo build --release -p hanse-node -p hanse-examples
    python3 -m venv V && V/bin/pip install -r requirements.txt
    V/bin/python against_hivemind.py TARGET/release [--rounds 5] [--seconds 2]

Both serve 16 SwiGLU experts of 2048 x 768 in f32, and 16 that compute next to nothing. Prints a table: medians over the rounds, and the
least and the most.
"""

import argparse
import json
import os
import pathlib
import select
import signal
import statistics
import subprocess
import sys
import tempfile

HIDDEN, WIDTH, EXPERTS = 2048, 768, 16
HERE = pathlib.Path(__file__).parent

parser = argparse.ArgumentParser()
parser.add_argument("programs", type=pathlib.Path)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--seconds", type=float, default=2)
parser.add_argument("--rows", default="1,16,256,1024")
parser.add_argument("--clients", default="1,4,16")
args = parser.parse_args()


def start(command, ready):
    """Starts a server and reads its first line. hivemind's now and then hangs as it starts its processes: then once more."""
    for _ in range(4):
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
        )
        said, _, _ = select.select([process.stdout], [], [], 90)
        line = process.stdout.readline() if said else ""
        if line:
            return process, ready(line)
        os.killpg(process.pid, signal.SIGKILL)
    sys.exit(f"it does not start: {command}")


def hanse(folder, width):
    """A node that hosts everything: the process, its address, the model's id."""
    model = folder / f"width-{width}"
    make = [args.programs / "make-checkpoint", "--layers=1", f"--hidden={HIDDEN}", f"--intermediate={width}", "--dtype=f32"]
    more = [f"--experts={EXPERTS}", "--top-k=4", "--vocab=1000", f"--out={model}"]
    subprocess.run(make + more, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    node = [args.programs / "hanse", "node", "--json", "--threads=1", "--listen=/ip4/127.0.0.1/udp/0/quic-v1", "--until-stdin-closes"]
    place = [f"--model={model}", f"--data-dir={folder / f'node-{width}'}"]
    process, ready = start(node + place, json.loads)
    return process, ready["addresses"][0], ready["model_id"]


def hanse_point(server, rows, clients, k):
    _, address, model = server
    command = [args.programs / "expert-calls", f"--bootstrap={address}", f"--model={model}", f"--hidden={HIDDEN}", "--layers=1"]
    among = EXPERTS if k > 1 else 1
    more = [f"--experts={EXPERTS}", f"--top-k={k}", f"--among={among}", f"--rows={rows}", f"--clients={clients}"]
    return last(command + more + [f"--seconds={args.seconds}"])


def hivemind(kind, width):
    command = [sys.executable, HERE / "hivemind_side.py", "serve", kind, EXPERTS, HIDDEN, width]
    process, address = start([str(part) for part in command], str.strip)
    return process, address


def hivemind_point(server, rows, clients, k):
    what = ["call", server[1], args.seconds, rows, clients] if k == 1 else ["mix", server[1], args.seconds, rows, HIDDEN, k, EXPERTS]
    return last([str(part) for part in [sys.executable, HERE / "hivemind_side.py", *what]])


def last(command):
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=90)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None
    points = [line for line in output.splitlines() if line.startswith("{")]
    return json.loads(points[-1]) if points else None


def spread(points, field):
    values = [point[field] for point in points if point]
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})" if values else "failed"


with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    ours = {"swiglu": hanse(folder, WIDTH), "empty": hanse(folder, 1)}
    theirs = {"swiglu": hivemind("swiglu", WIDTH), "empty": hivemind("empty", 1)}
    rows, clients = ([int(part) for part in text.split(",")] for text in (args.rows, args.clients))
    points = [("swiglu", r, c, 1) for r in rows for c in clients] + [("empty", r, 1, 1) for r in rows]
    points += [("swiglu", r, 1, 4) for r in (1, 16)]
    print("| expert, rows, clients | Hanse calls/s | hivemind calls/s | times | Hanse p50 ms | hivemind p50 ms |")
    print("|---|---|---|---|---|---|")
    for kind, r, c, k in points:
        found = [(hanse_point(ours[kind], r, c, k), hivemind_point(theirs[kind], r, c, k)) for _ in range(args.rounds)]
        us, them = zip(*found)
        ratios = [a["calls_per_second"] / b["calls_per_second"] for a, b in found if a and b]
        times = f"{statistics.median(ratios):.1f}" if ratios else "-"
        name = f"{kind}{f' mixture, {k} of {EXPERTS}' if k > 1 else ''}, {r}, {c}"
        both = " | ".join(spread(side, "calls_per_second") for side in (us, them))
        print(f"| {name} | {both} | {times} | {spread(us, 'p50_ms')} | {spread(them, 'p50_ms')} |", flush=True)
    for process, *_ in [*ours.values(), *theirs.values()]:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)
