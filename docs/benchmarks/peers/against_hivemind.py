"""Calls of experts: Hanse beside hivemind's MoE server, on this machine, one compute thread each, taking turns.

    cargo build --release -p hanse-node -p hanse-examples
    python3 -m venv V && V/bin/pip install -r requirements.txt
    V/bin/python against_hivemind.py TARGET/release [--rounds 5] [--seconds 2]

Both serve 16 SwiGLU experts of 2048 x 768 in f32, 16 that compute next to nothing, and 16 of hidden 1024 with 8.4 million weights each:
hivemind's own feed-forward block (1024 x 4096 and back), and SwiGLUs of 1024 x 2736. Prints a table: medians over the rounds, and the least
and the most. Then the time that 8 members need to declare 100 and 1000 experts, and a newcomer to find them.
"""

import argparse
import itertools
import json
import os
import pathlib
import select
import signal
import statistics
import subprocess
import sys
import tempfile

EXPERTS = 16
# Hidden size, and width of Hanse's expert.
KINDS = {"swiglu": (2048, 768), "empty": (2048, 16), "ffn": (1024, 2736)}
MEMBERS = 8
HERE = pathlib.Path(__file__).parent

parser = argparse.ArgumentParser()
parser.add_argument("programs", type=pathlib.Path)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--seconds", type=float, default=2)
parser.add_argument("--rows", default="1,16,256,1024")
parser.add_argument("--clients", default="1,4,16")
parser.add_argument("--kinds", default="swiglu,ffn,empty", help="which experts to call")
parser.add_argument("--declare", default="100,1000", help="numbers of experts to declare and find; empty for none")
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


def hanse(folder, kind):
    """A node that hosts everything: the process, its address, the model's id, the hidden size."""
    hidden, width = KINDS[kind]
    model = folder / kind
    make = [args.programs / "make-checkpoint", "--layers=1", f"--hidden={hidden}", f"--intermediate={width}", "--dtype=f32"]
    more = [f"--experts={EXPERTS}", "--top-k=4", "--vocab=1000", f"--out={model}"]
    subprocess.run(make + more, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    node = [args.programs / "hanse", "node", "--json", "--threads=1", "--listen=/ip4/127.0.0.1/udp/0/quic-v1", "--until-stdin-closes"]
    place = [f"--model={model}", f"--data-dir={folder / f'node-{kind}'}"]
    process, ready = start(node + place, json.loads)
    return process, ready["addresses"][0], ready["model_id"], hidden


def hanse_point(server, rows, clients, k):
    _, address, model, hidden = server
    command = [args.programs / "expert-calls", f"--bootstrap={address}", f"--model={model}", f"--hidden={hidden}", "--layers=1"]
    among = EXPERTS if k > 1 else 1
    more = [f"--experts={EXPERTS}", f"--top-k={k}", f"--among={among}", f"--rows={rows}", f"--clients={clients}"]
    return last(command + more + [f"--seconds={args.seconds}"])


def hivemind(kind):
    process, address = start(side("serve", kind, EXPERTS, *KINDS[kind]), str.strip)
    return process, address, KINDS[kind][0]


def hivemind_point(server, rows, clients, k):
    _, address, hidden = server
    what = ["call", address, args.seconds, rows, clients] if k == 1 else ["mix", address, args.seconds, rows, hidden, k, EXPERTS]
    return last(side(*what))


def side(*what):
    return [str(part) for part in [sys.executable, HERE / "hivemind_side.py", *what]]


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


def compare(name, ours, theirs, fields, better):
    """A row of a table: the rounds' values of each field on both sides, and how many times Hanse is better in the first."""
    found = [(ours(), theirs()) for _ in range(args.rounds)]
    first = fields[0]
    ratios = [better(a[first], b[first]) for a, b in found if a and b]
    times = f"{statistics.median(ratios):.1f}" if ratios else "-"
    columns = [spread(side, field) for field in fields for side in zip(*found)]
    print(f"| {name} | {columns[0]} | {columns[1]} | {times} | {' | '.join(columns[2:])} |", flush=True)


with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    rows, clients = ([int(part) for part in text.split(",")] for text in (args.rows, args.clients))
    points = [("swiglu", r, c, 1) for r in rows for c in clients] + [("swiglu", r, 1, 4) for r in (1, 16)]
    points += [(kind, r, 1, 1) for kind in ("ffn", "empty") for r in rows]
    points = [point for point in points if point[0] in args.kinds.split(",")]
    print("| expert, rows, clients | Hanse calls/s | hivemind calls/s | times | Hanse p50 ms | hivemind p50 ms |")
    print("|---|---|---|---|---|---|")
    for kind, group in itertools.groupby(points, lambda point: point[0]):
        us, them = hanse(folder, kind), hivemind(kind)
        for _, r, c, k in group:
            name = f"{kind}{f' mixture, {k} of {EXPERTS}' if k > 1 else ''}, {r}, {c}"
            here, there = lambda: hanse_point(us, r, c, k), lambda: hivemind_point(them, r, c, k)
            compare(name, here, there, ["calls_per_second", "p50_ms"], lambda a, b: a / b)
        for process, *_ in (us, them):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)
    print("\n| experts of 8 members | Hanse: declare, s | hivemind: declare, s | times | Hanse: find, s | hivemind: find, s |")
    print("|---|---|---|---|---|---|")
    for experts in filter(None, args.declare.split(",")):
        here = lambda: last([args.programs / "declare-and-find", f"--members={MEMBERS}", f"--experts={experts}"])
        compare(experts, here, lambda: last(side("declare", MEMBERS, experts)), ["declare_s", "find_s"], lambda a, b: b / a)
