"""How a model is loaded: one value for the Python interface, the commands, the server and the measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

from slimrt.config import ModelConfig, Overflow, check_overflow, is_whole
from slimrt.errors import SettingError

if TYPE_CHECKING:  # these bring NumPy, for which ``slimrt --help`` must not wait
    from slimrt.engine import Engine
    from slimrt.prune.plan import PrunePlan
    from slimrt.text.tokenizer import Tokenizer

__all__ = ["Adapters", "Draft", "LoadOptions", "Loaded", "Plan"]


class Loaded(Protocol):
    """A loaded model that guesses for another: an ``LLM``."""

    ctx: int
    config: ModelConfig
    tokenizer: Tokenizer

    @property
    def engine(self) -> Engine: ...


_MOST_CTX = 2**31 - 1
Plan: TypeAlias = "PrunePlan | str | Path"
Adapters = Sequence[str | Path | tuple[str | Path, float]]
Draft = str | Path | Loaded | None


@dataclass(frozen=True)
class LoadOptions:
    """What ``slimrt.load`` takes beside the file, with its meanings there.

    Raises SettingError for a context or threads that are no whole number of at least 1, an unknown overflow, and a
    template that is no text; what depends on the model and the machine is checked when it is loaded.
    """

    ctx: int | None = None
    device: str = "auto"
    prune: Plan = "auto"
    kv_budget: int | None = None
    threads: int | None = None
    rope_base: float | None = None
    rope_scaling: str | None = None
    rope_factor: float | None = None
    chat_template: str | None = None
    overflow: Overflow = "error"
    stream_weights: bool = False
    cache: bool | str | Path = False
    draft: Draft = "auto"
    lora: Adapters = ()

    def __post_init__(self) -> None:
        for name in ("ctx", "threads"):
            value = getattr(self, name)
            if value is not None and not (is_whole(value) and value >= 1):
                raise SettingError(f"{name} {value!r}: must be a whole number, at least 1")
        if self.ctx is not None and self.ctx > _MOST_CTX:
            raise SettingError(f"ctx {self.ctx:,}: must be at most {_MOST_CTX:,}; positions are numbers of 32 bits")
        for name in ("ctx", "threads", "kv_budget"):  # NumPy's numbers are no JSON, and count with narrow types
            value = getattr(self, name)
            if is_whole(value):
                object.__setattr__(self, name, int(value))
        check_overflow(self.overflow)
        if not isinstance(self.chat_template, (str, type(None))):
            raise SettingError(f"chat_template {str(self.chat_template)[:40]!r}: must be a Jinja template or a name")

    @property
    def keeps_documents(self) -> bool:
        """Whether documents that were read are kept on disk; what a budget's cache holds cannot be."""
        return self.cache is not False and self.kv_budget is None
