"""The explanation on a terminal: a strip with one sign a block, and a table of the stages."""

from __future__ import annotations

import string
from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from slimrt.explain.compare import Comparison
from slimrt.explain.page import readable_seconds, visible
from slimrt.explain.report import Explanation
from slimrt.output import human_bytes

__all__ = ["signs", "summary"]

# From dropped first to kept to the end, by how many cuts there are; past four, shades can not be told apart.
_SHADES = ("█", "·█", "·▒█", "·░▓█", "·░▒▓█")
_DIGITS = string.digits + string.ascii_letters


def signs(cuts: int) -> str:
    """One sign for each number of cuts survived, 0 to ``cuts``."""
    return _SHADES[cuts] if cuts < len(_SHADES) else _DIGITS[: cuts + 1]


def summary(seen: Explanation) -> Iterator[Text | Table]:
    """What ``rich`` prints, part by part."""
    marks = signs(len(seen.cuts))
    if seen.why_dense:
        yield Text(f"Nothing was cut: {seen.why_dense}.", style="yellow")
        yield Text()
    yield Text(
        f"{len(seen.blocks):,} blocks of {seen.block} tokens, from the start of the prompt to its end", style="bold"
    )
    yield _strip(seen, marks)
    yield Text()
    counts = [cut.blocks_before - cut.blocks_after for cut in seen.cuts]
    for mark, cut, count in zip(marks, seen.cuts, counts, strict=False):
        yield Text(f"{mark}  dropped after layer {cut.layer}: {count:,} blocks")
    yield Text(f"{marks[-1]}  kept to the end: {len(seen.blocks) - sum(counts):,} blocks")
    yield Text()
    yield _stages(seen)
    for doubt in seen.doubts:
        yield Text(f"In doubt: {doubt}.", style="yellow")
    if seen.compared is not None:
        yield Text()
        yield _comparison(seen, seen.compared)
    yield Text()
    yield Text(
        f"TTFT {readable_seconds(seen.ttft_s)} · KV {human_bytes(seen.kv_kept)}, "
        f"{100 * seen.kv_kept / seen.kv_dense:.0f} % of a dense run's · plan {seen.plan_source}",
        style="dim",
    )


def _comparison(seen: Explanation, found: Comparison) -> Text:
    lost = found.nats_plan - found.nats_dense
    text = Text("Beside a dense run\n", style="bold")
    text.append(f"Its answer begins: {visible(found.answer)!r}\n", style="not bold")
    text.append(
        f"After the pruned prompt these {found.tokens} tokens are {abs(lost):.2f} nats "
        f"{'less' if lost >= 0 else 'more'} likely (KL of the first {found.kl:.3f}).\n"
        f"Of their attention {100 * sum(found.missed):.1f} % fell to blocks that had been dropped",
        style="not bold",
    )
    for number in found.most_missed[:3]:
        words = " ".join(visible(seen.blocks[number].text).split())
        text.append(f"\n  block {number}, {100 * found.missed[number]:.2f} %: {words[:60]}", style="not bold")
    return text


def _strip(seen: Explanation, marks: str) -> Text:
    strip = Text(overflow="fold")
    for block in seen.blocks:
        share = block.survived / len(seen.cuts) if seen.cuts else 1
        strip.append(marks[block.survived], style="bright_blue" if share == 1 else "blue" if share else "dim")
    return strip


def _stages(seen: Explanation) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("layers")
    windowed = ("near heads",) if seen.windowed_rows else ()
    for name in ("tokens", "blocks", *windowed, "time", "KV resident", "KV on host"):
        table.add_column(name, justify="right")
    for span in seen.spans():
        layers = seen.layers[span.first : span.last + 1]
        near = f"{sum(layer.near_heads for layer in layers)} of {len(layers) * seen.kv_heads}"
        table.add_row(
            f"{span.first}-{span.last}",
            f"{span.tokens:,}",
            f"{span.blocks:,}",
            *((near,) if windowed else ()),
            readable_seconds(span.seconds),
            human_bytes(span.kv_resident),
            human_bytes(span.kv_host),
        )
    return table
