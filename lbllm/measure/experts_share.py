"""What the experts of a mixture take of bits, size and time, as a sentence for the page Quantize and the model card."""

from __future__ import annotations

from lbllm.measure.estimate import Estimate
from lbllm.units import duration, size


def experts_sentence(result: Estimate, *, shares_alone: bool = False) -> str:
    """The sentence; empty for a model without experts. ``shares_alone``: without the time in seconds, which is that of
    one machine."""
    found = result.experts
    if found is None:
        return ""
    bits, weights = 8 * found.disk_bytes / found.weights, 100 * found.weights / result.weights
    part = f"{100 * found.seconds / result.seconds:.0f} % of the time"
    time = f"{part} that its run takes, by estimate" if shares_alone else f"{duration(found.seconds)}, {part}"
    return (
        f"{found.active} of {found.count} compute a token. They are {weights:.0f} % of the binarized weights, at "
        f"{bits:.2f} bits; {size(found.disk_bytes)}, {100 * found.disk_bytes / result.disk_bytes:.0f} % of the file; "
        f"and {time}."
    )
