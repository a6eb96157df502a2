"""The Quantize page's logic, without a browser: settings, what they give and take, commands and files, refusals."""

import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import typer
from streamlit.testing.v1 import AppTest

from app.quantize.settings import ADVANCED, WIDGETS
from lbllm.commands.main import build
from lbllm.commands.options import run_config
from lbllm.config import RunConfig, arguments, make_config
from lbllm.models.loading import quiet
from lbllm.presets import ABOUT, PRESETS
from lbllm.runs.store import RunStore
from tests.helpers import ROOT
from tests.helpers.finished_run import finished_run
from tests.helpers.homes import own_home
from tests.helpers.tiny_models import save_tiny
from tests.helpers.waiting import wait_until

PAGE_SECONDS = 60
PAGE = ROOT / "app" / "pages" / "quantize.py"
BITS = "Bits per binarized weight"


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AppTest:
    """The page over a home without runs."""
    monkeypatch.setenv("LBLLM_HOME", str(own_home(tmp_path / "home", "kernels", "models")))
    monkeypatch.setenv("LBLLM_ROOT", str(tmp_path))
    return opened(AppTest.from_file(PAGE, default_timeout=PAGE_SECONDS))


def opened(app: AppTest) -> AppTest:
    """The page when it has read the model's description, which a browser waits for by itself."""
    wait_until(lambda: not any("Reading the model" in text.value for text in app.run().caption), PAGE_SECONDS)
    return app


def figure(app: AppTest, label: str) -> str:
    return next(metric.value for metric in app.metric if metric.label == label)


def widget(app: AppTest, path: str) -> Any:
    key = f"quantize {path}"
    return next(w for kind in (app.button_group, app.number_input, app.selectbox) for w in kind if w.key == key)


def start_is_disabled(app: AppTest) -> bool:
    return bool(app.button(key="quantize start").disabled)


def settings(app: AppTest) -> RunConfig:
    return RunConfig.model_validate(app.session_state["quantize document"])


def type_in(app: AppTest, name: str, text: str) -> None:
    """Type what is no option of a picker, as a browser lets one do."""
    box = app.selectbox(key=f"quantize {name}")
    box.options.append(text)
    box.set_value(text).run()


def said(elements: Iterable[Any]) -> str:
    """Messages as they are read, their Markdown escapes taken out."""
    return re.sub(r"\\(.)", r"\1", "\n".join(element.value for element in elements))


def upload(app: AppTest, content: bytes) -> AppTest:
    return app.file_uploader[0].set_value(("settings.json", content, "application/json")).run()


def test_the_page_opens_on_the_embedded_model(app: AppTest) -> None:
    assert not app.error
    assert not app.exception
    assert figure(app, BITS) == "3.02"
    assert figure(app, "On disk") == "96.9 MB"
    assert any("106M" in text.value and "will be binarized" in text.value for text in app.markdown)
    assert "Apache" in said(app.caption)
    markup: Any = app.get("html")[0]
    assert "sign bits 13.3 MB" in markup.value
    assert not start_is_disabled(app)


def test_figures_follow_every_change(app: AppTest) -> None:
    widget(app, "quant.param_bits").set_value(16).run()
    widget(app, "quant.group_size").set_value(64).run()
    assert figure(app, BITS) == "3.00"
    assert figure(app, "On disk") == "96.6 MB"
    widget(app, "quant.group_size").set_value(-1).run()
    assert figure(app, BITS) == "2.09"
    widget(app, "quant.format").set_value("w1").run()
    assert figure(app, BITS) == "1.05"
    widget(app, "quant.param_bits").set_value(8).run()
    assert settings(app).quant.param_bits == 8
    assert not start_is_disabled(app)


def test_a_preset_sets_everything_but_the_model(app: AppTest) -> None:
    widget(app, "quant.group_size").set_value(32).run()
    app.button_group(key="quantize preset").set_value("paper").run()
    assert settings(app) == make_config("paper")
    assert widget(app, "quant.group_size").value == 128


@pytest.mark.parametrize("preset", PRESETS)
def test_the_page_says_what_the_chosen_preset_is(app: AppTest, preset: str) -> None:
    assert ABOUT["quick"] in said(app.caption)
    app.button_group(key="quantize preset").set_value(preset).run()
    assert [words for words in ABOUT.values() if words in said(app.caption)] == [ABOUT[preset]]
    app.button_group(key="quantize preset").set_value(None).run()
    assert not [words for words in ABOUT.values() if words in said(app.caption)]


def test_activations_wait_for_stage_3(app: AppTest) -> None:
    widget(app, "stages").set_value(("ptq",)).run()
    assert settings(app).stages == ("ptq",)
    assert widget(app, "quant.act_bits").disabled
    assert widget(app, "quant.kv_bits").disabled


def test_a_local_model_under_the_root(app: AppTest, tmp_path: Path) -> None:
    save_tiny(tmp_path / "mine", "llama")
    type_in(app, "model", "mine")
    assert settings(app).model == str(tmp_path / "mine")
    # Its context has 256 tokens, its rows 48 weights.
    assert "model's context of 256" in said(app.error)
    assert start_is_disabled(app)
    widget(app, "seq_len").set_value(64).run()
    assert not app.error
    widget(app, "quant.group_size").set_value(64).run()
    assert "Group size 64 is longer than a row" in said(app.error)
    assert start_is_disabled(app)
    widget(app, "quant.group_size").set_value(32).run()
    assert not app.error
    assert not start_is_disabled(app)


def test_models_that_cannot_be_are_refused_with_a_way_out(app: AppTest) -> None:
    refused = {
        "/etc": "lies outside",
        "../elsewhere": "lies outside",
        "smollm3": "is not known; close names: smollm2-360m",
        "<img src=x onerror=alert(1)>": "is not known",
    }
    for name, message in refused.items():
        type_in(app, "model", name)
        assert message in said(app.error)
        assert all(r"\<img" in error.value for error in app.error if "img" in error.value)
        assert start_is_disabled(app)
        assert not app.exception


def test_too_little_memory_disables_start_and_says_what_takes_it(app: AppTest) -> None:
    widget(app, "wat.batch_tokens").set_value(100_000_000).run()
    assert "GB of memory" in said(app.warning)
    assert "Stage 2, batch size in tokens" in said(app.warning)
    assert start_is_disabled(app)


def test_a_text_that_is_not_there_disables_start(app: AppTest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LBLLM_DATA_DIR", raising=False)
    app.selectbox(key="quantize corpus").set_value("chat").run()
    assert "LBLLM" in said(app.warning)
    assert start_is_disabled(app)


def test_a_file_of_settings_fills_every_widget(app: AppTest) -> None:
    config = make_config(
        "quick",
        {
            "seed": 7,
            "stages": ["ptq", "wat"],
            "quant": {"group_size": 96, "skip": ["*.o_proj"], "overrides": {"*.down_proj": {"group_size": 32}}},
            "wat": {"lr_weight": 0.0123},
            "aar": {"temperature": 0.7},
        },
    )
    upload(app, config.model_dump_json().encode())
    assert not app.error
    # What has no widget (the temperature) is kept, too.
    assert settings(app) == config
    assert widget(app, "quant.group_size").value == 96
    app.run()
    assert settings(app) == config


def test_a_bad_file_gets_the_engines_message_and_changes_nothing(app: AppTest) -> None:
    before = settings(app)
    bad = {
        b"{": "not valid JSON",
        b"\xff\xfe": "not valid JSON",
        b"[1]": "holds a list",
        b'{"quant": {"group_size": 0}}': "Group size: a group has at least one member",
        b'{"aar": {"epochs": -1}}': "Stage 3, epochs: Input should be greater than or equal to 0 (given: -1)",
        b'{"quant": {"overrides": {"*.v_proj": {"act_bits": 5}}}}': "Layers *.v_proj, activation bits: Input should be",
        b'{"quantt": {}}': "is not a setting",
        b'{"quant": 3}': "Format: a JSON object of settings is needed (given: 3)",
        b'{"schema_version": 99}': "schema version 99",
        b'{"stages": ["wat"]}': "Stages: stages run in the order",
    }
    for content, message in bad.items():
        upload(app, content)
        assert message in said(app.error)
        assert settings(app) == before
        assert not app.exception
    upload(app, b'{"seed": 3}')
    assert not app.error
    assert settings(app).seed == 3


@pytest.mark.parametrize("start", ["/etc", "../..", "/tmp/checkpoint", "~"])
def test_a_file_cannot_start_from_a_path_outside_the_root(app: AppTest, start: str) -> None:
    before = settings(app)
    upload(app, json.dumps({"start": start, "stages": ["e2e"]}).encode())
    assert "outside" in said(app.error)
    assert settings(app) == before


def test_a_file_cannot_name_a_path_outside_the_root(app: AppTest) -> None:
    upload(app, json.dumps({"model": "/etc", "corpus": "/etc/passwd"}).encode())
    assert "lies outside" in said(app.error)
    assert start_is_disabled(app)


def parsed(command: str) -> RunConfig:
    """The settings that the command line makes of a command, as a shell would split it."""
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "lbllm", "quantize"]
    quantize = typer.main.get_command(build()).commands["quantize"]  # type: ignore[attr-defined]
    given = quantize.make_context("quantize", words[4:]).params
    others = ("out", "ignore_memory", "as_json", "config", "processes")
    return run_config(**{name: value for name, value in given.items() if name not in others})


def test_the_command_gives_the_settings_of_the_page(app: AppTest) -> None:
    widget(app, "quant.group_size").set_value(128).run()
    widget(app, "wat.epochs").set_value(5).run()
    command = app.code[0].value
    assert "--group-size 128" in command
    assert parsed(command) == settings(app)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_setting_survives_the_command_line(preset: str) -> None:
    changes = {
        "model": "a folder/it's",
        "corpus": "embedded+chat",
        "stages": ["ptq"],
        "quant": {"format": "w1", "overrides": {"*.[qk]_proj": {"param_bits": 8}}, "skip": ["*.0.*", "*.o_proj"]},
        "wat": {"lr_weight": 1e-7, "bitmap": "relaxed"},
    }
    config = make_config(preset, changes)
    command = shlex.join(["python", "-m", "lbllm", "quantize", *arguments(config), "--out", "x"])
    assert parsed(command) == config


def test_every_widget_is_a_setting() -> None:
    document = make_config().model_dump()
    for setting in WIDGETS:
        value: Any = document
        for part in setting.path.split("."):
            value = value[part]
    assert len({setting.path for setting in WIDGETS}) == len(WIDGETS)
    assert set(ADVANCED) == {"All stages", "Stage 1", "Stage 2", "Stage 3", "Stage 4"}


def test_time_is_told_by_the_numbers_of_the_stages(app: AppTest) -> None:
    widget(app, "stages").set_value(("ptq", "wat", "e2e")).run()
    time = next(metric for metric in app.metric if metric.label == "Estimated time")
    assert re.findall(r"stage (\d):", time.help) == ["1", "2", "4"]


def test_a_machine_with_several_gpus_can_share_a_run_among_them(app: AppTest, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [one for one in app.number_input if one.key == "quantize processes"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    started: list[int] = []
    monkeypatch.setattr(RunStore, "start", lambda store, run_id, processes: started.append(processes))
    app.run()
    app.number_input(key="quantize processes").set_value(2).run()
    app.button(key="quantize start").click().run()
    assert started == [2]


def test_a_finished_run_is_trained_further_in_its_own_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBLLM_HOME", str(own_home(tmp_path / "home", "kernels", "models")))
    monkeypatch.setenv("LBLLM_ROOT", str(tmp_path))
    first = finished_run(RunStore(), tmp_path)
    app = AppTest.from_file(PAGE, default_timeout=PAGE_SECONDS)
    app.query_params["from"] = first.id
    opened(app)
    assert not app.exception
    assert not app.error
    assert first.id in said(app.info)
    assert settings(app).start == str(first.folder / "checkpoint")
    assert settings(app).quant == first.config.quant
    assert (settings(app).corpus, settings(app).seed) == (first.config.corpus, first.config.seed + 1)
    assert widget(app, "quant.format").disabled
    assert widget(app, "wat.tokens").disabled
    assert widget(app, "stream_dtype").disabled  # no stage goes block by block
    assert not widget(app, "e2e.tokens").disabled
    widget(app, "e2e.tokens").set_value(64).run()
    assert widget(app, "quant.group_size").options == ["16"]  # no size of the list divides the checkpoint's
    widget(app, "quant.param_bits").set_value(8).run()
    assert settings(app).quant == first.config.quant.model_copy(update={"param_bits": 8})
    assert not start_is_disabled(app)
    assert any("only stage 4" in metric.delta for metric in app.metric)
    app.button(key="quantize start").click().run()
    (run,) = [run for run in RunStore().all() if run.id != first.id]
    assert (run.config.start, run.config.stages, run.config.e2e.tokens) == (settings(app).start, ("e2e",), 64)
    RunStore().request(run.id, "cancel")

    app.button(key="quantize anew").click().run()
    assert settings(app).start is None
    assert not widget(app, "quant.format").disabled
    assert not start_is_disabled(app)


def test_activations_of_a_run_of_weights_alone_can_be_brought_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LBLLM_HOME", str(own_home(tmp_path / "home", "kernels", "models")))
    monkeypatch.setenv("LBLLM_ROOT", str(tmp_path))
    first = finished_run(RunStore(), tmp_path, ("ptq", "wat"))
    app = AppTest.from_file(PAGE, default_timeout=PAGE_SECONDS)
    app.query_params["from"] = first.id
    opened(app)
    assert not app.exception
    assert "stages 3–4" in said(app.info)
    assert widget(app, "stages").options == ["4", "3–4"]
    assert (settings(app).stages, settings(app).quant.act_bits, settings(app).quant.kv_bits) == (("e2e",), 16, 16)
    assert widget(app, "quant.act_bits").disabled
    assert widget(app, "aar.tokens").disabled

    widget(app, "stages").set_value(("aar", "e2e")).run()
    assert not app.exception
    assert (settings(app).stages, settings(app).quant.act_bits, settings(app).quant.kv_bits) == (("aar", "e2e"), 4, 4)
    assert not widget(app, "aar.tokens").disabled
    assert widget(app, "quant.format").disabled
    assert settings(app).quant.act_group_size == 64
    widget(app, "quant.act_bits").set_value(8).run()
    widget(app, "quant.act_group_size").set_value(-1).run()
    assert (settings(app).quant.act_bits, settings(app).quant.act_group_size) == (8, -1)
    assert not start_is_disabled(app)
    (command,) = [code.value for code in app.code if "lbllm quantize" in code.value]
    assert "--act-bits 8 --kv-bits 4" in command
    assert "quant.act_group_size=-1" in command
    assert "stages" not in command

    widget(app, "stages").set_value(("e2e",)).run()
    assert (settings(app).quant.act_bits, settings(app).quant.kv_bits) == (16, 16)


def test_an_unknown_run_to_train_further_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBLLM_HOME", str(own_home(tmp_path / "home", "kernels", "models")))
    app = AppTest.from_file(PAGE, default_timeout=PAGE_SECONDS)
    app.query_params["from"] = "../../elsewhere"
    opened(app)
    assert not app.exception
    assert "../../elsewhere" in said(app.error)


def test_a_reload_keeps_the_settings_and_a_copied_address_opens_a_copy(app: AppTest) -> None:
    widget(app, "quant.group_size").set_value(128).run()
    widget(app, "seed").set_value(7).run()
    app.text_input(key="quantize name").set_value("mine").run()
    type_in(app, "corpus", "not-there.txt")
    address = app.query_params["form"]

    def again() -> AppTest:
        other = AppTest.from_file(PAGE, default_timeout=PAGE_SECONDS)
        other.query_params["form"] = address
        return opened(other)

    copied = again()
    assert (widget(copied, "quant.group_size").value, widget(copied, "seed").value) == (128, 7)
    assert copied.text_input(key="quantize name").value == "mine"
    assert copied.selectbox(key="quantize corpus").value == "not-there.txt"
    assert copied.query_params["form"] != address
    widget(copied, "seed").set_value(8).run()
    assert widget(again(), "seed").value == 7  # what another visitor of the address does changes nothing here
    fresh = opened(AppTest.from_file(PAGE, default_timeout=PAGE_SECONDS))
    assert widget(fresh, "seed").value == 0


def test_a_bad_text_hides_no_figure(app: AppTest) -> None:
    figures = [metric.value for metric in app.metric[:2]]
    type_in(app, "corpus", "not-there.txt")
    assert [metric.value for metric in app.metric[:2]] == figures
    assert "not-there.txt" in said(app.warning)
    assert start_is_disabled(app)
    assert not app.code  # no command for another text than the one that is typed
    app.selectbox(key="quantize corpus").set_value("embedded").run()
    assert not start_is_disabled(app)


def test_settings_that_no_chosen_stage_reads_are_disabled_and_say_why(app: AppTest) -> None:
    widget(app, "stages").set_value(("ptq", "wat", "e2e")).run()
    for path in ("aar.tokens", "aar.lr_act", "quant.act_bits", "quant.act_group_size", "e2e.lr_act", "wat.lr_bitmap"):
        assert widget(app, path).disabled, path
        assert "Not used: " in widget(app, path).help
    assert "Stage 3 is not among the chosen stages" in said(app.caption)
    assert not widget(app, "e2e.tokens").disabled
    widget(app, "stages").set_value(("ptq",)).run()
    assert widget(app, "wat.tokens").disabled
    assert widget(app, "e2e.tokens").disabled
    widget(app, "stages").set_value(("ptq", "wat", "aar", "e2e")).run()
    widget(app, "wat.bitmap").set_value("relaxed").run()
    assert not any(widget(app, path).disabled for path in ("aar.tokens", "quant.act_bits", "wat.lr_bitmap"))
    assert "Not used" not in said(app.caption)


def test_a_changed_preset_says_so_and_leads_back(app: AppTest) -> None:
    assert "Changed from" not in said(app.caption)
    widget(app, "quant.group_size").set_value(32).run()
    widget(app, "seed").set_value(3).run()
    assert "Changed from Quick: Seed, Group size" in said(app.caption)
    app.button(key="quantize back").click().run()
    assert "Changed from" not in said(app.caption)
    assert settings(app) == make_config("quick")
    widget(app, "seq_len").set_value(100_000).run()  # more than the model's context: no figures, but the way back
    assert "Changed from Quick: Sequence length" in said(app.caption)
    app.button(key="quantize back").click().run()
    assert not app.error


def test_the_form_is_there_before_the_model_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBLLM_HOME", str(own_home(tmp_path / "home", "kernels", "models")))
    monkeypatch.setenv("LBLLM_ROOT", str(tmp_path))
    save_tiny(tmp_path / "read-slowly", "llama")
    app = AppTest.from_file(PAGE, default_timeout=PAGE_SECONDS)
    opened(app)
    with quiet():  # as while another model is loaded
        type_in(app, "model", "read-slowly")
        assert "Reading the model" in said(app.caption)
        assert start_is_disabled(app)
        widget(app, "seq_len").set_value(64).run()
        assert settings(app).seq_len == 512  # the document waits, too
    opened(app)
    assert settings(app).seq_len == 64
    assert figure(app, BITS)
    assert not start_is_disabled(app)
    assert not app.exception
