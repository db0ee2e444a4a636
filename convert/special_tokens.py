"""Which tokens of a Hugging Face folder play which role, whether they frame a text, and its chat template."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gguf import TokenType

from slimrt.convert.checkpoint import read_bounded, read_json
from slimrt.convert.vocabulary import Vocabulary, space_prefix, stripping
from slimrt.errors import ModelFileError

__all__ = ["read_special_tokens"]

_MAX_TEMPLATE_BYTES = 1 << 20
_MAX_TEMPLATES = 32
_ROLES = ("bos", "eos", "unk", "sep", "pad", "mask")  # those that GGUF has keys for


def read_special_tokens(folder: Path, vocabulary: Vocabulary) -> None:
    """Fill in ``special``, ``add``, ``add_space_prefix`` and ``chat_template`` of ``vocabulary``.

    tokenizer_config.json has the last word, then special_tokens_map.json, then the ids in config.json, as in
    Transformers. Raises ModelFileError for malformed files.
    """
    tokenizer_config = _read(folder / "tokenizer_config.json")
    token_map = _read(folder / "special_tokens_map.json")
    model_config = _read(folder / "config.json")
    ids = {text: i for i, text in enumerate(vocabulary.tokens) if vocabulary.types[i] != TokenType.UNUSED}
    for role in _ROLES:
        texts = (_text(source.get(f"{role}_token")) for source in (tokenizer_config, token_map))
        token = next((ids[text] for text in texts if text in ids), model_config.get(f"{role}_token_id"))
        if isinstance(token, int) and 0 <= token < len(vocabulary.tokens):
            vocabulary.special[role] = token

    first, last = _frame(folder / "tokenizer.json")
    frame = {"bos": first, "eos": last}
    for role, text in frame.items():
        stated = tokenizer_config.get(f"add_{role}_token")
        if isinstance(stated, bool):
            vocabulary.add[role] = stated
        elif (folder / "tokenizer.json").exists():
            vocabulary.add[role] = text is not None and ids.get(text, -1) == vocabulary.special.get(role)
    if vocabulary.scores is not None and not vocabulary.strip:
        _read_details(folder, vocabulary, tokenizer_config)
    if isinstance(prefix := tokenizer_config.get("add_prefix_space"), bool) and vocabulary.scores is not None:
        vocabulary.add_space_prefix = prefix
    vocabulary.chat_template = _chat_template(folder, tokenizer_config)


def _read_details(folder: Path, vocabulary: Vocabulary, tokenizer_config: dict[str, Any]) -> None:
    """What a SentencePiece model does not say: blanks beside added tokens, and where the space in front goes."""
    path, size = folder / "tokenizer.json", len(vocabulary.tokens)
    listed: Any = tokenizer_config.get("added_tokens_decoder")
    added = [
        {**entry, "id": int(key)}
        for key, entry in (listed.items() if isinstance(listed, dict) else ())
        if key.isdecimal() and isinstance(entry, dict)
    ]
    if path.exists():
        described = read_json(path)
        listed = described.get("added_tokens")
        added = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
        if vocabulary.add_space_prefix:
            # Whether there is one is the model's own affair.
            _, vocabulary.space_prefix = space_prefix(described, path)
    vocabulary.strip = stripping([e for e in added if type(e.get("id")) is int and 0 <= e["id"] < size])


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _text(entry: Any) -> str | None:
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None


def _frame(path: Path) -> tuple[str | None, str | None]:
    """The special tokens that tokenizer.json's post-processor puts before and after a single text."""
    processor = _read(path).get("post_processor") or {}
    children = processor.get("processors", [processor]) if isinstance(processor, dict) else []
    for child in children if isinstance(children, list) else ():
        single = child.get("single") if isinstance(child, dict) and child.get("type") == "TemplateProcessing" else None
        if isinstance(single, list) and single:
            ends = [part.get("SpecialToken") if isinstance(part, dict) else None for part in (single[0], single[-1])]
            first, last = (end.get("id") if isinstance(end, dict) else None for end in ends)
            return first, last
    return None, None


def _chat_template(folder: Path, tokenizer_config: dict[str, Any]) -> str | list[dict[str, str]] | None:
    """The folder's templates: files go before tokenizer_config.json, as in Transformers."""
    path = folder / "tokenizer_config.json"
    template = tokenizer_config.get("chat_template")
    if template is None and (older := folder / "chat_template.json").exists():
        path, template = older, read_json(older).get("chat_template")
    named = isinstance(template, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
        for entry in template
    )
    if not (template is None or isinstance(template, str) or named):
        raise ModelFileError(
            f"{path}: chat_template is a {type(template).__name__}; "
            "a text or a list of named texts is expected; fetch the file again"
        )
    if isinstance(template, list):
        templates = {entry["name"]: entry["template"] for entry in template}
    else:
        templates = {} if template is None else {"default": template}
    files = {"default": folder / "chat_template.jinja"}
    files |= {found.stem: found for found in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    templates |= {name: _template_file(file) for name, file in files.items() if file.exists()}
    return _writable(templates, folder)


def _template_file(path: Path) -> str:
    try:
        return read_bounded(path, _MAX_TEMPLATE_BYTES).decode()
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{path}: cannot be read as text ({error}); fetch the file again") from None


def _writable(templates: dict[str, str], folder: Path) -> str | list[dict[str, str]] | None:
    """Names as keys of GGUF have them: letters, digits and low lines."""
    if len(templates) > _MAX_TEMPLATES:
        raise ModelFileError(
            f"{folder}: {len(templates)} chat templates; at most {_MAX_TEMPLATES} are kept; remove those that are not "
            "needed"
        )
    if not templates.keys() - {"default"}:
        return templates.get("default")
    named = {re.sub("[^A-Za-z0-9]", "_", name): template for name, template in templates.items()}
    if len(named) < len(templates) or "" in named:
        raise ModelFileError(
            f"{folder}: the chat templates {', '.join(sorted(templates))[:80]!r} have no names or the same one as GGUF "
            "writes them, with a low line for what is neither letter nor digit; rename them"
        )
    return [{"name": name, "template": template} for name, template in named.items()]
