"""What precision costs, on a tiny run: each figure is that of a model made another way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.precision_cost import Precision, depths, kinds, measured_rows, opened, packed_layers, tables
from lbllm.errors import RunError
from lbllm.labels import STAGE_NAMES
from lbllm.measure.perplexity import perplexity
from lbllm.pipeline.packed_model import stage_model
from lbllm.pipeline.start import settings_to_go_on
from lbllm.quant.packing import decode_params, encode_params
from lbllm.sections import QuantConfig, Stage
from tests.helpers.tiny_runs import bfloat_teacher, run_config, run_tiny, tiny_teacher, token_ids

WINDOWS = token_ids(6, seed=5)


@pytest.fixture(scope="module")
def precision(tmp_path_factory: pytest.TempPathFactory) -> Precision:
    folder = tmp_path_factory.mktemp("precision")
    config, teacher = run_config(), tiny_teacher("llama", num_hidden_layers=3)
    run_tiny(config, folder, teacher)
    (folder / "config.json").write_text(config.model_dump_json())
    return Precision(config, folder, teacher, WINDOWS, lambda line: None)


def made(precision: Precision, **quant: int) -> float:
    """The perplexity of the run's model with other bits, as settings give them."""
    changed = precision.config.quant.model_copy(update=quant)
    config = precision.config.model_copy(update={"quant": changed})
    return perplexity(stage_model(config, precision.folder, "aar", precision.teacher), WINDOWS).perplexity


def test_bits_of_activations_and_cache(precision: Precision) -> None:
    rows = {row.label: row for row in precision.by_bits()}
    assert list(rows) == ["A16KV16", "A16KV4", "A8KV4", "A4KV16", "A4KV4"]
    assert rows["A4KV4"].perplexity == pytest.approx(made(precision), rel=1e-5)
    assert rows["A16KV16"].perplexity == pytest.approx(made(precision, act_bits=16, kv_bits=16), rel=1e-5)
    assert rows["A4KV16"].perplexity == pytest.approx(made(precision, kv_bits=16), rel=1e-5)
    assert len({row.perplexity for row in rows.values()}) == 5
    eight = precision.config.model_copy(update={"quant": precision.config.quant.model_copy(update={"act_bits": 8})})
    model = stage_model(eight, precision.folder, "aar", precision.teacher)
    for layer in packed_layers(model).values():
        assert layer.quantizer is not None
        layer.quantizer.act.data.fill_(1)  # the whole range of each token, as without the clips of four bits
    assert rows["A8KV4"].perplexity == pytest.approx(perplexity(model, WINDOWS).perplexity, rel=1e-5)
    assert rows["A16KV16"].change == 0


def test_group_parameters_in_eight_bits(precision: Precision) -> None:
    second, last = precision.by_params(made(precision))
    assert last.perplexity == pytest.approx(made(precision, param_bits=8), rel=1e-5)
    assert last.base == made(precision)
    assert second.base != last.base
    assert second.perplexity != second.base
    wide, narrow = (packed_layers(precision.model(4, bits, "wat")) for bits in (16, 8))
    assert wide.keys() == narrow.keys()
    for name, layer in wide.items():
        assert narrow[name].params_scale is not None
        stored = decode_params(narrow[name].params, narrow[name].params_scale)
        torch.testing.assert_close(stored, decode_params(*encode_params(layer.params.float())))
    narrow_run = precision.config.model_copy(
        update={"quant": precision.config.quant.model_copy(update={"param_bits": 8})}
    )
    assert not Precision(narrow_run, precision.folder, precision.teacher, WINDOWS, print).by_params(1.0)


def test_groups_take_the_activations_apart(precision: Precision) -> None:
    by_kind = kinds(precision.teacher, WINDOWS[:1, :8])
    assert list(by_kind) == [
        "self_attn.q_proj, k_proj, v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj, up_proj",
        "mlp.down_proj",
    ]
    names = set().union(*by_kind.values())
    assert names == packed_layers(precision.model(4, 16)).keys()
    by_depth = depths(precision.teacher, names)
    assert [len(members) for members in by_depth.values()] == [7, 7, 7]
    assert set().union(*by_depth.values()) == names
    free, deployed = made(precision, act_bits=16), made(precision)
    whole, alone = precision.by_group({"all": names}, free, deployed)[0]
    assert (whole.perplexity, alone.perplexity) == pytest.approx((free, deployed), rel=1e-5)
    assert (whole.base, alone.base) == (deployed, free)
    parts = precision.by_group(by_kind, free, deployed)
    left = [without.perplexity for without, _ in parts]
    assert left == sorted(left)
    assert len({row.perplexity for pair in parts for row in pair}) == 8


def test_tables_and_names(precision: Precision) -> None:
    found = measured_rows(precision)
    assert [row["part"] for row in found] == ["bits"] * 5 + ["params"] * 2 + ["inputs"] * 4 + ["depth"] * 3
    assert found[4]["change"] == pytest.approx(found[4]["perplexity"] / found[0]["perplexity"] - 1)
    lines = tables(found, precision.act).splitlines()
    assert lines[0] == "| activations, KV cache | perplexity | over A16KV16 |"
    assert sum(line.startswith("| blocks ") for line in lines) == 3
    assert sum(line.startswith(("| mlp.", "| self_attn.")) for line in lines) == 4
    config, folder = opened(str(precision.folder))
    assert (config, folder) == (precision.config, precision.folder)


def test_a_run_that_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    teacher = bfloat_teacher()
    run_tiny(run_config(), tmp_path / "first", teacher)
    start = settings_to_go_on(str(tmp_path / "first" / "checkpoint")) | {"model": "tiny"}
    settings = run_config(**start, e2e={"tokens": 96, "batch_tokens": 64})
    run_tiny(settings, tmp_path / "second", teacher)
    further = Precision(settings, tmp_path / "second", teacher, WINDOWS, lambda line: None)
    begun, ended = further.by_params(1.0)
    assert (begun.label, ended.base) == (STAGE_NAMES["start"], 1.0)
    first = perplexity(stage_model(settings, tmp_path / "second", "start", teacher), WINDOWS).perplexity
    assert begun.base == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize("stages", [("ptq",), ("ptq", "wat"), ("ptq", "wat", "e2e")], ids="-".join)
def test_a_run_that_leaves_activations_alone_has_group_parameters_to_tell_of(
    stages: tuple[Stage, ...], tmp_path: Path
) -> None:
    teacher, e2e = tiny_teacher("llama"), {"tokens": 64, "batch_tokens": 64}
    settings = run_config(stages=stages, e2e=e2e)
    run_tiny(settings, tmp_path, teacher)
    precision = Precision(settings, tmp_path, teacher, WINDOWS, lambda line: None)
    plain, narrow = (
        perplexity(stage_model(config, tmp_path, stages[-1], teacher), WINDOWS).perplexity
        for config in (settings, settings.model_copy(update={"quant": QuantConfig(group_size=16, param_bits=8)}))
    )
    (only,) = precision.by_bits()
    assert only.label == "A16KV16"
    assert only.perplexity == pytest.approx(plain, rel=1e-6)
    rows = precision.by_params(plain)
    assert [row.label for row in rows] == [STAGE_NAMES[stage] for stage in stages if stage != "ptq" or len(stages) == 1]
    assert rows[-1].base == plain
    assert rows[-1].perplexity == pytest.approx(narrow, rel=1e-6)
    lines = tables(measured_rows(precision), precision.act).splitlines()
    assert lines[-1].startswith(f"| {STAGE_NAMES[stages[-1]]} | {plain:,.2f} | {narrow:,.2f} |")


def test_bad_runs(precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBLLM_HOME", str(tmp_path))
    with pytest.raises(RunError, match="no run 'elsewhere'"):
        opened("elsewhere")
    (tmp_path / "blocks").mkdir()
    with pytest.raises(RunError, match=r"can't be read from config\.json"):
        opened(str(tmp_path))
