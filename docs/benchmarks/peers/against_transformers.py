"""Greedy decoding on this machine alone: `hanse gateway --local` beside transformers, one core each, taking turns.

    cargo build --release -p hanse-node
    python3 -m venv V && V/bin/pip install torch transformers
    V/bin/python against_transformers.py TARGET/release/hanse MODEL_FOLDER [--rounds 5] [--tokens 128] [--dtype float32]

Both are held to the same core (taskset); what asks the gateway runs on another one. Prints a table: medians over the rounds, and the least
and the most. `--dtype` is what transformers computes in; Hanse reads the weights as they are and computes in f32.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
import urllib.request

CORE, OTHER = 0, 1

parser = argparse.ArgumentParser()
parser.add_argument("hanse")
parser.add_argument("model")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--tokens", type=int, default=128)
parser.add_argument("--dtype", default="float32")
args = parser.parse_args()

os.environ["OMP_NUM_THREADS"] = "1"
import torch  # noqa: E402
import transformers  # noqa: E402

torch.set_num_threads(1)
model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
# What ends an answer is the most tokens: what else would is made impossible, for both.
ends = model.generation_config.eos_token_id or []
ends = ends if isinstance(ends, list) else [ends]
model.generation_config.suppress_tokens, model.generation_config.eos_token_id = ends or None, None
PROMPT = list(range(1, 17))
command = ["taskset", "-c", str(CORE), args.hanse, "gateway", "--local", "--threads", "1", "--json", "--draft", "none"]
gateway = subprocess.Popen(
    command + ["--model", args.model, "--listen", "127.0.0.1:0", "--name", "m"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
)
url = json.loads(gateway.stdout.readline())["url"]


def theirs(sequences):
    os.sched_setaffinity(0, {CORE})
    prompt = torch.tensor([PROMPT] * sequences)
    began = time.perf_counter()
    with torch.no_grad():
        found = model.generate(prompt, max_new_tokens=args.tokens, do_sample=False, pad_token_id=0)
    took = time.perf_counter() - began
    assert found.shape[1] == len(PROMPT) + args.tokens
    return sequences * args.tokens / took


def ours(sequences):
    os.sched_setaffinity(0, {OTHER})
    bias = {str(token): -100 for token in ends}
    body = {"model": "m", "prompt": PROMPT, "max_tokens": args.tokens, "temperature": 0, "n": sequences, "logit_bias": bias}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    began = time.perf_counter()
    answer = json.load(urllib.request.urlopen(request, timeout=600))
    took = time.perf_counter() - began
    assert answer["usage"]["completion_tokens"] == sequences * args.tokens, answer["usage"]
    return sequences * args.tokens / took


print("| sequences | Hanse tokens/s | transformers tokens/s | times |")
print("|---|---|---|---|")
for sequences in (1, 16):
    ours(sequences), theirs(sequences)
    found = [(ours(sequences), theirs(sequences)) for _ in range(args.rounds)]

    def spread(values):
        return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"

    us, them = zip(*found)
    times = statistics.median(a / b for a, b in found)
    print(f"| {sequences} | {spread(us)} | {spread(them)} | {times:.1f} |", flush=True)
gateway.terminate()
gateway.wait(timeout=60)
