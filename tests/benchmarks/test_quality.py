"""The table of methods, end to end on a tiny model in this process."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.compared import Options, Row, measure, quantize_inputs
from benchmarks.quality import figures, rows_of, size_of, table
from benchmarks.report import read_report
from lbllm.baselines.methods import METHODS, quantize_blocks
from lbllm.errors import ConfigError
from lbllm.measure.perplexity import perplexity
from lbllm.models.teacher import load_teacher
from lbllm.texts.corpus import load_corpus
from lbllm.texts.windows import evaluation_tokens
from tests.helpers.tiny_models import SENTENCES, save_tiny, tiny


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    folder = tmp_path_factory.mktemp("quality")
    choose = random.Random(0)
    text, other = folder / "text.txt", folder / "other.txt"
    text.write_text("\n".join(" ".join(choose.choices(SENTENCES, k=4)) for _ in range(400)))
    other.write_text("\n".join(choose.choices(SENTENCES, k=80)))
    return Options(
        teacher=str(save_tiny(folder / "teacher", "llama")),
        corpus=str(text),
        tokens=256,
        seq_len=32,
        damping=0.01,
        texts=(str(other),),
        window=32,
        limit=4,
        act_bits=(16, 4),
        act_group_size=-1,
        param_bits=16,
        tasks=(),
        task_limit=None,
        outside=None,
    )


def measured(kind: Any, name: str, options: Options) -> list[dict[str, Any]]:
    return measure(Row(kind, name, 16), options, lambda text: None)


def test_a_method_is_calibrated_and_evaluated_as_by_hand(options: Options) -> None:
    found, quantized = measured("baseline", "gptq", options)
    teacher = load_teacher(options.teacher)
    corpus = load_corpus(options.corpus, teacher.tokenizer, seq_len=32, tokens=256)
    stored = quantize_blocks(teacher.model, corpus.sequences, METHODS["gptq"], METHODS["gptq"].settings(group_size=16))
    windows = evaluation_tokens(options.texts[0], teacher.tokenizer, seq_len=32, limit=4)
    weights = perplexity(teacher.model, windows).perplexity
    quantize_inputs(teacher.model, 4, -1)
    both = perplexity(teacher.model, windows).perplexity
    assert found["label"] == "GPTQ, group 16"
    assert found["bits"] == stored.bpw == pytest.approx(3.15, abs=0.1)
    assert (found["act_bits"], quantized["act_bits"]) == (16, 4)
    assert (found[options.texts[0]], quantized[options.texts[0]]) == (weights, both)
    assert figures(quantized) == {f"{options.texts[0]}, A4": f"{both:,.2f}"}
    assert weights != both
    (alone,) = measured("baseline", "gptq", replace(options, act_bits=(4,)))
    assert alone[options.texts[0]] == both
    assert found["minutes"] > 0
    assert found["memory_mb"] > 10


def test_own_stages_and_the_teacher_stand_beside(options: Options) -> None:
    (first,), (last,) = measured("own", "stage1", options), measured("own", "stage3", options)
    teacher = measured("teacher", "", options)
    assert 6 < first["bits"] == last["bits"] < 7  # four 16-bit numbers for each 16 weights
    (small,) = measured("own", "stage1", replace(options, param_bits=4))
    assert small["label"] == "Stage 1, 4-bit parameters, group 16"
    assert small["bits"] < first["bits"] - 2
    assert (first["act_bits"], last["act_bits"]) == (16, 4)
    assert [row["act_bits"] for row in teacher] == [16, 4]
    lines = table([teacher, [first], [last]]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[0].startswith(f"|  | bits per weight | {options.texts[0]} | {options.texts[0]}, A4 | minutes")
    assert lines[3].startswith(f"| Stage 1, group 16 | {first['bits']:.3f} | {first[options.texts[0]]:,.2f} |  |")


@pytest.mark.parametrize("group_size", [-1, 8])
def test_activations_get_sixteen_even_values_in_each_range(group_size: int) -> None:
    model: Any = tiny("gpt2")[0]
    layer = model.transformer.h[1].mlp.c_fc
    given: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    quantize_inputs(model, 4, group_size)
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(input_ids=torch.arange(5, 25)[None])
    size = seen[0].shape[-1] if group_size == -1 else group_size
    for before, after in zip(given[0].reshape(-1, size).double(), seen[0].reshape(-1, size).double(), strict=True):
        step = (before.amax().clamp_min(0) - before.amin().clamp_max(0)) / 15
        codes = after / step
        assert codes.amax() - codes.amin() <= 15.01
        torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
        assert (after - before).abs().max() <= step * 1.01


def test_rows_and_bad_arguments() -> None:
    rows = rows_of("rtn,stage1,hqq", "64,-1", ["runs/a"], "env")
    assert rows[0] == Row("teacher", "")
    assert rows[1:3] == [Row("baseline", "rtn", 64), Row("baseline", "rtn", -1)]
    assert [one.kind for one in rows[3:]] == ["own", "own", "outside", "outside", "checkpoint"]
    with pytest.raises(ConfigError, match="--methods awq: choose from rtn"):
        rows_of("awq", "64", [], None)
    with pytest.raises(ConfigError, match="--methods hqq needs --outside"):
        rows_of("hqq", "64", [], None)
    with pytest.raises(ConfigError, match="--group-sizes 0"):
        rows_of("rtn", "64,0", [], None)
    for size in ("0", "-2", "many"):
        with pytest.raises(ConfigError, match=f"--act-group-size {size}: a size is 1 or more, or -1 for a whole row"):
            size_of(size, "--act-group-size")


def test_accuracies_are_printed_with_their_errors() -> None:
    row = {"label": "a", "kind": "own", "act_bits": 4, "bits": 3.0, "piqa": 0.624, "piqa_stderr": 0.022}
    assert figures(row | {"average": 0.396, "questions": 200}) == {"piqa, A4": "62.4% ± 2.2%", "average, A4": "39.6%"}


@pytest.mark.soak
@pytest.mark.soak
def test_the_command_makes_rows_at_once_and_prints_them_in_order(options: Options, tmp_path: Path) -> None:
    shared = {"--teacher": options.teacher, "--corpus": options.corpus, "--texts": options.texts[0]}
    numbers = {"--tokens": "256", "--seq-len": "32", "--window": "32", "--limit": "4", "--group-sizes": "16"}
    words = [word for pair in (shared | numbers).items() for word in pair]
    words += ["--methods", "bwa,rtn", "--act-bits", "16,4", "--jobs", "3", "--out", str(tmp_path / "found.json")]
    command = [sys.executable, "-m", "benchmarks.quality", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    head, columns, _, *rows = done.stdout.splitlines()
    assert columns.count(f"{options.texts[0]}, A4") == 1
    assert ", 3 rows at once, " in head
    assert [row.split("|")[1].split(",")[0].strip() for row in rows] == ["Teacher", "BWA", "Round to nearest"]
    kept = read_report(tmp_path / "found.json")
    assert [(row["kind"], row["act_bits"]) for row in kept.rows] == [
        (kind, bits) for kind in ("teacher", "baseline", "baseline") for bits in (16, 4)
    ]
    assert kept.settings["group_sizes"] == "16"
    assert "row" not in kept.settings
