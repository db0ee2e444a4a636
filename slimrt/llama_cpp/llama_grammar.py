"""``LlamaGrammar``: a GBNF grammar or a JSON schema under llama_cpp's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from slimrt.errors import SettingError
from slimrt.structured.grammar import Grammar
from slimrt.tools.calling import Calling

__all__ = ["LlamaGrammar", "grammar_of_llama"]


class LlamaGrammar:
    """What an answer must match; ``verbose`` changes nothing."""

    def __init__(self, _grammar: str) -> None:
        self.grammar = Grammar.gbnf(_grammar)

    @classmethod
    def from_string(cls, grammar: str, verbose: bool = True) -> Self:
        """GBNF, whose rule is ``root``."""
        return cls(grammar)

    @classmethod
    def from_file(cls, file: str | Path, verbose: bool = True) -> Self:
        """A file of GBNF. Raises SettingError where it cannot be read."""
        try:
            return cls(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise SettingError(f"{file}: {' '.join(str(error).split())}; name a file of GBNF, UTF-8") from None

    @classmethod
    def from_json_schema(cls, json_schema: str, verbose: bool = True) -> Self:
        """A JSON schema, as text."""
        made = cls.__new__(cls)
        made.grammar = Grammar.json_schema(json_schema)
        return made


def grammar_of_llama(grammar: Any) -> Grammar | None:
    """The parameter ``grammar`` of a ``Llama``'s methods. Raises SettingError for another type."""
    if grammar is None or isinstance(grammar, Grammar):
        return grammar
    if isinstance(grammar, (LlamaGrammar, Calling)):
        return grammar.grammar
    raise SettingError(
        f"grammar of type {type(grammar).__name__}: must be a LlamaGrammar, as LlamaGrammar.from_string(...) makes one"
    )
