"""Other packages' methods for ``benchmarks.quality``: run by the Python of an environment that has those packages.

    OUTSIDE/bin/python benchmarks/quality_outside.py METHOD FOLDER BLOCKS HOW

FOLDER has a dense model in ``teacher`` and token ids (n, T) in ``tokens.safetensors``; BLOCKS is the path of the
model's decoder blocks. The dense model with quantized weights is saved to FOLDER/quantized, and one line of JSON tells
its stored bits per weight, the seconds and the peak memory.

HOW is JSON: ``group_size``, -1 for a whole row; ``bits``, by default 2; ``sym``, whether the grid is symmetric; the
rest goes to the package as it is. METHOD: ``hqq`` (scale and zero point float16, never symmetric), ``auto-round``
(symmetric by default), ``gptqmodel`` (asymmetric by default). Scales are float16; the integer zero points of asymmetric
grids take as many bits as a code. This file knows nothing of the rest of the project.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def hqq(model: torch.nn.Module, blocks: str, how: dict[str, Any]) -> float:
    """Half-quadratic quantization (Badri and Shaji 2023), in place; returns stored bits per weight. Groups go over the
    weights row by row, so one may span two rows."""
    from hqq.core.quantize import Quantizer

    bits = weights = 0
    for layer in model.get_submodule(blocks).modules():
        if not isinstance(layer, torch.nn.Linear):
            continue
        size = layer.weight.shape[1] if how["group_size"] == -1 else how["group_size"]
        codes, meta = Quantizer.quantize(
            layer.weight.data, nbits=how["bits"], group_size=size, axis=1, bitpack=False, device="cpu"
        )
        meta["scale"], meta["zero"] = (meta[name].half().float() for name in ("scale", "zero"))
        meta["compute_dtype"] = torch.float32
        layer.weight.data = Quantizer.dequantize(codes, meta)
        bits += codes.numel() * how["bits"] + 2 * 16 * meta["scale"].numel()
        weights += codes.numel()
    return bits / weights


def auto_round(folder: Path, blocks: str, how: dict[str, Any]) -> float:
    """SignRound (Cheng et al. 2024) on the given tokens; saves the model. The package's defaults, but for steps of one
    sequence instead of eight, which would take hours without a GPU, and the symmetric grid, which does better."""
    from auto_round import AutoRound

    options = dict(how)
    bits, group_size, sym = (options.pop(name) for name in ("bits", "group_size", "sym"))
    tokens = load_file(folder / "tokens.safetensors")["input_ids"]
    samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens.split(1)]
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(folder / "teacher"),
        scheme={"bits": bits, "group_size": group_size, "sym": sym, "data_type": "int", "act_bits": 16},
        dataset=samples,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        batch_size=1,
        device_map="cpu",
        enable_torch_compile=False,
        **options,
    )
    rounded, _ = rounding.quantize()
    rounded.save_pretrained(folder / "quantized")
    stored = weights = 0
    for layer in rounded.get_submodule(blocks).modules():
        if isinstance(layer, torch.nn.Linear):
            rows, columns = layer.weight.shape
            groups = -(-columns // (columns if group_size == -1 else group_size))
            stored += rows * (columns * bits + groups * (16 if sym else 16 + bits))
            weights += rows * columns
    return stored / weights


def gptq(folder: Path, blocks: str, how: dict[str, Any]) -> float:
    """GPTQ (Frantar et al. 2023) as GPTQModel does it on the given tokens, with its own order of columns inside groups
    (``act_group_aware``), which whole rows can't have; saves the model."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores it sets itself one and wants two
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    tokens = load_file(folder / "tokens.safetensors")["input_ids"]
    samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens.split(1)]
    # In its first format zero points lie one lower than they mean, and what is in memory is read as it lies.
    config = QuantizeConfig(**({"format": "gptq_v2", "offload_to_disk": False, "desc_act": False} | how))
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
        bits += layer.weight.numel() * how["bits"] + packed.scales.numel() * (16 if how["sym"] else 16 + how["bits"])
        weights += layer.weight.numel()
    model.save_pretrained(folder / "quantized")
    return bits / weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=("hqq", "auto-round", "gptqmodel"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("blocks")
    parser.add_argument("how", type=json.loads)
    given = parser.parse_args()
    folder, blocks = given.folder, given.blocks
    how = {"bits": 2, "sym": given.method == "auto-round"} | given.how
    began = time.perf_counter()
    if given.method == "auto-round":
        bpw = auto_round(folder, blocks, how)
    elif given.method == "gptqmodel":
        bpw = gptq(folder, blocks, how)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
        bpw = hqq(model, blocks, how)
        model.save_pretrained(folder / "quantized")
    AutoTokenizer.from_pretrained(folder / "teacher").save_pretrained(folder / "quantized")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"bpw": bpw, "seconds": time.perf_counter() - began, "memory": peak}))


if __name__ == "__main__":
    main()
