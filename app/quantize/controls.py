"""The widgets of the Quantize page's settings. Their values are in the session; ``form`` makes a RunConfig of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pandas
import streamlit as st

from app.components.shown import with_default, with_index, with_value
from app.quantize.form import (
    COLUMNS,
    CORPUS_KEY,
    DOCUMENT,
    EDITED,
    EDITOR_KEY,
    SKIP_KEY,
    TABLE,
    continues,
    fixed,
    free_to_lower,
    take_stages,
)
from app.quantize.settings import GROUP_SIZE, STAGE_SETTING, Setting
from lbllm.config import CONTINUATIONS, SETTINGS
from lbllm.errors import LbllmError
from lbllm.fields import bounds, choices
from lbllm.pipeline.start import settings_to_go_on
from lbllm.texts.catalogue import TEXTS

# Of the table's columns, in pixels: each heading in full, after the icon that marks a column as editable.
WIDTHS = {"pattern": 100, "format": 95, "group_size": 110, "param_bits": 135, "act_bits": 135}


def control(setting: Setting) -> None:
    """Draw a setting's widget; its value is in the session. The help of a disabled one says why it is disabled."""
    reason = fixed(setting)
    disabled = reason is not None
    help_text = f"**Not used: {reason}**\n\n{setting.help}" if reason else setting.help
    if setting.step:
        st.number_input(setting.label, **with_value(setting.key), help=help_text, disabled=disabled, **setting.number)
        return
    further = setting is STAGE_SETTING and free_to_lower()
    choices = _with(_offered(setting), st.session_state[setting.key])
    draw: Callable[..., Any] = st.selectbox if setting.menu else partial(st.segmented_control, required=True)
    shown = with_index(setting.key, choices) if setting.menu else with_default(setting.key)
    draw(
        setting.label,
        choices,
        format_func=setting.show,
        **shown,
        help=help_text,
        on_change=take_stages if further else None,
        disabled=disabled,
    )


def _offered(setting: Setting) -> tuple[Any, ...]:
    """A setting's choices; in a run from a checkpoint only those that the checkpoint allows."""
    if setting is STAGE_SETTING and free_to_lower():
        return tuple(CONTINUATIONS)
    if setting is GROUP_SIZE and continues():
        try:
            own = settings_to_go_on(st.session_state[DOCUMENT]["start"])["quant"]["group_size"]
        except LbllmError:
            return setting.choices  # the run reports what is wrong with its checkpoint
        return tuple(size for size in setting.choices if size == own or (size > 0 and own % size == 0))
    return setting.choices


def corpus_picker() -> None:
    """The text to train on: from the catalogue, or a path that is typed."""
    notes = {entry.id: entry.note for entry in TEXTS}
    texts = _with(tuple(notes), st.session_state[CORPUS_KEY])
    field = SETTINGS["corpus"]
    st.selectbox(
        str(field.title),
        texts,
        **with_index(CORPUS_KEY, texts),
        accept_new_options=True,
        help=f"{field.description}\n\n" + "\n".join(f"- **{name}**: {note}" for name, note in notes.items()),
    )


def layers_table(names: Iterable[str]) -> pandas.DataFrame:
    """The editable table of settings per layer, and the layers to leave dense. ``names``: the model's layers."""
    names = list(names)
    ends = list(dict.fromkeys("*." + name.rpartition(".")[2] for name in names))
    blocks = list(dict.fromkeys(".".join(name.split(".")[:3]) + ".*" for name in names))
    example = f"`{ends[0]}` or `{blocks[0]}`" if names else "`*.down_proj`"
    st.caption(
        f"A pattern names layers, for example {example}; empty cells keep the settings above, and if several "
        "patterns match, the last one counts. Add a line at the bottom of the table."
    )
    table = st.data_editor(
        st.session_state[TABLE],
        key=EDITOR_KEY,
        num_rows="dynamic",
        hide_index=True,
        column_config={"pattern": st.column_config.TextColumn("Layers", width=WIDTHS["pattern"])}
        | {name: _column(name) for name in COLUMNS[1:]},
    )
    field = SETTINGS["quant.skip"]
    st.multiselect(
        str(field.title),
        list(dict.fromkeys((*st.session_state[SKIP_KEY], *ends, *blocks))),
        **with_default(SKIP_KEY),
        accept_new_options=True,
        placeholder="none",
        help=field.description,
    )
    st.session_state[EDITED] = pandas.DataFrame(table)
    return pandas.DataFrame(table)


def _column(name: str) -> Any:
    """A column of the table per layer: its setting's choices or numbers."""
    field = SETTINGS[f"quant.{name}"]
    if choices(field):
        return st.column_config.SelectboxColumn(
            field.title, options=list(choices(field)), width=WIDTHS[name], help=field.description
        )
    least, _ = bounds(field)
    return st.column_config.NumberColumn(
        field.title, min_value=least, step=1, width=WIDTHS[name], help=field.description
    )


def _with(choices: tuple[Any, ...], value: Any) -> list[Any]:
    """The choices, plus a value from a file that is not one of them."""
    return list(choices) if value is None or value in choices else [*choices, value]
