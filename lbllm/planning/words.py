"""A plan in sentences, the same on the page and on the command line."""

from __future__ import annotations

from collections import Counter

from lbllm.labels import BINARIZED_BITS
from lbllm.planning.candidates import format_words
from lbllm.planning.plan import Choice, Plan
from lbllm.units import size


def chosen_words(plan: Plan) -> list[str]:
    """What the plan gives, what one format for all gives, and what else is to be known."""
    kind = "one format for all layers" if plan.chosen.uniform is not None else "formats layer by layer"
    said = [
        f"Plan for {plan.target.words}: {kind}, {plan.chosen.bits:.3f} {BINARIZED_BITS}, a file of {size(plan.size)}, "
        f"about {size(plan.memory)} of memory to answer. Expected KL to the teacher after stage 1: {_kl(plan.chosen)}."
    ]
    if plan.uniform is not None and plan.chosen.uniform is None:
        assert plan.uniform.uniform is not None
        said.append(
            f"The best format for all layers within these bits, {format_words(plan.uniform.uniform)} at "
            f"{plan.uniform.bits:.3f} bits: {_kl(plan.uniform)}."
        )
    elif plan.uniform is None:
        said.append("No format for all layers is so small.")
    if plan.rejected is not None:
        said.append(
            f"A choice layer by layer was measured and is worse, {_kl(plan.rejected)}; so the plan is one format."
        )
    if plan.kept:
        count = len(plan.kept)
        said.append(f"{count} {'layer keeps' if count == 1 else 'layers keep'} the format of their own settings.")
    return said


def format_counts(plan: Plan) -> dict[str, int]:
    """How many layers have which format, the most frequent one first."""
    return dict(Counter(map(format_words, plan.formats.values())).most_common())


def _kl(one: Choice) -> str:
    return f"{one.kl:.3f} ({'predicted' if one.measured is None else 'measured'})"
