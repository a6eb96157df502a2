"""The page Inspect without a browser: a tiny checkpoint under an allowed folder, beside its teacher."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streamlit.testing.v1 import AppTest

from app.microscope import filling as background
from app.microscope.changes import KINDS, ROUNDED, Change, choice_of
from app.microscope.filling import Filling, Step
from app.microscope.maps import short_names
from app.microscope.weights import COLUMNS, ROWS, tiles_data
from lbllm.chat.pool import ModelPool
from lbllm.errors import ConfigError, ModelError
from lbllm.microscope.address import Address
from lbllm.microscope.effect import effect
from lbllm.microscope.hybrid import Bits, Dense, FirstBlocks, Only
from lbllm.microscope.microscope import Microscope
from lbllm.microscope.pair import Pair
from tests.helpers import ROOT
from tests.helpers.cases import cases
from tests.helpers.tiny_models import save_tiny
from tests.helpers.tiny_runs import run_config, run_tiny, tiny_teacher
from tests.helpers.waiting import wait_until

PAGE = str(ROOT / "app" / "pages" / "inspect.py")
DENSE = "1/mlp.down_proj"
TEXT = "The river runs past the old mill."
Open = Callable[..., AppTest]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The allowed folder: a checkpoint with one dense layer, its teacher, and a model that is not its teacher."""
    root = tmp_path_factory.mktemp("root")
    config = run_config(stages=("ptq", "wat", "aar"), quant={"skip": ["*.1.mlp.down_proj"]})
    run_tiny(config, root / "run", tiny_teacher("llama"))
    save_tiny(root / "teacher", "llama")
    save_tiny(root / "other", "qwen3")
    return root


@pytest.fixture(scope="module")
def scope(root: Path) -> Microscope:
    return Microscope.open(str(root / "run" / "checkpoint"), str(root / "teacher"))


@pytest.fixture
def opened(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Opens the page at an address; the click that allows the link's models is made."""
    monkeypatch.setenv("LBLLM_HOME", str(tmp_path))
    monkeypatch.setenv("LBLLM_ROOT", str(root))

    def open_page(**address: str) -> AppTest:
        page = AppTest.from_file(PAGE, default_timeout=60)
        for name, value in ({"model": "run/checkpoint", "teacher": "teacher"} | address).items():
            page.query_params[name] = value
        page.run()
        if any(button.key == "inspect_open" for button in page.button):
            assert drawn(page) == {}
            page.button(key="inspect_open").click().run()
        assert not page.exception
        return page

    return open_page


def loaded(page: AppTest) -> AppTest:
    """The page with both models, after the click that loads them."""
    assert "inspect_slots" not in page.session_state
    page.button(key="inspect_load").click().run()
    for slot in page.session_state["inspect_slots"]:
        assert slot.wait(60)
    page.run()
    assert not page.exception
    return page


def drawn(page: AppTest) -> dict[str, dict[str, Any]]:
    """What the page's components draw, by their names: map, tiles, group, words, ranks."""
    parts = {part.proto.component_name: part.proto for part in page.get("bidi_component")}
    return {
        name.removeprefix("lbllm.microscope_"): json.loads(proto.json)
        for name, proto in parts.items()
        if name.startswith("lbllm.microscope_") and proto.json
    }


def written(page: AppTest) -> str:
    """All text that the page shows."""
    parts = [*page.markdown, *page.caption, *page.error, *page.info]
    text = "\n".join(str(part.value) for part in parts).replace("\\", "")
    return text + "\n".join(unescape(element.proto.body) for element in page.get("html"))


def test_an_address_opens_a_group_and_says_what_the_engine_says(opened: Open, scope: Microscope) -> None:
    page = opened(at="0/mlp.up_proj/3/1")
    layer = scope.layer("0/mlp.up_proj")
    group = layer.group(3, 1)
    assert f"<b>{100 * layer.error:.2f} %</b>" in written(page)
    assert f"<b>{layer.bits:.2f}</b>" in written(page)
    assert "**row 3, group 1**" in written(page)
    parts = drawn(page)
    assert parts["map"]["chosen"] == [0, scope.layers.index("mlp.up_proj")]
    assert parts["group"]["levels"] == group.levels.tolist()
    assert parts["group"]["before"]["levels"] == group.before_levels.tolist()
    # Each bit stands in the byte that the engine names.
    for plane, bits in zip(parts["group"]["planes"], (group.signs, group.bitmap), strict=True):
        shown = {number: bit for byte in plane["bytes"] for bit, number in byte["bits"] if number is not None}
        assert [shown[number] for number in range(len(bits))] == [str(int(one.value)) for one in bits]
        assert {byte["offset"] for byte in plane["bytes"]} == {one.offset for one in bits}
    assert [row[0] for row in parts["group"]["params"]] == ["alpha_0", "mu_0", "alpha_1", "mu_1"]
    tiles = parts["tiles"]
    rows, columns = tiles["window"]
    top, left = tiles["first"]
    part = layer.original[top : top + rows, left : left + columns]
    assert torch.tensor(tiles["planes"]["original"]).view(rows, columns).sub(part).abs().max() < 1e-4 * part.abs().max()
    assert (
        "".join(map(str, layer.sign[top : top + rows, left : left + columns].int().flatten().tolist()))
        == (tiles["planes"]["sign"])
    )


def test_the_map_fills_and_the_whole_says_where_to_begin(opened: Open, scope: Microscope) -> None:
    page = opened()
    wait_until(
        lambda: page.run() and all(known for row in drawn(page)["map"]["values"] for _, known in row), seconds=30
    )
    shown = drawn(page)
    expected = scope.overview("error").values
    assert [[value for value, _ in row] for row in shown["map"]["values"]] == [list(row) for row in expected]
    assert shown["map"]["values"][1][scope.layers.index("mlp.down_proj")] == [None, "dense"]
    largest = max(value for row in expected for value in row if value is not None)
    assert shown["ranks"]["rows"][0][1:] == [f"{100 * largest:.2f} %", 1.0]
    # A block has its layers.
    page.query_params["at"] = "1"
    page.run()
    assert [name for name, _, _ in drawn(page)["ranks"]["rows"]] == list(scope.shapes[1])


def test_a_link_alone_loads_nothing_and_a_change_has_the_engines_effect(opened: Open, root: Path) -> None:
    page = loaded(opened(at="0/mlp.up_proj", view="change", text=TEXT))
    pool = ModelPool()
    slots = [pool.get(str(path)) for path in (root / "teacher", root / "run" / "checkpoint")]
    assert all(slot.wait(60) for slot in slots)
    expected = effect(Pair(slots[0].loaded, slots[1].loaded), Dense(0, "mlp.up_proj"), TEXT)
    words = drawn(page)["words"]
    for column, reading in zip(words["models"], (expected.teacher, expected.hybrid, expected.student), strict=True):
        assert [text for text, _ in column["tokens"]] == [candidate.text for candidate in reading.next]
        assert [p for _, p in column["tokens"]] == pytest.approx([one.probability for one in reading.next])
    before = words["models"][1]["tokens"]

    # Each kind of change, and the answers on request.
    page.button_group(key="inspect_kind").set_value("first").run()
    assert page.query_params["change"] == "first:1"
    page.slider(key="inspect_detail").set_value(2).run()
    models = drawn(page)["words"]["models"]
    assert models[1]["tokens"] == models[2]["tokens"] != before
    page.button_group(key="inspect_kind").set_value("bits").run()
    assert drawn(page)["words"]["place"] == "Block 1, mlp.up_proj in 4 bits"
    page.button_group(key="inspect_kind").set_value("levels").run()
    assert "a group of it" in written(page)
    page.query_params["at"] = "0/mlp.up_proj/3/1"
    page.run()
    assert [text for text, _ in drawn(page)["words"]["models"][1]["tokens"]] == [
        text for text, _ in models[2]["tokens"]
    ]
    page.number_input(key="inspect_level_0").set_value(-3.0).run()
    assert page.query_params["change"].startswith("levels:-3,")
    assert drawn(page)["words"]["models"][1]["tokens"] != drawn(page)["words"]["models"][2]["tokens"]
    page.button(key="inspect_answer").click().run()
    assert not page.exception
    assert written(page).count("lbllm-words") == 3


def test_activations_and_the_cache_on_the_sentence(opened: Open) -> None:
    page = loaded(opened(at="0/mlp.up_proj", view="activations", text=TEXT))
    assert "error with" in written(page)
    assert "largest inputs: channel" in written(page)
    page.button_group(key="inspect_side").set_value("teacher").run()
    assert page.query_params["side"] == "teacher"
    assert "The teacher does not quantize the inputs of mlp.up_proj" in written(page)
    page.button_group(key="inspect_part").set_value("keys").run()
    assert not page.exception
    assert page.query_params["view"] == "keys"
    assert "error of the keys" in written(page)
    page.query_params["at"] = ""
    page.run()
    assert "Choose a block on the map" in written(page)


def test_the_colour_that_reads_the_sentence_waits_for_a_click(opened: Open) -> None:
    page = opened(colour="cost", text=TEXT)
    assert drawn(page)["map"]["low_text"] is None
    loaded(page)
    wait_until(lambda: page.run() and drawn(page)["map"]["progress"] == "", seconds=30)
    assert drawn(page)["map"]["high_text"].endswith(" nats")
    # The other colour comes from the same work.
    page.selectbox(key="inspect_colour").set_value("output").run()
    assert drawn(page)["map"]["high_text"].endswith(" %")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ({"at": "7"}, "7"),
        ({"at": "0/mlp.no_proj"}, "mlp.no_proj"),
        ({"at": "0/mlp.up_proj/9999/0"}, "9999"),
        ({"at": "nowhere"}, "is not an address"),
        ({"at": DENSE}, "dense"),
        ({"teacher": "other"}, "teacher"),
        ({"teacher": ""}, "give its place above, as “Beside its teacher”"),
        ({"model": "teacher"}, "is not a packed checkpoint"),
        ({"model": "run/gone"}, "run/gone"),
        ({"model": "/etc"}, "lies outside"),
    ],
)
def test_bad_addresses_are_a_sentence(opened: Open, address: dict[str, str], said: str) -> None:
    page = opened(**address)
    (error,) = page.error
    assert said in error.value.replace("\\", "")
    assert "unexpected" not in error.value
    # What was chosen can be changed.
    assert page.selectbox(key="inspect_model")
    assert page.selectbox(key="inspect_teacher")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ({"view": "change", "text": "a", "at": "0"}, "token"),
        ({"view": "change", "change": "burn:it", "at": "0"}, "is not a change"),
        ({"view": "change", "at": DENSE}, ""),
        ({"view": "activations", "text": "a", "at": "0/mlp.up_proj"}, "token"),
    ],
)
def test_what_a_text_lacks_is_a_sentence(opened: Open, address: dict[str, str], said: str) -> None:
    page = loaded(opened(**address))
    assert [error.value for error in page.error if said in error.value.replace("\\", "")]
    assert "unexpected" not in written(page)


def test_a_checkpoint_that_is_deleted_while_it_is_looked_at(opened: Open, root: Path) -> None:
    shutil.copytree(root / "run" / "checkpoint", root / "short")
    page = opened(model="short", at="0/mlp.up_proj/3/1")
    assert not page.error
    shutil.rmtree(root / "short")
    page.query_params["at"] = "1/mlp.up_proj/3/1"
    page.run()
    (error,) = page.error
    assert "short" in error.value
    assert "unexpected" not in error.value


def test_the_page_is_found_again_as_it_was_left(opened: Open) -> None:
    page = opened(at="1/self_attn.q_proj", colour="bits", view="weights")
    for name in list(page.query_params):
        del page.query_params[name]
    page.run()
    assert page.query_params["at"] == "1/self_attn.q_proj"
    # Defaults are left out of the address.
    page.button(key="inspect_step_0").click().run()
    assert "at" not in page.query_params
    page.selectbox(key="inspect_colour").set_value("error").run()
    assert "colour" not in page.query_params


@given(st.integers(0, 89), st.integers(0, 2), st.booleans())
@cases(50)
def test_the_window_has_its_group_and_its_mark(scope: Microscope, row: int, group: int, opened: bool) -> None:
    layer = scope.layer("0/mlp.up_proj")
    data: dict[str, Any] = tiles_data(layer, row, group, group * layer.length, opened=opened)
    (top, left), (rows, columns) = data["first"], data["window"]
    assert (rows, columns) == (min(ROWS, layer.shape[0]), min(COLUMNS, layer.shape[1]))
    assert 0 <= top <= layer.shape[0] - rows
    assert 0 <= left <= layer.shape[1] - columns
    assert data["at"][0] + top == row
    assert (data["at"][1] + left) // layer.length == group
    if opened:
        y, x, height, width = data["chosen"]
        assert (y + top, height) == (row, 1)
        assert x + left == group * layer.length
        assert width == min(layer.length, layer.shape[1] - group * layer.length)


@given(st.text(max_size=30) | st.builds("{}:{}".format, st.sampled_from(list(KINDS)), st.text(max_size=20)))
def test_a_change_is_read_as_it_is_written_or_refused(text: str) -> None:
    try:
        found = Change.parse(text)
    except ConfigError:
        return
    assert str(found) == text


def test_changes_as_the_engine_takes_them(scope: Microscope) -> None:
    at = Address(0, "mlp.up_proj", 3, 1)
    found = [choice_of(Change.parse(text), at, scope, (1.0, 2.0, 3.0, 4.0)) for text in ("dense:layer", "only:block")]
    assert found == [Dense(0, "mlp.up_proj"), Only(0)]
    assert choice_of(Change.parse("first:99"), at, scope, ()) == FirstBlocks(2)
    assert choice_of(Change.parse(f"bits:{ROUNDED[0]}"), at, scope, ()) == Bits(0, "mlp.up_proj", 1)
    other = choice_of(Change.parse("bits:w1"), at, scope, ())
    assert isinstance(other, Bits)
    assert not isinstance(other.format, int)
    assert other.format.format == "w1"


def test_short_names_of_layers_differ() -> None:
    assert list(short_names(["a.q_proj", "b.up_proj"])) == ["q", "up"]
    names = ["self_attn.q_proj", "mlp.experts.0.up_proj", "mlp.experts.1.up_proj", "mlp.shared_expert.up_proj"]
    assert list(short_names(names)) == ["q", "experts.0.up", "experts.1.up", "shared_expert.up"]
    assert list(short_names(["a.up_proj", "up_proj"])) == ["a.up", "up"]
    assert list(short_names(["a.up_proj", "a.up"])) == ["a.up_proj", "a.up"]


def test_a_map_fills_only_while_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "PATIENCE", 0.3)
    begun: list[int] = []

    def work(block: int) -> Iterator[Step]:
        begun.append(block)
        time.sleep(0.05)
        yield (block, "a"), {"error": float(block)}

    found = Filling()
    found.look(work, 40)
    wait_until(lambda: found.blocks, seconds=10)
    time.sleep(0.8)
    stopped = len(found.blocks)
    assert 0 < stopped < 30
    # The block that is looked at comes first.
    monkeypatch.setattr(background, "PATIENCE", 60)
    count = len(begun)
    found.look(work, 40, 30)
    wait_until(lambda: found.done, seconds=20)
    assert begun[count] == 30
    assert len(begun) - 40 <= 1  # at most the block in which it stopped is begun twice
    assert found.values["error"] == {(block, "a"): float(block) for block in range(40)}


def test_an_error_ends_a_map_with_its_sentence() -> None:
    def work(block: int) -> Iterator[Step]:
        raise ModelError("the teacher is gone")
        yield

    found = Filling()
    found.look(work, 40)
    wait_until(lambda: found.done, seconds=10)
    assert found.error == "the teacher is gone"
