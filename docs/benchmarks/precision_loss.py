"""What a trained model loses when its experts are stored in few bits.

    python precision_loss.py HANSE MODEL TEXT          (needs torch and safetensors)

MODEL is the bundled model, whose rows of 192 and 128 weights are no whole blocks of q4_k. So it is first written with rows of 256, filled up with zeros: hidden states
have 64 values more that are always 0, experts 128 more of width, and the norms' weights are multiplied by sqrt(192 / 256), since they average over 256 values.
That is the same model. Its zeros lie in groups of 32 of their own, and change neither scales nor minima of the others.

fp8 and MXFP4, which `hanse quantize` does not write, are rounded here and written out in f32, which gives the same bits as the blocks (`model/tests/quantised.rs`).
Prints perplexity and how far the next token's distribution is from that of f32.
"""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import load_file, save_file

HANSE, MODEL, TEXT = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]
HIDDEN, WIDTH, BLOCK = 192, 128, 256


def padded(name, tensor):
    """The tensor of the model with rows of whole blocks."""
    tensor = tensor.float()
    if name.endswith("norm.weight") and tensor.shape == (HIDDEN,):
        tensor = tensor * (HIDDEN / BLOCK) ** 0.5
    if ".self_attn." in name:
        # Heads stay as they are: only what is read of, or added to, hidden states is longer.
        long = {"o_proj": (True, False)}.get(name.split(".")[-2], (False, True))
    else:
        long = (True, True)
    shape = [BLOCK if is_long and size in (HIDDEN, WIDTH) else size for size, is_long in zip(tensor.shape, long)]
    if tensor.dim() == 1 and tensor.shape[0] != HIDDEN:
        shape = list(tensor.shape)
    wide = torch.zeros(shape)
    wide[tuple(slice(size) for size in tensor.shape)] = tensor
    return wide


def fp8(weights):
    """Rounded to e4m3 with a scale for each 128 x 128."""
    rounded = torch.empty_like(weights)
    for row in range(0, weights.shape[0], 128):
        for column in range(0, weights.shape[1], 128):
            block = weights[row : row + 128, column : column + 128]
            scale = block.abs().max().clamp(min=1e-30) / 448.0
            rounded[row : row + 128, column : column + 128] = (block / scale).to(torch.float8_e4m3fn).float() * scale
    return rounded


def mxfp4(weights):
    """Rounded to e2m1 with a power of two for each 32 of a row, as the OCP specification says."""
    groups = weights.reshape(-1, 32)
    most = groups.abs().amax(dim=1, keepdim=True).clamp(min=2.0**-120)
    scale = torch.exp2(torch.floor(torch.log2(most)) - 2)
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    nearest = (groups / scale).abs().unsqueeze(-1).sub(values).abs().argmin(-1)
    return (values[nearest] * groups.sign() * scale).reshape(weights.shape)


def write(folder, tensors, round_experts=lambda weights: weights):
    folder.mkdir()
    for file in MODEL.glob("*.json"):
        shutil.copy(file, folder)
    config = json.loads((MODEL / "config.json").read_text())
    config.update(hidden_size=BLOCK, moe_intermediate_size=BLOCK, torch_dtype="float32")
    (folder / "config.json").write_text(json.dumps(config))
    stored = {name: round_experts(tensor) if ".experts." in name else tensor for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def hanse(*what):
    return json.loads(subprocess.run([HANSE, *map(str, what), "--json"], check=True, capture_output=True, text=True).stdout)


with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    tensors = {name: padded(name, tensor) for name, tensor in load_file(MODEL / "model.safetensors").items()}
    plain = write(folder / "f32", tensors)
    models = {"as published": MODEL, "f32, filled up": plain}
    for dtype in ("f16", "bf16", "q8_0", "q4_k"):
        models[dtype] = folder / dtype
        report = hanse("quantize", plain, "--to", dtype, "--out", models[dtype])
        assert report["in_q8_0_instead"] == 0, report
    models["fp8"] = write(folder / "fp8", tensors, fp8)
    models["MXFP4"] = write(folder / "mxfp4", tensors, mxfp4)
    logits = folder / "logits"
    hanse("score", "--local", "--model", plain, "--file", TEXT, "--logits-out", logits)
    for name, model in models.items():
        scored = hanse("score", "--local", "--model", model, "--file", TEXT, "--compare", logits)
        print(f"{name}: perplexity {scored['perplexity']:.4f}, {json.dumps(scored['compared'])}", flush=True)
