"""Logits of GGUF files by llama.cpp beside those of transformers for what Hanse makes of them, both in f32.

    cargo build -p hanse-node
    python3 -m venv V && V/bin/pip install -r requirements.txt
    V/bin/python logits_of_llama_cpp.py TARGET/debug/hanse tests/fixtures/gguf/deepseek2_v3.gguf tests/fixtures/gguf/gpt_oss.gguf

llama.cpp reads a copy of the file whose values gguf-py has widened to f32, and keeps keys and values in f32, without flash attention; transformers
reads the folder that `hanse import --to f32` makes. llama.cpp rounds the bounds of yarn: where a folder says that they are not rounded, as that of
gpt-oss does, transformers is asked both with them and without. Exits with an error if none is within 1e-4 standard deviations.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from gguf_files import widen

LENGTH, LIMIT = 24, 1e-4


def of_llama_cpp(file, ids):
    model = llama_cpp.Llama(str(file), n_ctx=256, logits_all=True, verbose=False, type_k=0, type_v=0, flash_attn=False)
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


@torch.no_grad()
def of_transformers(folder, ids):
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **eager).eval()
    return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


parser = argparse.ArgumentParser()
parser.add_argument("hanse")
parser.add_argument("files", nargs="+", type=Path)
args = parser.parse_args()
wrong = False
for file in args.files:
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        folder = place / "model"
        subprocess.run([args.hanse, "import", file, "--to", "f32", "--out", folder], check=True, stdout=subprocess.DEVNULL)
        config = json.loads((folder / "config.json").read_text())
        ids = [token * 7 % (config["vocab_size"] - 10) + 3 for token in range(LENGTH)]
        widen(file, place / "f32.gguf")
        theirs = of_llama_cpp(place / "f32.gguf", ids)
        found = {"as it is": of_transformers(folder, ids)}
        if (config.get("rope_scaling") or {}).get("truncate") is False:
            config["rope_scaling"]["truncate"] = True
            (folder / "config.json").write_text(json.dumps(config))
            found["bounds of yarn rounded"] = of_transformers(folder, ids)
        differences = {how: float(np.abs(logits - theirs).max() / logits.std()) for how, logits in found.items()}
        for how, difference in differences.items():
            print(f"{file.name}, {how}: {difference:.1e} standard deviations", flush=True)
        wrong |= min(differences.values()) > LIMIT
sys.exit(wrong)
