"""Hugging Face folders: config.json, safetensors, tokenizer files, as Transformers' ``save_pretrained`` writes them."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from slimrt.convert.checkpoint import StoredTensor, concatenate, read_json
from slimrt.convert.config_json import family_of, read_config
from slimrt.convert.hyperparameters import Hyperparameters
from slimrt.convert.layouts import in_gguf_layout, split_joint
from slimrt.convert.ranks import from_tiktoken, is_tiktoken
from slimrt.convert.safetensors_reader import read_safetensors_folder
from slimrt.convert.source import Source, SourceTensor, check_complete, check_layers, gguf_names
from slimrt.convert.special_tokens import read_special_tokens
from slimrt.convert.tekken import from_tekken
from slimrt.convert.text_part import text_config, text_tensors
from slimrt.convert.turned_experts import take_turned_experts
from slimrt.convert.vocabulary import Vocabulary, from_sentencepiece, from_tokenizer_json
from slimrt.errors import ModelFileError

__all__ = ["open_huggingface"]

logger = logging.getLogger(__name__)

_EXPERT = re.compile(r"^(.*\.layers\.(\d+)\..*experts)\.(\d+)\.(\w+)\.weight$")
_JOINT = re.compile(r"^.*\.layers\.(\d+)\..*?(wqkv|experts\.gate_up_proj|experts\.down_proj)(?:\.weight)?$")
_JOINT_PARTS = {
    "wqkv": "attn_qkv", "experts.gate_up_proj": "ffn_gate_up_exps", "experts.down_proj": "ffn_down_exps",
}  # fmt: skip
_EXPERT_PARTS = {
    "gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps",
    "w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps",
}  # fmt: skip


def open_huggingface(folder: Path) -> Source:
    """Read configuration, tensor headers and vocabulary; no weights yet.

    Raises ModelFileError or TokenizerError for anything unknown, missing or contradictory.
    """
    config_path = folder / "config.json"
    config = read_json(config_path)
    family_of(config, config_path)  # before anybody fetches the weights of a model that slimrt cannot run
    tensors = read_safetensors_folder(folder)
    if isinstance(config.get("text_config"), dict):
        config, tensors = text_config(config), text_tensors(tensors, folder)
        # Whether such a checkpoint is tied is stated in one of two places, or left to defaults that have changed.
        config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    sizes = read_config(config, config_path)
    check_layers(sizes.n_layers, len(tensors), config_path, sizes.tensors_a_layer)
    turned = take_turned_experts(tensors, sizes, folder) if sizes.family.turned_experts else {}
    taken = _stack_experts(tensors, sizes.n_layers, folder) | _take_joint(tensors, sizes.n_layers)
    named = {
        gguf: [tensors[name]] for gguf, name in gguf_names(list(tensors), sizes.arch, sizes.n_layers, folder).items()
    }
    named = split_joint(named | taken, sizes)
    if sizes.tied and named.pop("output.weight", None) is not None:
        logger.info("%s: lm_head is left out, the configuration ties it to the embedding", folder)
    zeros = [name for name in named if name.endswith("norm.bias")]
    for name in zeros:  # Cohere's checkpoints have them, and GGUF has no place
        if any(part.rows(0, part.shape[0]).any() for part in named.pop(name)):
            raise ModelFileError(f"{folder}: {name} is not zero, and GGUF has no place for it; choose another model")
    shapes = {name: _shape(name, parts, sizes) for name, parts in named.items()}
    check_complete(shapes | {name: sizes.shapes()[name] for name in turned}, sizes, folder)
    vocabulary = _read_vocabulary(folder, sizes.vocab_size)
    sources = {
        name: SourceTensor(
            in_gguf_layout(name, concatenate(parts, 0), sum(part.shape[0] for part in parts), sizes),
            f"{parts[0].path}: tensor '{parts[0].name}'",
        )
        for name, parts in named.items()
    }
    return Source(folder, sizes, sources | turned, vocabulary)


def _shape(name: str, parts: list[StoredTensor], sizes: Hyperparameters) -> tuple[int, ...]:
    """The shape of ``parts`` stacked; of experts' rows, when they are so many as all experts have."""
    rows = sum(part.shape[0] for part in parts), *parts[0].shape[1:]
    expected = sizes.shapes().get(name, ())
    odd = any(part.shape[1:] != parts[0].shape[1:] for part in parts)
    stacked = len(expected) == 3 and rows == (expected[0] * expected[1], expected[2]) and not odd
    return expected if stacked else rows


def _stack_experts(tensors: dict[str, StoredTensor], n_layers: int, folder: Path) -> dict[str, list[StoredTensor]]:
    """The experts' tensors, taken out of ``tensors``: GGUF name -> parts in the order of the experts."""
    found: dict[str, dict[int, StoredTensor]] = {}
    for name in list(tensors):
        match = _EXPERT.match(name)
        if match and match[4] in _EXPERT_PARTS and int(match[2]) < n_layers:
            key = f"blk.{int(match[2])}.{_EXPERT_PARTS[match[4]]}.weight"
            found.setdefault(key, {})[int(match[3])] = tensors.pop(name)
    for key, experts in found.items():
        if set(experts) != set(range(len(experts))):
            missing = min(set(range(len(experts))) - set(experts))
            raise ModelFileError(f"{folder}: {key} lacks expert {missing}; a shard is incomplete; fetch it again")
    return {key: [experts[number] for number in sorted(experts)] for key, experts in found.items()}


def _take_joint(tensors: dict[str, StoredTensor], n_layers: int) -> dict[str, list[StoredTensor]]:
    """Tensors that GGUF has apart only, taken out of ``tensors``: by the GGUF name that they would have."""
    found: dict[str, list[StoredTensor]] = {}
    for name in list(tensors):
        match = _JOINT.match(name)
        if match and int(match[1]) < n_layers:
            found[f"blk.{int(match[1])}.{_JOINT_PARTS[match[2]]}.weight"] = [tensors.pop(name)]
    return found


def _read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The vocabulary, preferring tokenizer.model as llama.cpp does (tokenizer.json of the same model says less)."""
    model_path, json_path = folder / "tokenizer.model", folder / "tokenizer.json"
    if model_path.exists() and not is_tiktoken(model_path):
        path, vocabulary = model_path, from_sentencepiece(model_path, _added_tokens(folder))
    elif json_path.exists():
        path, vocabulary = json_path, from_tokenizer_json(json_path)
    elif model_path.exists():
        path, vocabulary = model_path, from_tiktoken(model_path, size)
    elif (tekken_path := folder / "tekken.json").exists():
        path, vocabulary = tekken_path, from_tekken(tekken_path)
    else:
        raise ModelFileError(
            f"{folder}: none of tokenizer.model, tokenizer.json and tekken.json; a GGUF file carries its vocabulary; "
            "fetch one of them"
        )
    vocabulary.resize(size, path)
    read_special_tokens(folder, vocabulary)
    vocabulary.find_turn_ends()
    return vocabulary


def _added_tokens(folder: Path) -> dict[int, tuple[str, bool]]:
    """Tokens put on top of a SentencePiece model: added_tokens.json, then tokenizer_config.json, which knows more."""
    added: dict[int, tuple[str, bool]] = {}
    if (path := folder / "added_tokens.json").exists():
        added |= {token: (text, False) for text, token in read_json(path).items() if type(token) is int}
    if (path := folder / "tokenizer_config.json").exists():
        decoder = read_json(path).get("added_tokens_decoder") or {}
        for key, entry in decoder.items() if isinstance(decoder, dict) else ():
            if not (key.isdecimal() and isinstance(entry, dict) and isinstance(entry.get("content"), str)):
                raise ModelFileError(
                    f"{path}: added_tokens_decoder entry {key[:20]!r} is malformed; fetch the file again"
                )
            added[int(key)] = (entry["content"], bool(entry.get("special")))
    return added
