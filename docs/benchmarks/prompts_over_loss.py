"""Long prompts over a line that loses packets: before and after many short calls, which lose some too.

    cargo build --release -p hanse-node
    python3 prompts_over_loss.py TARGET/release/hanse MODEL_FOLDER [--loss 1%] [--rtt 20ms]

Two volunteers behind shapers, and a gateway. Prints the seconds for prompts of 500 tokens on new connections, the tokens a second of four
generations of 200 tokens, and the seconds for other prompts of 500 tokens afterwards.
"""

import argparse
import json
import random
import signal
import subprocess
import tempfile
import time
import urllib.request

parser = argparse.ArgumentParser()
parser.add_argument("hanse")
parser.add_argument("model")
parser.add_argument("--loss", default="1%")
parser.add_argument("--rtt", default="20ms")
args = parser.parse_args()
started = []


def start(*command):
    """Starts it; gives the first line of JSON that it prints."""
    command = [args.hanse, *command, "--model", args.model, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    started.append(process)
    return json.loads(process.stdout.readline())


with tempfile.TemporaryDirectory() as state:
    path = ["--rtt", args.rtt, "--loss", args.loss, "--seed", "3"]
    net = start("testnet", "up", "--nodes", "2", "--replicas", "1", "--state", f"{state}/net", *path)
    url = start("gateway", "--listen", "127.0.0.1:0", "--name", "m", "--draft", "none", "--bootstrap", net["bootstrap"])["url"]
    tokens = random.Random(5)

    def seconds(prompt, most):
        prompt = [tokens.randrange(20, 1700) for _ in range(prompt)]
        body = {"model": "m", "prompt": prompt, "max_tokens": most, "temperature": 0, "logit_bias": {"0": -100, "1": -100, "2": -100}}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
        began = time.perf_counter()
        json.load(urllib.request.urlopen(request, timeout=900))
        return time.perf_counter() - began

    seconds(8, 2)
    print("prompts of 500 tokens, s:", *[f"{seconds(500, 1):.2f}" for _ in range(3)])
    print("tokens/s:", *[f"{200 / seconds(8, 200):.2f}" for _ in range(4)])
    print("prompts of 500 tokens, s:", *[f"{seconds(500, 1):.2f}" for _ in range(3)])
    for process in reversed(started):
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
