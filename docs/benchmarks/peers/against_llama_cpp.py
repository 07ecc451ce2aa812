"""Greedy decoding of one sequence: Hanse beside llama.cpp, in one process, and with experts in two other ones, taking turns.

    cargo build --release -p hanse-node
    python3 -m venv V && V/bin/pip install torch transformers gguf sentencepiece cmake ninja
    V/bin/pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36 && tar xzf llama_cpp_python-*.tar.gz
    V/bin/cmake -G Ninja -B B -DCMAKE_BUILD_TYPE=Release -DGGML_RPC=ON llama_cpp_python-*/vendor/llama.cpp
    V/bin/ninja -C B llama-bench ggml-rpc-server
    V/bin/python against_llama_cpp.py TARGET/release/hanse MODEL_FOLDER llama_cpp_python-*/vendor/llama.cpp B [--dtype f32]

Every process computes with one thread. llama-bench decodes without a prompt and does not draw; it keeps keys and values in f16 (it takes no
f32 for them), Hanse in f32. `experts` is llama.cpp with all routed experts on two RPC servers, half of the layers each, and the rest in its own
process; Hanse's two volunteers have half of each layer's experts each. `layers` is llama.cpp with all layers on the two servers. Prints a table:
medians over the rounds, the least and the most.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

parser = argparse.ArgumentParser()
parser.add_argument("hanse")
parser.add_argument("model")
parser.add_argument("source")
parser.add_argument("build")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--tokens", type=int, default=128)
parser.add_argument("--dtype", default="f32", help="what llama.cpp has weights in; Hanse reads them as they are and computes in f32")
args = parser.parse_args()

CONVERT = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import convert_hf_to_gguf
from conversion.base import TextModel
# Only ids of tokens are used: how a text is cut into them does not matter.
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv = [sys.argv[0], sys.argv[2], "--outtype", sys.argv[3], "--outfile", sys.argv[4]]
convert_hf_to_gguf.main()
"""
folder = tempfile.TemporaryDirectory()
gguf = os.path.join(folder.name, "model.gguf")
subprocess.run([sys.executable, "-c", CONVERT, args.source, args.model, args.dtype, gguf], check=True, capture_output=True)
config = json.load(open(os.path.join(args.model, "config.json")))
layers, experts = config["num_hidden_layers"], config.get("num_experts") or config["num_local_experts"]
ends = config.get("eos_token_id") or []
ends = ends if isinstance(ends, list) else [ends]
PROMPT = list(range(1, 17))
started = []


def start(command, **how):
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, text=True, **how)
    started.append(process)
    return process


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def hanse(*command):
    """Starts it; gives the first line of JSON that it prints."""
    process = start([args.hanse, *command, "--json"], stdout=subprocess.PIPE)
    return json.loads(process.stdout.readline())


def gateway(*where):
    url = hanse("gateway", "--model", args.model, "--listen", "127.0.0.1:0", "--name", "m", "--threads", "1", "--draft", "none", *where)["url"]

    def measure():
        bias = {str(token): -100 for token in ends}
        body = {"model": "m", "prompt": PROMPT, "max_tokens": args.tokens, "temperature": 0, "logit_bias": bias}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
        began = time.perf_counter()
        answer = json.load(urllib.request.urlopen(request, timeout=600))
        took = time.perf_counter() - began
        assert answer["usage"]["completion_tokens"] == args.tokens, answer["usage"]
        return args.tokens / took

    return measure


def llama(*where):
    command = [os.path.join(args.build, "bin", "llama-bench"), "-m", gguf, "-t", "1", "-p", "0", "-n", str(args.tokens), "-r", "1"]
    command += ["-fa", "0", "-o", "json", *where]

    def measure():
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return json.loads(found)[0]["avg_ts"]

    return measure


try:
    ports = [free_port(), free_port()]
    for port in ports:
        start([os.path.join(args.build, "bin", "ggml-rpc-server"), "-H", "127.0.0.1", "-p", str(port), "-t", "1"], stdout=subprocess.DEVNULL)
    half = experts // 2
    node = ["node", "--model", args.model, "--threads", "1", "--no-mdns", "--no-upnp"]
    local = ["--listen", "/ip4/127.0.0.1/udp/0/quic-v1", "--data-listen", "127.0.0.1:0"]
    own = lambda: ["--data-dir", tempfile.mkdtemp(dir=folder.name)]
    first = hanse(*node, *local, *own(), "--experts", f"0-{layers - 1}:0-{half - 1}")["addresses"][0]
    hanse(*node, *local, *own(), "--experts", f"0-{layers - 1}:{half}-{experts - 1}", "--bootstrap", first)
    servers = [f"127.0.0.1:{port}" for port in ports]
    on = lambda which, server: f"blk\\.({'|'.join(map(str, which))})\\.ffn_.*_exps=RPC0[{servers[server]}]"
    split = ";".join([on(range(layers // 2), 0), on(range(layers // 2, layers), 1)])
    contenders = {
        "Hanse, one process": gateway("--local"),
        "llama.cpp, one process": llama(),
        "Hanse, two volunteers": gateway("--bootstrap", first),
        "llama.cpp, layers on two servers": llama("--rpc", ",".join(servers), "-ngl", "99"),
        "llama.cpp, experts on two servers": llama("--rpc", ",".join(servers), "-ngl", "0", "-ot", split),
    }
    for measure in contenders.values():
        measure()
    found = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, measure in contenders.items():
            found[name].append(measure())
    print("| | tokens/s | Hanse over it |\n|---|---|---|")
    for name, values in found.items():
        beside = "Hanse, one process" if "one process" in name else "Hanse, two volunteers"
        times = statistics.median(a / b for a, b in zip(found[beside], values))
        print(f"| {name} | {statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g}) | {times:.2f} |")
finally:
    for process in reversed(started):
        process.terminate()
    for process in started:
        process.wait(timeout=60)
