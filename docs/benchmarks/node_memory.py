"""How much memory a node takes beside the experts it hosts, when prompts have gone through all of them.

    python node_memory.py HANSE MODEL [PROMPT_TOKENS ...]

HANSE is the program, MODEL a model folder. Starts one node on loopback, sends it a prompt of each length (512 and 2000) of random tokens, and prints the
resident set after each, the largest so far, and both as shares of the experts' bytes.
"""

import json
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time

hanse, model = sys.argv[1:3]
lengths = [int(length) for length in sys.argv[3:]] or [512, 2000]
inspected = json.loads(subprocess.run([hanse, "inspect", "--json", "--model", model], check=True, capture_output=True).stdout)
vocab = json.loads((pathlib.Path(model) / "config.json").read_text())["vocab_size"]
experts = inspected["expert_bytes"]


def report(node, when):
    text = pathlib.Path(f"/proc/{node.pid}/status").read_text()
    now, most, anonymous = (int(re.search(rf"{key}:\s+(\d+)", text)[1]) << 10 for key in ("VmRSS", "VmHWM", "RssAnon"))
    mib = " ".join(f"{name} {value / 2**20:.0f} MiB" for name, value in [("resident", now), ("most", most), ("of its own", anonymous)])
    print(f"{when}: {mib}; {now / experts:.3f} and {most / experts:.3f} of {experts / 2**20:.0f} MiB of experts", flush=True)


with tempfile.TemporaryDirectory() as data:
    options = ["--json", "--listen=/ip4/127.0.0.1/udp/0/quic-v1", "--until-stdin-closes", f"--model={model}", f"--data-dir={data}"]
    node = subprocess.Popen([hanse, "node", *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        address = json.loads(node.stdout.readline())["addresses"][0]
        report(node, "started")
        for length in lengths:
            prompt = ",".join(str(random.randrange(vocab)) for _ in range(length))
            ask = ["generate", f"--model={model}", f"--bootstrap={address}", f"--prompt-ids={prompt}", "--max-tokens=4", "--json"]
            subprocess.run([hanse, *ask], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            # What is free is kept for a second.
            time.sleep(3)
            report(node, f"after {length} tokens")
    finally:
        node.stdin.close()
        node.wait()
