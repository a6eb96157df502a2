"""Renders docs/settings.md from the settings' fields: ``python -m benchmarks.settings_page [--check]``.

With ``--check`` nothing is written; the exit code is 1 where the page differs from the fields.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks.report import ROOT
from lbllm.config import CONTINUATIONS, OPTIONS, SETTINGS, RunConfig, leaves, make_config
from lbllm.fields import allowed
from lbllm.labels import STAGE_NAMES, stage_numbers
from lbllm.presets import ABOUT, PRESETS
from lbllm.sections import STAGES

PAGE = ROOT / "docs" / "settings.md"
INTRODUCTION = """# Settings

<!-- Rendered by `python -m benchmarks.settings_page` from the fields in lbllm/config.py and lbllm/sections.py. -->

Every setting of a run: its name in a settings file and for `--set NAME=VALUE`, its label on the Quantize page, its
default, and what it does. [Presets](#presets) change some of the defaults. [glossary.md](glossary.md) explains the
words.
"""
PRESETS_TEXT = """## Presets

`--preset`, and the buttons at the top of the Quantize page. What a preset leaves empty has the default from above.
"""
FROM_CHECKPOINT_TEXT = """## A run from a checkpoint

`--from`, or *Train it further* on the Runs page. Model and format are those of the checkpoint, and stages 1 and 2 are
done. The run can change the settings of its own stages, those under *Run* except the model, and some of the format; in
`quant.overrides` it can change the same ones for single layers.
"""


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def value(setting: Any) -> str:
    """A value as a settings file has it."""
    return f"`{json.dumps(setting)}`"


def setting_rows(section: str) -> str:
    """The table of a section's settings; of those outside all sections where it is empty."""
    defaults = leaves(RunConfig())
    rows = []
    for path, field in SETTINGS.items():
        if path.rpartition(".")[0] != section or path == "schema_version":
            continue
        name = f"`{path}`" + (f", `{OPTIONS[path]}`" if path in OPTIONS else "")
        values = allowed(field)
        note = f"{field.description} Allowed: {values}." if values else str(field.description)
        rows.append([name, str(field.title), value(defaults[path]), note.replace("*", "\\*")])
    return table(["Name, option", "Label", "Default", "Meaning"], rows)


def preset_rows() -> str:
    """The table of what each preset sets."""
    defaults = leaves(RunConfig())
    found = {name: leaves(make_config(name)) for name in PRESETS}
    changed = [path for path in SETTINGS if path != "preset" and any(s[path] != defaults[path] for s in found.values())]
    rows = [
        [f"`{path}`", *(value(s[path]) if s[path] != defaults[path] else "" for s in found.values())]
        for path in changed
    ]
    return table(["", *(f"`{name}`" for name in PRESETS)], rows)


def continuation_rows() -> str:
    """The table of what a run from a checkpoint may change of its format."""
    rows = [
        [stage_numbers(stages), ", ".join(f"`quant.{name}`" for name in free)] for stages, free in CONTINUATIONS.items()
    ]
    return table(["Stages", "Settings of the format that can change"], rows)


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, "## Run\n", setting_rows("")]
    parts += ["", "## Format\n", setting_rows("quant")]
    for stage in STAGES:
        parts += ["", f"## {STAGE_NAMES[stage]}\n", setting_rows(stage)]
    about = "\n".join(f"- `{name}`: {words}" for name, words in ABOUT.items())
    parts += ["", PRESETS_TEXT, about, "", preset_rows(), "", FROM_CHECKPOINT_TEXT, continuation_rows()]
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page differs")
    options = parser.parse_args()
    text = page()
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return
    if options.check:
        raise SystemExit(f"{PAGE.relative_to(ROOT)} differs from the fields; run python -m benchmarks.settings_page")
    PAGE.write_text(text, encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)} rendered")


if __name__ == "__main__":
    main()
