"""Other packages' methods for ``benchmarks.quality``: run by the Python of an environment that has those packages.

    OUTSIDE/bin/python benchmarks/quality_outside.py METHOD FOLDER BLOCKS GROUP_SIZE

FOLDER has a dense model in ``teacher`` and token ids (n, T) in ``tokens.safetensors``; BLOCKS is the path of the
model's decoder blocks. The dense model with quantized weights is saved to FOLDER/quantized, and one line of JSON tells
its stored bits per weight, the seconds and the peak memory. METHOD: ``hqq`` (2 bits, scale and zero point float16),
``auto-round`` (2 bits, symmetric, scale float16), ``gptqmodel`` (2 bits, scale float16, zero point 2 bits). This
file knows nothing of the rest of the project.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

BITS = 2


def hqq(model: torch.nn.Module, blocks: str, group_size: int) -> float:
    """Half-quadratic quantization (Badri and Shaji 2023), in place; returns stored bits per weight."""
    from hqq.core.quantize import Quantizer

    bits = weights = 0
    for layer in model.get_submodule(blocks).modules():
        if not isinstance(layer, torch.nn.Linear):
            continue
        size = layer.weight.shape[1] if group_size == -1 else group_size
        codes, meta = Quantizer.quantize(
            layer.weight.data, nbits=BITS, group_size=size, axis=1, bitpack=False, device="cpu"
        )
        meta["scale"], meta["zero"] = (meta[name].half().float() for name in ("scale", "zero"))
        meta["compute_dtype"] = torch.float32
        layer.weight.data = Quantizer.dequantize(codes, meta)
        bits += codes.numel() * BITS + 2 * 16 * meta["scale"].numel()
        weights += codes.numel()
    return bits / weights


def auto_round(folder: Path, group_size: int, blocks: str) -> float:
    """SignRound (Cheng et al. 2024) on the given tokens; saves the model. The package's defaults, but for steps of one
    sequence instead of eight, which would take hours without a GPU, and the symmetric grid, which does better in 2
    bits."""
    from auto_round import AutoRound

    tokens = load_file(folder / "tokens.safetensors")["input_ids"]
    samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens.split(1)]
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(folder / "teacher"),
        scheme={"bits": BITS, "group_size": group_size, "sym": True, "data_type": "int", "act_bits": 16},
        dataset=samples,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        batch_size=1,
        device_map="cpu",
        enable_torch_compile=False,
    )
    rounded, _ = rounding.quantize()
    rounded.save_pretrained(folder / "quantized")
    bits = weights = 0
    for layer in rounded.get_submodule(blocks).modules():
        if isinstance(layer, torch.nn.Linear):
            rows, columns = layer.weight.shape
            groups = -(-columns // (columns if group_size == -1 else group_size))
            bits += rows * (columns * BITS + groups * 16)
            weights += rows * columns
    return bits / weights


def gptq(folder: Path, blocks: str, group_size: int) -> float:
    """GPTQ (Frantar et al. 2023) as GPTQModel does it on the given tokens, without act-order; saves the model."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores it sets itself one and wants two
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    tokens = load_file(folder / "tokens.safetensors")["input_ids"]
    samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens.split(1)]
    # In its first format zero points lie one lower than they mean, and what is in memory is read as it lies.
    how = {"format": "gptq_v2", "offload_to_disk": False}
    config = QuantizeConfig(bits=BITS, group_size=group_size, sym=False, desc_act=False, **how)
    found = GPTQModel.load(str(folder / "teacher"), config, device="cpu", dtype=torch.float32)
    found.quantize(samples, batch_size=1, backend=BACKEND.TORCH)
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
    bits = weights = 0
    for name, layer in model.named_modules():
        if not name.startswith(f"{blocks}.") or not isinstance(layer, torch.nn.Linear):
            continue
        packed = found.model.get_submodule(name)
        dense = packed.dequantize_weight().T.float().clone()  # a tensor that autograd knows
        layer.weight = torch.nn.Parameter(dense, requires_grad=False)
        assert layer.weight.shape == (layer.out_features, layer.in_features)
        bits += layer.weight.numel() * BITS + packed.scales.numel() * (16 + BITS)
        weights += layer.weight.numel()
    model.save_pretrained(folder / "quantized")
    return bits / weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=("hqq", "auto-round", "gptqmodel"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("blocks")
    parser.add_argument("group_size", type=int)
    given = parser.parse_args()
    folder, blocks, size = given.folder, given.blocks, given.group_size
    began = time.perf_counter()
    if given.method == "auto-round":
        bpw = auto_round(folder, size, blocks)
    elif given.method == "gptqmodel":
        bpw = gptq(folder, blocks, size)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
        bpw = hqq(model, blocks, size)
        model.save_pretrained(folder / "quantized")
    AutoTokenizer.from_pretrained(folder / "teacher").save_pretrained(folder / "quantized")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"bpw": bpw, "seconds": time.perf_counter() - began, "memory": peak}))


if __name__ == "__main__":
    main()
