"""Settings: what is refused, by its name and value, before anything is loaded; what is written can be read again."""

from __future__ import annotations

import json

import pytest

from lbllm.config import make_config, parse_config, read_settings
from lbllm.errors import ConfigError
from lbllm.presets import PRESETS


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
