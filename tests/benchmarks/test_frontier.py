"""The table against bits: its rows are stored one by one, merged over seeds, and drawn."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import frontier
from benchmarks.compared import Options, Row, quantize_inputs
from benchmarks.frontier import all_rows, chosen, compute, is_there, merged, stored, table
from benchmarks.frontier_chart import chart, series
from lbllm.errors import ConfigError
from lbllm.models.blocks import decoder_blocks, linear_layers
from tests.helpers.tiny_models import SENTENCES, save_tiny, tiny


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    folder = tmp_path_factory.mktemp("frontier")
    choose = random.Random(0)
    text, other = folder / "text.txt", folder / "other.raw"
    text.write_text("\n".join(" ".join(choose.choices(SENTENCES, k=4)) for _ in range(200)))
    other.write_text("\n".join(choose.choices(SENTENCES, k=60)))
    return Options(
        teacher=str(save_tiny(folder / "teacher", "llama")),
        corpus=str(text),
        tokens=128,
        seq_len=32,
        damping=0.01,
        texts=(str(other),),
        window=32,
        limit=2,
        act_bits=(16, 4),
        act_group_size=-1,
        kv_bits=4,
        param_bits=16,
        tasks=(),
        task_limit=None,
        outside=None,
    )


def test_rows_are_stored_and_found_again(options: Options, tmp_path: Path) -> None:
    made = {
        "teacher": Row("teacher", ""),
        "gptq": Row("baseline", "gptq", 16, {"bits": 3, "symmetric": True}),
        "qat": Row("trained", "efficient-qat", 16, {"bits": 2, "block_epochs": 1, "end_epochs": 1}),
    }
    for key, row in made.items():
        path = stored(tmp_path, key, options.tokens)
        assert not is_there(path, row, options)
        compute(key, key, row, options, path)
        assert is_there(path, row, options)
        assert is_there(path, row, replace(options, outside="elsewhere"))
        assert not is_there(path, replace(row, group_size=8), options)
        assert not is_there(path, row, replace(options, limit=1))
        assert is_there(path, row, replace(options, act_bits=(16,)))
        assert not is_there(path, row, replace(options, act_bits=(8,)))
    found = merged(tmp_path, options.tokens)
    bits = {one["label"]: one["bits"] for one in found if one["inputs"] == "A16"}
    assert bits["gptq"] == pytest.approx(3 + 16 / 16, abs=0.1)
    assert bits["teacher"] is None
    assert all(one[options.texts[0]] > 1 for one in found)
    lines = table(found).splitlines()
    assert len(lines) == 2 + len(found) == 2 + 6
    assert merged(tmp_path, 999) == []


@pytest.mark.parametrize(
    "row",
    [
        Row("trained", "even", 16, {"bits": 2, "symmetric": True, "e2e": {"seq_len": 32}}),
        Row("own", "stages124", 16, {"quant": {"param_bits": 4}, "seed": 0, "e2e": {"seq_len": 32}}),
    ],
    ids=lambda row: row.name,
)
@pytest.mark.soak
def test_rows_that_train_whole_models(row: Row, options: Options, tmp_path: Path) -> None:
    path = stored(tmp_path, "row", options.tokens)
    compute("row", "row", row, options, path)
    found = merged(tmp_path)
    assert [one["inputs"] for one in found] == (["A16"] if row.kind == "own" else ["A16", "A4KV4"])
    assert all(one[options.texts[0]] > 1 and one["bits"] > 2 for one in found)


def test_every_row_can_be_named(tmp_path: Path) -> None:
    rows = all_rows()
    assert len({label for label, _ in rows.values()}) == len(rows) - 2 * 2 * (
        len(frontier.OWN_GROUPS) + len(frontier.OWN_PLANES)
    )
    assert all(re.fullmatch(r"[a-z0-9-]+", key) for key in rows)
    assert chosen(rows, "gptq-3,own-g16-1234", tmp_path, "c4")[:2] == ["gptq-3-g-1", "gptq-3a-g-1"]
    # A whole key is one row.
    assert chosen(rows, "own-g16-12,gptq-2-g3", tmp_path, "c4") == ["gptq-2-g32", "own-g16-12"]
    with pytest.raises(ConfigError, match="--rows nothing: no row"):
        chosen(rows, "nothing", tmp_path, "c4")
    assert all_rows(131_072)["even-2-g64"][1].how["wat"] == {"epochs": 1}


def entry(label: str, method: str, bits: float, value: float | str, **more: Any) -> dict[str, Any]:
    return {"label": label, "method": method, "key": label, "kind": "baseline", "inputs": "A16", "bits": bits} | {
        "tokens": 8_192,
        "wikitext2": value,
        **more,
    }


def keep(folder: Path, *rows: dict[str, Any]) -> None:
    for number, row in enumerate(rows):
        stored(folder, f"row{number}", row["tokens"]).write_text(json.dumps({"found": [row]}))


def test_seeds_are_one_row_and_the_best_methods_are_chosen(tmp_path: Path) -> None:
    others = [entry(f"{name}-{k}", name, 2 + k, 50.0 + 10 * n - k) for n, name in enumerate("abcdef") for k in range(2)]
    own = [entry("ours", "stages124", 3.0, value, kind="own", minutes=value) for value in (40.0, 44.0, 42.0)]
    keep(tmp_path, *others, *own, entry("far", "g", 2.5, 1.0, tokens=999))
    (ours,) = (one for one in merged(tmp_path, 8_192) if one["kind"] == "own")
    assert (ours["wikitext2"], ours["wikitext2_low"], ours["wikitext2_high"], ours["seeds"]) == (42, 40, 44, 3)
    assert ours["minutes"] == 42
    assert "42.00 (40.00 to 44.00)" in table([ours])
    keys = chosen(all_rows(), "best", tmp_path, "wikitext2")
    assert keys[:5] == ["teacher", "a-1", "b-1", "c-1", "d-1"]
    assert all(key.startswith(("own-", "own3-")) for key in keys[5:])


def test_the_chart_has_a_line_for_each_method() -> None:
    rows = [entry(f"gptq {bits}", "gptq", bits, value) for bits, value in ((3.1, 60.0), (2.3, 300.0), (2.1, 9e4))]
    rows += [
        entry("better", "gptq", 3.1, 55.0),
        entry("hidden", "hqq", 2.5, "inf"),
        entry("later", "b", 2, 30, tokens=9),
    ]
    rows += [entry("ours", "stage2", 3.0, 50.0, kind="own"), entry("Teacher", "teacher", 0, 24.0, kind="teacher")]
    rows += [entry("A4", "gptq", 3.1, 20.0, inputs="A4KV4")]
    lines, out = series([row for row in rows if row["tokens"] == 8_192], "wikitext2", 1_000)
    assert lines == {"ours": [(3.0, 50.0)], "gptq": [(2.3, 300.0), (3.1, 55.0)]}
    assert out == 2
    picture = chart([row for row in rows if row["tokens"] == 8_192])
    root = ElementTree.fromstring(picture)
    assert len(root.findall("{*}polyline")) == 2
    texts = [element.text for element in root.findall("{*}text")]
    assert "2 rows above 1,000 left out" in texts
    assert "teacher, 24.00" in texts
    with pytest.raises(ConfigError, match="no row with inputs left alone"):
        chart([])


def test_wide_channels_keep_eight_bits_and_a_range_of_their_own() -> None:
    model: Any = tiny("llama")[0]
    path, blocks = decoder_blocks(model)
    name = f"{path}.1.mlp.down_proj"
    channels = torch.tensor([3, 40])
    given: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []
    layer = model.get_submodule(name)
    layer.register_forward_pre_hook(lambda _, args: given.append(args[0].detach()))
    quantize_inputs(model, 4, -1, {name: channels})
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(input_ids=torch.arange(5, 25)[None])
    assert len(linear_layers(blocks[1])) == 7
    others = torch.tensor([k for k in range(given[0].shape[-1]) if k not in channels])
    for chosen_columns, count in ((others, 15), (channels, 255)):
        before, after = given[0][0][:, chosen_columns].double(), seen[0][0][:, chosen_columns].double()
        step = (before.amax(-1).clamp_min(0) - before.amin(-1).clamp_max(0)) / count
        codes = after / step[:, None]
        torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
        assert ((after - before).abs() <= 1.01 * step[:, None]).all()
