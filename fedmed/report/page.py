"""What the reports share: how a template is rendered, how a figure is printed. No page loads or runs anything."""

import math
import re
from collections.abc import Iterable
from decimal import ROUND_UP, Decimal

import jinja2
from markupsafe import Markup

from fedmed.privacy.in_words import round_up

MINUS = "\N{MINUS SIGN}"


def environment() -> jinja2.Environment:
    """Where the reports' templates are rendered."""
    # Autoescape keeps a site's name from becoming markup, StrictUndefined a claim from going missing.
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("fedmed.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"epsilon": epsilon_text, "delta": delta_text, "ranges": ranges}
    return made


def claim(*, unit: str, adjacency: str, delta: float, accountant: str) -> str:
    """What stands beside an epsilon."""
    return f"unit: one {unit}; adjacency: {adjacency}; delta {delta_text(delta)}; {accountant}"


def epsilon_text(epsilon: float | None) -> str:
    """An epsilon as printed: rounded up, never less than was spent.

    >>> epsilon_text(2.9912), epsilon_text(3.0), epsilon_text(None)
    ('3.00', '3.00', 'not stated')
    """
    if epsilon is None:
        return "not stated"
    return f"{round_up(epsilon):.2f}" if math.isfinite(epsilon) else "infinite"


def delta_text(delta: float) -> str:
    """A delta as printed: two significant digits, rounded up.

    >>> delta_text(1e-4), delta_text(4.9751e-05)
    ('1e−4', '5e−5')
    """
    exact = Decimal(repr(delta))
    rounded = exact.quantize(Decimal(1).scaleb(exact.adjusted() - 1), rounding=ROUND_UP)
    digits, _, exponent = f"{rounded:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{exponent.replace('-', MINUS)}"


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers, shortened.

    >>> ranges([1, 2, 3, 5]), ranges([])
    ('1–3, 5', 'none')
    """
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{a}\N{EN DASH}{b}" if b > a else f"{a}" for a, b in found) or "none"


def inline(svg: str, prefix: str) -> Markup:
    """An SVG document as an element of the page: its own ids, colours that the page's theme can replace."""
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :])
    svg = re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{prefix}", svg)
    return Markup(re.sub(r"(fill|stroke): #([0-9a-f]{6})\b", r"\1: var(--c\2, #\2)", svg))
