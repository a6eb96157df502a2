"""One block tried out beside other methods, on a tiny model: in the engine, and on the page's chart."""

from __future__ import annotations

import json

import pytest
from streamlit.testing.v1 import AppTest

from lbllm.config import RunConfig
from lbllm.errors import ConfigError
from lbllm.measure.preview import choices, initialize, measure, take_block
from lbllm.sections import WHOLE_ROW
from tests.helpers.tiny_runs import stored_run_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return stored_run_config(tmp_path_factory.mktemp("preview"))


def test_methods_are_measured_on_the_same_block(config: RunConfig) -> None:
    sample = take_block(config, 1)
    formats = choices(sample, config)
    assert choices(sample, config, ["rtn", "gptq"]) == [
        *formats,
        *((name, size) for name in ("rtn", "gptq") for size in (16, WHOLE_ROW)),
    ]
    before = {name: value.clone() for name, value in sample.block.state_dict().items()}
    fine, coarse = measure(sample, config, "rtn", 16), measure(sample, config, "rtn", WHOLE_ROW)
    assert 0 < fine.error < coarse.error
    assert 4 <= fine.bpw < 4.2  # two bits, and two 16-bit numbers for each 16 weights
    assert measure(sample, config, "w1+1", 16) == initialize(sample, config, "w1+1", 16).point
    assert all(value.equal(before[name]) for name, value in sample.block.state_dict().items())
    with pytest.raises(ConfigError, match="'awq' is not known"):
        measure(sample, config, "awq", 16)


def page(document: str) -> None:
    import json

    from app.quantize.preview import show_preview
    from lbllm.config import parse_config

    show_preview(parse_config(json.loads(document)), 2)


def lines(at: AppTest) -> list[str]:
    (chart,) = at.get("plotly_chart")
    return [trace["name"] for trace in json.loads(chart.proto.spec)["data"] if "name" in trace]


def test_chosen_methods_join_the_chart(config: RunConfig) -> None:
    at = AppTest.from_function(page, args=(config.model_dump_json(),), default_timeout=300).run()
    at.button(key="quantize preview").click().run()
    assert not at.exception
    assert lines(at) == ["W(1+1)", "W1", "W(1+1+1)"]
    at.multiselect(key="quantize preview methods").set_value(["rtn"]).run()
    assert lines(at) == ["W(1+1)", "W1", "W(1+1+1)"]  # nothing is computed before Preview is pressed again
    at.button(key="quantize preview").click().run()
    assert not at.exception
    assert lines(at) == ["W(1+1)", "W1", "W(1+1+1)", "Round to nearest"]
    assert "Round to nearest" in at.caption[-1].value
    assert "(4.03 bits)" in at.caption[-1].value
    at.multiselect(key="quantize preview methods").set_value([]).run()
    assert lines(at) == ["W(1+1)", "W1", "W(1+1+1)"]
