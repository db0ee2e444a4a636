"""``scripts/gpu_attention_check.py`` in the emulation: probes pass, and say where what is wrong is wrong."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from scripts import wgmma_card as card
from scripts import wgmma_cases as cases
from scripts import wgmma_probes as probes
from tests.emulation import compiled
from tests.kernel_cases import Array, half, needs_compiler, noise

pytestmark = needs_compiler


class OnCard(np.ndarray):
    def get(self) -> Array:
        return np.asarray(self).copy()


def on_card(make: Callable[..., Array]) -> Callable[..., Any]:
    return lambda *args: np.ascontiguousarray(make(*args)).view(OnCard)


class EmulatedCard(card.Card):
    """NumPy in the place of CuPy; ``change``: of the text of every source."""

    def __init__(self, change: tuple[str, str] = ("", "")) -> None:
        event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
        self.cp = SimpleNamespace(
            empty=on_card(np.empty), full=on_card(np.full), zeros=on_card(np.zeros), asarray=on_card(np.array),
            cuda=SimpleNamespace(Event=lambda: event, get_elapsed_time=lambda a, b: 1.0),
        )  # fmt: skip
        self.change = change

    def kernel(self, build: cases.Build, name: str, shared: int = 0) -> Any:
        _, code, _ = cases.path_of(build)
        if self.change[0]:
            assert self.change[0] in code
            code = code.replace(*self.change)
        kernel = compiled(code, dict(build[1])).kernel(name)
        kernel.max_dynamic_shared_size_bytes = max(shared, 48 << 10)
        return kernel

    def done(self) -> None:
        pass

    def normal(self, shape: tuple[int, ...], kind: str, seed: int, scale: float = 1.0) -> Any:
        return on_card(np.array)(half(noise(shape, seed, scale), kind).view(np.uint16))

    def not_finite(self, x: Any, kind: str) -> int:
        return int((~np.isfinite(card.full(x, kind))).sum())


def test_products_and_the_relay_pass() -> None:
    found: dict[str, Any] = {}
    for way in range(3):
        assert probes.probe_product(EmulatedCard(), found.update, cases.PROBE_SIZES[1], way)
    assert probes.probe_relay(EmulatedCard(), found.update)
    assert found == {}


def test_a_wrong_layout_is_described() -> None:
    found: dict[str, Any] = {}
    wrong = EmulatedCard(("K * LINE * sizeof(T));", "0);"))  # the second panel of values is never found
    assert not probes.probe_product(wrong, found.update, cases.PROBE_SIZES[1], 2)
    assert "columns 64-127" in found["wrong"]
    assert "64<-0" in found["wrong"]


@pytest.mark.parametrize("case", [cases.CASES[1], cases.Case(130, 300, 2, 2, 64, "bf16", (0, 64))], ids=str)
def test_attention_passes(case: cases.Case) -> None:
    right, text = card.check_attention(EmulatedCard(), case, cases.kernel_of(case), None)
    assert right, text


def test_wrong_attention_is_described() -> None:
    case = cases.CASES[1]
    wrong = EmulatedCard(("unsigned(token) >= unsigned(tokens)", "member || unsigned(token) >= unsigned(tokens)"))
    right, text = card.check_attention(wrong, case, cases.kernel_of(case), None)
    assert not right
    assert "by warpgroup 0:0.00 1:1.00" in text


def test_every_variant_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "LENGTHS", (130,))
    monkeypatch.setattr(probes, "variants", lambda case: [{}])
    found: dict[str, Any] = {}
    assert probes.probe_time(EmulatedCard(), found.update, cases.TIMED[2])
    assert set(found) == {"mma.sync", "wgmma as it is", "mma.sync again"}
    assert all(row["130"] > 0 for row in found.values())
