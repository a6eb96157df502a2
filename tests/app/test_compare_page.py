"""The compare page's logic, without a browser: real models, tiny ones, under an allowed folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from app.compare.answers import turn_text
from app.compare.lens import complete
from lbllm.chat.conversation import Conversation, Exchange
from lbllm.chat.duel import Answer, Duel
from lbllm.chat.page import comparison_page
from lbllm.chat.settings import ChatSettings
from lbllm.chat.votes import VoteStore
from lbllm.runs.database import Database
from tests.helpers import ROOT
from tests.helpers.tiny_models import save_tiny
from tests.helpers.tiny_runs import run_config, run_tiny, tiny_teacher

PAGE = str(ROOT / "app" / "pages" / "compare.py")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The allowed folder: a chat model, a base model, a packed checkpoint; beside it one that is not allowed."""
    root = tmp_path_factory.mktemp("root")
    run_tiny(run_config(stages=("ptq", "wat", "aar")), root / "run", tiny_teacher("llama"))
    save_tiny(root / "chat", "llama")
    save_tiny(root / "base", "gpt2")
    return root


Open = Callable[..., AppTest]


@pytest.fixture
def opened(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Opens the page with two models picked, loaded, and short answers set."""
    monkeypatch.setenv("LBLLM_HOME", str(tmp_path))
    monkeypatch.setenv("LBLLM_ROOT", str(root))

    def open_page(left: str = "chat", right: str = "run/checkpoint", length: int = 8) -> AppTest:
        page = AppTest.from_file(PAGE, default_timeout=60)
        page.query_params["left"], page.query_params["right"] = left, right
        page.run()
        assert not page.exception
        if any(button.key == "compare_load" for button in page.button):
            # A link only chooses.
            assert "compare_slots" not in page.session_state
            assert page.chat_input(key="compare_prompt").disabled
            page.button(key="compare_load").click().run()
        for slot in page.session_state.get("compare_slots", ()):
            assert slot.wait(60)
        page.run()
        page.number_input(key="compare_max_new_tokens_both").set_value(length).run()
        return page

    return open_page


class Unfinished(Duel):
    """Two answers of which the left one has begun."""

    def __init__(self) -> None:
        self.answers = [Answer("reading", timed=True), Answer(timed=True)]


def talk(page: AppTest) -> Conversation:
    found: Conversation = page.session_state["kept"].conversation
    return found


def ask(page: AppTest, prompt: str = "What is the capital of France?") -> AppTest:
    page.chat_input(key="compare_prompt").set_value(prompt).run()
    assert not page.exception
    # The script of a test ends where it reruns itself.
    deadline = time.monotonic() + 60
    while talk(page).running:
        assert time.monotonic() < deadline
        page.run()
    page.run()
    return page


def written(page: AppTest) -> str:
    """All text that the page shows."""
    parts = [*page.markdown, *page.caption, *page.error, *page.text, *page.subheader, *page.info]
    shown = [str(part.value) for part in parts]
    # Texts of people and models are HTML, escaped.
    return "\n".join([*shown, *(unescape(element.proto.body) for element in page.get("html"))])


def test_the_first_sight_explains_and_offers_prompts(opened: Open) -> None:
    page = opened()
    assert "Ask both models the same thing" in written(page)
    assert "3 bits" not in written(page)
    assert "W(1+1)A4KV4" in written(page).replace("\\", "")
    page.button(key="compare_example_0").click().run()
    while talk(page).running:
        page.run()
    assert talk(page).exchanges[0].prompt in written(page)


def test_both_models_answer_and_the_page_compares_them(opened: Open) -> None:
    page = ask(opened())
    (exchange,) = talk(page).exchanges
    assert [answer.state for answer in exchange.answers] == ["done", "done"]
    text = written(page)
    assert "first word" in text or "agree" in text or "the same" in text
    assert "mean divergence" in text
    assert page.button(key="compare_stop").disabled


def test_a_switch_leaves_the_activations_of_a_checkpoint_alone(opened: Open) -> None:
    page = opened()
    assert [toggle.key for toggle in page.toggle if "alone" in str(toggle.key)] == ["compare_right_alone"]
    page.toggle(key="compare_right_alone").set_value(True).run()
    assert page.query_params["right"] == "run/checkpoint:a16"
    for slot in page.session_state["compare_slots"]:
        assert slot.wait(60)
    ask(page.run())
    shown = written(page).replace("\\", "")
    assert "W(1+1)A16KV16" in shown
    assert talk(page).exchanges[0].names[1] == "run/checkpoint, activations left alone"
    page.toggle(key="compare_right_alone").set_value(False).run()
    assert page.query_params["right"] == "run/checkpoint"
    for slot in page.session_state["compare_slots"]:
        assert slot.wait(60)
    assert "W(1+1)A4KV4" in written(page.run()).replace("\\", "")
    # A link opens it, too.
    page = opened(right="run/checkpoint:a16")
    assert page.toggle(key="compare_right_alone").value
    assert "W(1+1)A16KV16" in written(page).replace("\\", "")


def test_regenerate_edit_and_clear(opened: Open) -> None:
    page = ask(opened())
    first = talk(page).exchanges[0]
    page.button(key="compare_regenerate").click().run()
    again = talk(page).exchanges[0]
    again.duel.wait(60)
    assert again.prompt == first.prompt
    assert again.settings[0].seed == first.settings[0].seed + 1
    page.run()
    page.button(key="compare_edit_open").click().run()
    page.text_area(key="compare_edited").set_value("And of Spain?")
    next(button for button in page.button if button.label == "Ask again").click().run()
    assert [exchange.prompt for exchange in talk(page).exchanges] == ["And of Spain?"]
    talk(page).exchanges[0].duel.wait(60)
    ask(page, "And then?")
    assert len(talk(page).exchanges) == 2
    page.button(key="compare_clear").click().run()
    assert talk(page).exchanges == []


def test_a_vote_is_kept_counted_and_taken_back(opened: Open, tmp_path: Path) -> None:
    page = ask(opened())
    assert "No votes on this pair yet" in written(page)
    key = f"compare_vote_{talk(page).exchanges[0].id}"
    page.button_group(key=key).set_value("right").run()
    assert not page.exception
    (vote,) = VoteStore(Database(tmp_path / "runs")).all()
    assert (vote.choice, vote.left, vote.right) == ("right", "chat", "run/checkpoint")
    assert vote.left_answer == talk(page).exchanges[0].answers[0].text
    assert "1 vote on this pair" in written(page)
    page.button_group(key=key).set_value(None).run()
    assert VoteStore(Database(tmp_path / "runs")).all() == []


def test_two_settings_on_one_model(opened: Open) -> None:
    page = opened("chat", "chat")
    page.toggle(key="compare_apart").set_value(True).run()
    for side, temperature in (("left", 0.0), ("right", 1.5)):
        page.slider(key=f"compare_temperature_{side}").set_value(temperature).run()
        page.number_input(key=f"compare_max_new_tokens_{side}").set_value(8).run()
    ask(page)
    (exchange,) = talk(page).exchanges
    assert [settings.temperature for settings in exchange.settings] == [0.0, 1.5]
    assert exchange.names == ("chat (temperature 0)", "chat (temperature 1.5)")
    assert "the same model" in written(page)


def test_a_setting_and_a_prompt_that_arrive_together(opened: Open) -> None:
    """On a busy machine one run of the script may get both."""
    page = opened()
    page.number_input(key="compare_max_new_tokens_both").set_value(3)
    ask(page)
    assert [own.max_new_tokens for own in talk(page).exchanges[-1].settings] == [3, 3]


def test_two_settings_start_from_the_shared_ones(opened: Open) -> None:
    page = opened()
    page.slider(key="compare_temperature_both").set_value(0.7).run()
    page.text_area(key="compare_system_both").set_value("Be brief.").run()
    page.toggle(key="compare_apart").set_value(True).run()
    for side in ("left", "right"):
        assert page.slider(key=f"compare_temperature_{side}").value == 0.7
        assert page.number_input(key=f"compare_max_new_tokens_{side}").value == 8
        assert page.text_area(key=f"compare_system_{side}").value == "Be brief."
    page.slider(key="compare_temperature_left").set_value(0.1).run()
    # What was chosen for a side is kept until the shared settings change.
    page.toggle(key="compare_apart").set_value(False).run()
    assert page.slider(key="compare_temperature_both").value == 0.7
    page.toggle(key="compare_apart").set_value(True).run()
    assert page.slider(key="compare_temperature_left").value == 0.1
    page.toggle(key="compare_apart").set_value(False).run()
    page.slider(key="compare_temperature_both").set_value(0.3).run()
    page.toggle(key="compare_apart").set_value(True).run()
    assert page.slider(key="compare_temperature_left").value == 0.3


def test_the_prompt_that_is_edited_can_stay_as_it_is(opened: Open) -> None:
    page = ask(opened())
    (before,) = talk(page).exchanges
    page.button(key="compare_edit_open").click().run()
    page.text_area(key="compare_edited").set_value("And of Spain?")
    next(button for button in page.button if button.label == "Cancel").click().run()
    assert talk(page).exchanges == [before]
    assert all(area.key != "compare_edited" for area in page.text_area)


def test_an_answer_that_the_limit_cut_off_says_so(opened: Open) -> None:
    page = ask(opened(length=8))
    cut = [answer.cut for answer in talk(page).exchanges[0].answers]
    assert set(cut) <= {0, 8}
    assert written(page).count("Cut off at 8 tokens") == cut.count(8)
    assert any(cut)


def test_one_after_the_other_says_whose_turn_it_is() -> None:
    settings = ChatSettings()
    exchange = Exchange("Why?", ("teacher", "student"), (settings, settings), Unfinished())
    assert "turn of the left model, teacher" in turn_text(exchange, 1)
    assert turn_text(exchange, 0) == "Reading the prompt"
    exchange.duel.answers[0] = Answer("done", timed=True)
    assert turn_text(exchange, 1) == "Waiting for the model"


def test_the_saved_page_has_the_lens_of_every_exchange(opened: Open) -> None:
    page = ask(ask(opened()), "And of Spain?")
    first, second = talk(page).exchanges
    assert second.lens is not None
    # Nobody looked at the first one.
    first.lens = None
    slots = page.session_state["compare_slots"]
    complete(talk(page), slots, first.names)
    assert first.lens is not None
    assert comparison_page(talk(page).exchanges).count("Lens: where") == 2


def test_a_long_prompt_is_folded(opened: Open) -> None:
    page = ask(opened(), "Again " * 200 + "<b>end</b>")
    bodies = [element.proto.body for element in page.get("html")]
    (prompt,) = [body for body in bodies if "<details>" in body]
    assert "&lt;b&gt;end&lt;/b&gt;" in prompt
    assert prompt.count('dir="auto"') == 2


def test_a_base_model_is_labelled_and_goes_on_with_the_text(opened: Open) -> None:
    page = opened("base", "chat")
    assert "base model" in written(page)
    ask(page)
    assert [answer.completes for answer in talk(page).exchanges[0].answers] == [True, False]
    assert "continues the text" in written(page)


@pytest.mark.parametrize(
    ("pick", "message"),
    [
        ("../elsewhere", "lies outside"),
        ("/etc", "lies outside"),
        ("no-such-model", "no-such-model"),
        ("run/blocks", "config.json"),
    ],
)
def test_a_pick_that_can_not_be_used_says_why(opened: Open, pick: str, message: str) -> None:
    page = opened("chat", pick)
    assert message in written(page).replace("\\", "")
    assert not page.exception


def test_a_lens_over_a_text_of_ones_own(opened: Open) -> None:
    page = opened()
    page.text_area(key="compare_lens_own").set_value("The river runs past the old mill.").run()
    assert "mean divergence" in written(page)


def test_the_example_prompts_are_many_and_of_several_kinds() -> None:
    kinds = json.loads((Path(PAGE).parents[2] / "assets" / "prompts.json").read_text())
    assert len(kinds) >= 5
    prompts = [prompt for kind in kinds for prompt in kind["prompts"]]
    assert len(set(prompts)) == len(prompts) >= 20
