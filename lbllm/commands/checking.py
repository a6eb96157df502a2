"""doctor."""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import date

import typer

from lbllm.commands.options import JsonOption
from lbllm.commands.output import plain, print_json, results
from lbllm.units import duration


def doctor(as_json: JsonOption = False) -> None:
    """Check versions, machine, compiler, kernels, disk and stored files; text to paste into a report.

    Compiles the kernels if they are missing. Exit code 1 if something is broken.
    """

    from lbllm.measure.doctor import Check, checks

    began = time.monotonic()
    found: list[Check] = []
    section = ""
    console = results()
    if not as_json:
        plain(console, f"lbllm doctor, {date.today()}")
    for check in checks():
        found.append(check)
        if as_json:
            continue
        if check.section != section:
            section = check.section
            plain(console, f"\n{section}")
        plain(console, f"  {check.state:5}  {check.name}: {check.value}")
        if check.advice:
            plain(console, f"         {check.advice}")
    faults = sum(check.state == "fault" for check in found)
    if as_json:
        print_json({"checks": [asdict(check) for check in found], "faults": faults})
    else:
        notes = sum(check.state == "note" for check in found)
        plain(console, f"\n{len(found)} checks in {duration(time.monotonic() - began)}: {faults} faults, {notes} notes")
    if faults:
        raise typer.Exit(1)
