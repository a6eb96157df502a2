"""Write formulas as MathML, which browsers draw without a library.

    math(sub("w", "q"), "=", "μ", "±", "α")
    math(frac(square(norm("W", "−", sub("W", "q"))), square(norm("W"))))

A part is a text, which becomes a number, a name or an operator, or the result of another function here.
"""

from __future__ import annotations

from html import escape


class Element(str):
    """A finished piece of MathML."""

    __slots__ = ()


Part = str | Element

# Drawn with a stroke over them, or bound to what follows, by <mo>; all other words are names.
_OPERATORS = set("=≠+−-±∓·×≤≥<>(),[]|‖∈∑→←≈/{}:;")


def math(*parts: Part) -> str:
    """A whole formula."""
    return f'<math display="block">{row(*parts)}</math>'


def row(*parts: Part) -> Element:
    """Parts one after the other, as one part."""
    return Element(f"<mrow>{''.join(map(_element, parts))}</mrow>")


def sub(base: Part, below: Part) -> Element:
    """A part with an index."""
    return Element(f"<msub>{_element(base)}{_element(below)}</msub>")


def sup(base: Part, above: Part) -> Element:
    """A part with a power."""
    return Element(f"<msup>{_element(base)}{_element(above)}</msup>")


def square(base: Part) -> Element:
    """A part to the power of two."""
    return sup(base, "2")


def frac(over: Part, under: Part) -> Element:
    """A fraction."""
    return Element(f"<mfrac>{_element(over)}{_element(under)}</mfrac>")


def norm(*parts: Part) -> Element:
    """The norm of a vector or a matrix."""
    return row("‖", *parts, "‖")


def total(below: Part, *parts: Part) -> Element:
    """A sum over an index."""
    return row(Element(f"<munder><mo>∑</mo>{_element(below)}</munder>"), *parts)


def words(text: str) -> Element:
    """Words inside a formula."""
    return Element(f"<mtext>{escape(text)}</mtext>")


def _element(part: Part) -> str:
    if isinstance(part, Element):
        return part
    if part in _OPERATORS:
        return f"<mo>{escape(part)}</mo>"
    if part.replace(".", "", 1).isdigit():
        return f"<mn>{part}</mn>"
    return f"<mi>{escape(part)}</mi>"
