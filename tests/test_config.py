"""Settings: what is refused, by its name and value, before anything is loaded; what is written can be read again."""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from lbllm.chat.settings import ChatSettings
from lbllm.config import (
    CONTINUATIONS,
    DEFAULT_MODEL,
    FROM_CHECKPOINT,
    SETTINGS,
    TO_ACTIVATIONS,
    RunConfig,
    label,
    labels_alone,
    make_config,
    options_named,
    parse_config,
    read_settings,
    setting_name,
)
from lbllm.errors import ConfigError
from lbllm.presets import ABOUT, PRESETS
from lbllm.sections import STAGES, WHOLE_ROW, QuantConfig, Stage
from tests.helpers import ROOT


@pytest.mark.parametrize(
    ("assignment", "complaint"),
    [
        ("quant.group_size=0", r"quant\.group_size.*at least one member.*given: 0"),
        ("quant.group_size=-2", r"quant\.group_size.*given: -2"),
        (
            'quant.overrides={"*.up_proj": {"group_size": 0}}',
            r"overrides\.\*\.up_proj\.group_size.*at least one member",
        ),
        ("wat.lr_weight=Infinity", r"wat\.lr_weight.*finite number.*given: inf"),
        ("aar.lr_act=1e999", r"aar\.lr_act.*finite number"),
        ("ptq.damping=NaN", r"ptq\.damping.*given: nan"),
        ("seed=-1", r"seed.*given: -1"),
        ("seed=99999999999999999999", r"seed.*given: 99999999999999999999"),
        ("model=", r"model.*at least 1 character"),
        ("corpus=", r"corpus.*at least 1 character"),
        ("wat=5", r"wat.*given: 5"),
    ],
)
def test_values_that_cannot_work_are_refused(assignment: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_config("quick", assignments=(assignment,))


@pytest.mark.parametrize("preset", PRESETS)
def test_an_assignment_leaves_preset_and_changes_as_they_were(preset: str) -> None:
    changes = {"wat": {"epochs": 2}}
    before = make_config(preset, changes)
    make_config(preset, changes, ("aar.epochs=7", "e2e.tokens=9", "wat.epochs=5"))
    assert make_config(preset, changes) == before


@pytest.mark.parametrize("preset", PRESETS)
def test_settings_survive_their_file(preset: str) -> None:
    config = make_config(preset, {"quant": {"overrides": {"*.v_proj": {"group_size": -1}}, "skip": ["*.k_proj"]}})
    assert parse_config(json.loads(config.model_dump_json())) == config


def test_settings_of_an_older_run_stay_what_they_were() -> None:
    """What such a run's file lacks did not exist yet, whatever a preset says of it now."""
    document = json.loads(make_config("quick", {"quant": {"group_size": 64, "act_bits": 8}}).model_dump_json())
    del document["quant"]["act_group_size"], document["quant"]["param_bits"], document["e2e"]
    named, settings = read_settings(json.dumps(document), "config.json")
    assert named == "quick"
    assert make_config(named, settings) == parse_config(document)
    # A file of a few settings changes the preset that it names.
    named, settings = read_settings('{"preset": "quick", "quant": {"group_size": 64}}', "settings.json")
    assert (named, settings) == ("quick", {"quant": {"group_size": 64}})


def test_an_older_run_kept_its_hidden_states_in_float32() -> None:
    document = json.loads(make_config("quick").model_dump_json())
    assert document.pop("stream_dtype") == "bfloat16"
    del document["aar"]["loss"]
    assert (parse_config(document).stream_dtype, parse_config(document).aar.loss) == ("float32", "relative")
    named, settings = read_settings(json.dumps(document), "config.json")
    assert make_config(named or "", settings) == parse_config(document)
    assert parse_config(document | {"stream_dtype": "bfloat16"}).stream_dtype == "bfloat16"
    # The settings of a new run, in whatever form they come, have today's default.
    assert {make_config(preset).stream_dtype for preset in PRESETS} | {RunConfig().stream_dtype} == {"bfloat16"}
    assert make_config(*read_settings('{"preset": "paper", "seed": 3}', "settings.json")).stream_dtype == "bfloat16"


def test_the_paper_preset_is_the_paper() -> None:
    """What the paper states of its method, its format and its data; see docs/method.md."""
    paper = make_config("paper")
    assert paper.stages == ("ptq", "wat", "aar")
    quant = paper.quant
    assert (quant.format, quant.group_size, quant.param_bits) == ("w1+1", 128, 16)
    assert (quant.act_bits, quant.kv_bits, quant.act_group_size) == (4, 4, WHOLE_ROW)
    assert (quant.skip, quant.overrides) == ((), {})
    assert (paper.ptq.sweeps, paper.ptq.align) == (0, 0)
    assert (paper.wat.bitmap, paper.wat.loss, paper.aar.loss) == ("relaxed", "mse", "mse")
    assert paper.wat.reg_weight > 0
    assert (paper.corpus, paper.seq_len) == ("redpajama", 2_048)
    assert (paper.wat.tokens, paper.wat.epochs) == (paper.aar.tokens, paper.aar.epochs) == (8_192 * 2_048, 1)
    assert paper.wat.tokens / paper.wat.batch_tokens >= 1_000  # its rates are made for thousands of steps


def test_what_a_preset_is_is_one_sentence() -> None:
    assert ABOUT.keys() == PRESETS.keys()
    for name, words in ABOUT.items():
        assert (words.count("."), words[-1], len(words) < 250) == (1, ".", True), name
        assert f"{name}: {words}" in str(SETTINGS["preset"].description)
    assert "The paper's method" in ABOUT["paper"]
    assert all(words.startswith("Our method") for name, words in ABOUT.items() if name != "paper")


def test_every_setting_has_a_label_of_its_own_and_a_help_of_whole_sentences() -> None:
    labels = Counter(label(path) for path in SETTINGS)
    assert [name for name, count in labels.items() if count > 1 or not name] == []
    assert [path for path, field in SETTINGS.items() if not (field.description or "").endswith(".")] == []
    assert label("quant.param_bits") == "Bits of group parameters"
    assert label("e2e.start_share") == "Stage 4, share of the starting weights"
    assert label("ptq.em_steps") == "Stage 1, EM steps"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("seq_len", "Sequence length"),
        ("wat", "Stage 2"),
        ("stages.0", "Stages"),
        ("quant.skip.1", "Layers to leave dense"),
        ("quant.overrides.*.down_proj.group_size", "Layers *.down_proj, group size"),
        ("quant.overrides.*.down_proj", "Layers *.down_proj"),
        ("wat.nonsense", "wat.nonsense"),
        ("nonsense", "nonsense"),
    ],
)
def test_messages_have_name_and_label_and_pages_the_label_alone(path: str, expected: str) -> None:
    name = setting_name(path)
    assert name.startswith(path)
    assert (
        labels_alone(f"bad settings: {name}: no; {name} 5 (given: 5)")
        == f"bad settings: {expected}: no; {expected} 5 (given: 5)"
    )
    assert labels_alone(f"({name})") == f"({expected})"


def test_the_command_line_names_its_options() -> None:
    text = f"{setting_name('quant.group_size')} 5, {setting_name('wat.epochs')} 0, {setting_name('start')}: no"
    assert options_named(text) == "--group-size 5, wat.epochs (Stage 2, epochs) 0, --from: no"


def test_other_words_before_a_parenthesis_stay() -> None:
    text = "the model (llama) on this device (cpu), text (Text), wat.tokens (512)"
    assert labels_alone(text) == text


@pytest.mark.parametrize("stages", CONTINUATIONS)
def test_a_checkpoint_fixes_model_format_and_the_stages_before(stages: tuple[Stage, ...]) -> None:
    assert make_config().fixed_by_start() == frozenset()
    config = make_config("quick", {"start": "somewhere", "stages": stages})
    fixed = config.fixed_by_start()
    assert {"model", "quant.format", "quant.skip", "ptq.tokens", "wat.bitmap"} <= fixed
    assert not fixed & {"corpus", "seed", "seq_len", "device", "stages", "start", "e2e.lr_weight"}
    lowers = stages == TO_ACTIVATIONS
    assert ("quant.act_bits" in fixed, "quant.tail_steps" in fixed, "aar.epochs" in fixed) == (not lowers,) * 3
    assert not fixed & {"quant.group_size", "quant.param_bits", "quant.overrides"}
    assert fixed <= SETTINGS.keys()
    assert set(CONTINUATIONS[stages]) <= QuantConfig.model_fields.keys()
    assert set(CONTINUATIONS[FROM_CHECKPOINT]) <= set(CONTINUATIONS[stages])


def _strings(folder: str) -> Iterator[tuple[Path, str]]:
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield file.relative_to(ROOT), node.value


def test_labels_and_helps_stand_once() -> None:
    """A label of one word, like Text, is a word that has other uses, too."""
    fields = [*SETTINGS.values(), *ChatSettings.model_fields.values()]
    texts = {str(field.description) for field in fields}
    texts |= {str(field.title) for field in fields if " " in str(field.title)}
    homes = {Path("lbllm/config.py"), Path("lbllm/sections.py"), Path("lbllm/chat/settings.py")}
    found = [(file, text) for folder in ("lbllm", "app") for file, text in _strings(folder) if text in texts]
    assert [(file, text) for file, text in found if file not in homes] == []


def test_the_default_model_stands_once() -> None:
    found = [
        file for folder in ("lbllm", "app", "benchmarks") for file, text in _strings(folder) if text == DEFAULT_MODEL
    ]
    assert found == [Path("lbllm/config.py")]
    assert RunConfig().model == DEFAULT_MODEL


def test_the_order_of_the_stages_stands_once() -> None:
    orders = []
    for folder in ("lbllm", "app", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Tuple | ast.List):
                    names = [part.value for part in node.elts if isinstance(part, ast.Constant)]
                    if len(names) > 2 and set(names) <= set(STAGES):
                        orders.append(file.relative_to(ROOT))
    assert set(orders) == {Path("lbllm/sections.py")}
