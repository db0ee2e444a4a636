"""The explanation as one HTML page that needs nothing else: no script, no font, no address."""

from __future__ import annotations

import math
from importlib import resources

from slimrt.explain.report import Explanation
from slimrt.output import human_bytes

__all__ = ["html_page"]

# Control characters have no place in HTML; Unicode has a picture of each.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def html_page(explanation: Explanation) -> str:
    """The page; all text in it is escaped."""
    import jinja2  # takes a while, and most commands need no page

    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters.update(visible=visible, bytes=human_bytes, score=readable_score, seconds=readable_seconds)
    source = (resources.files(__package__) / "page.html.jinja").read_text(encoding="utf-8")
    slowest = max(layer.seconds for layer in explanation.layers)
    fullest = max(layer.kv_resident + layer.kv_host for layer in explanation.layers)
    return environment.from_string(source).render(
        e=explanation,
        time_scale=100 / slowest if slowest else 0,
        kv_scale=100 / fullest if fullest else 0,
        attended=_levels(explanation),
    )


def _levels(explanation: Explanation) -> list[float]:
    """How dark each block is that a dense answer attended to, 0 to 1.

    The first block and the last ones take most of all attention whatever is asked, so the others set the scale; roots,
    for attention differs by orders of magnitude.
    """
    if explanation.compared is None:
        return []
    attended = explanation.compared.attended
    most = max((attended[block.number] for block in explanation.blocks[1:] if not block.always), default=0.0)
    return [min(1.0, math.sqrt(share / most)) if most > 0 else 0.0 for share in attended]


def visible(text: str) -> str:
    """``text`` with control characters, line ends and tabs excepted, as pictures of themselves."""
    return text.translate(_PICTURES)


def readable_score(score: float) -> str:
    """Three significant digits; scores differ by orders of magnitude."""
    if score == 0:
        return "0"
    return f"{score:.{max(0, 2 - math.floor(math.log10(abs(score))))}f}" if 1e-4 <= abs(score) < 1e4 else f"{score:.2e}"


def readable_seconds(seconds: float) -> str:
    """``0.0123`` -> ``"12.3 ms"``, in three digits."""
    if seconds >= 0.9995:
        return f"{seconds:.2f} s"
    milliseconds = 1000 * seconds
    digits = 0 if milliseconds >= 99.95 else 1 if milliseconds >= 9.995 else 2
    return f"{milliseconds:.{digits}f} ms"
