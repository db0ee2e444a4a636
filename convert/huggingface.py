"""Hugging Face folders: config.json, safetensors, tokenizer files, as Transformers' ``save_pretrained`` writes them."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, Literal

from slimrt.convert.checkpoint import Rows, StoredTensor, permute_heads, read_json
from slimrt.convert.hyperparameters import Hyperparameters, RopeScaling, flag, number, whole
from slimrt.convert.ranks import from_tiktoken, is_tiktoken
from slimrt.convert.safetensors_reader import read_safetensors_folder
from slimrt.convert.source import Source, SourceTensor, check_complete, check_layers, gguf_names
from slimrt.convert.special_tokens import read_special_tokens
from slimrt.convert.tekken import from_tekken
from slimrt.convert.vocabulary import Vocabulary, from_sentencepiece, from_tokenizer_json
from slimrt.errors import ModelFileError

__all__ = ["open_huggingface"]

logger = logging.getLogger(__name__)

_ARCHITECTURES: dict[str, Literal["llama", "qwen2"]] = {
    "LlamaForCausalLM": "llama",
    "LLaMAForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
}
_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
_MLP = ("ffn_gate", "ffn_up", "ffn_down")


def open_huggingface(folder: Path) -> Source:
    """Read configuration, tensor headers and vocabulary; no weights yet.

    Raises ModelFileError or TokenizerError for anything unknown, missing or contradictory.
    """
    config_path = folder / "config.json"
    config = read_json(config_path)
    sizes = read_config(config, config_path)
    tensors = read_safetensors_folder(folder)
    check_layers(sizes.n_layers, len(tensors), config_path)
    named = {
        gguf: tensors[name] for gguf, name in gguf_names(list(tensors), sizes.arch, sizes.n_layers, folder).items()
    }
    if sizes.tied and named.pop("output.weight", None) is not None:
        logger.info("%s: lm_head is left out, the configuration ties it to the embedding", folder)
    check_complete({name: tensor.shape for name, tensor in named.items()}, sizes, folder)
    vocabulary = _read_vocabulary(folder, sizes.vocab_size)
    return Source(
        folder, sizes, {name: _source_tensor(name, tensor, sizes) for name, tensor in named.items()}, vocabulary
    )


def _source_tensor(name: str, tensor: StoredTensor, sizes: Hyperparameters) -> SourceTensor:
    rows: Rows = tensor.rows
    if sizes.arch == "llama" and (".attn_q." in name or ".attn_k." in name):
        rows = permute_heads(rows, tensor.shape[0], sizes.n_heads if ".attn_q." in name else sizes.n_kv_heads)
    return SourceTensor(rows, f"{tensor.path}: tensor '{tensor.name}'")


def read_config(config: dict[str, Any], path: Path) -> Hyperparameters:
    """The sizes that config.json states, with the defaults of Transformers' configuration classes."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    arch = _ARCHITECTURES.get(name) if isinstance(name, str) else None
    if arch is None:
        raise ModelFileError(
            f"{path}: architecture {str(name)[:60]!r}; slimrt converts and runs {', '.join(_ARCHITECTURES)}; choose "
            "a model with one of these"
        )
    if config.get("quantization_config"):
        raise ModelFileError(
            f"{path}: the weights are already quantised (quantization_config); fetch the unquantised checkpoint"
        )
    if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise ModelFileError(
            f"{path}: hidden_act {str(activation)[:40]!r}; slimrt converts and runs silu; choose another model"
        )

    d_model, n_heads = whole(config, "hidden_size", path), whole(config, "num_attention_heads", path)
    explicit = config.get("head_dim") is not None
    if not explicit and d_model % n_heads:
        raise ModelFileError(
            f"{path}: width {d_model} does not divide into {n_heads} heads and head_dim is missing; mend the file"
        )
    ctx_train = whole(config, "max_position_embeddings", path)
    # Newer configurations keep the base inside rope_parameters.
    rope: Any = next(
        (value for key in ("rope_parameters", "rope_scaling") if (value := config.get(key)) is not None), {}
    )
    if not isinstance(rope, dict):
        raise ModelFileError(f"{path}: rope scaling is a {type(rope).__name__}; an object is expected; mend the file")
    if config.get("use_sliding_window", name == "MistralForCausalLM") and config.get("sliding_window"):
        logger.warning(
            "%s: attention slides over %s tokens in training; like llama.cpp, the converted model attends to all",
            path,
            config["sliding_window"],
        )
    biases = _ATTENTION[:3] if arch == "qwen2" else _ATTENTION if flag(config, "attention_bias", path) else ()
    sizes = Hyperparameters(
        arch=arch,
        n_layers=whole(config, "num_hidden_layers", path),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=whole(config, "num_key_value_heads", path, default=n_heads),
        head_dim=whole(config, "head_dim", path, default=d_model // n_heads),
        explicit_head_dim=explicit,
        d_ff=whole(config, "intermediate_size", path),
        vocab_size=whole(config, "vocab_size", path),
        ctx_train=ctx_train,
        norm_eps=number(config, "rms_norm_eps", path, 1e-12, 0.1, 1e-6),
        rope_base=number(
            rope, "rope_theta", path, 1.0001, 1e12, number(config, "rope_theta", path, 1.0001, 1e12, 10000.0)
        ),
        rope_scaling=_rope_scaling(rope, ctx_train, path),
        tied=flag(config, "tie_word_embeddings", path),
        biases=frozenset((*biases, *(_MLP if flag(config, "mlp_bias", path) else ()))),
    )
    sizes.check(path)
    return sizes


def _rope_scaling(rope: dict[str, Any], ctx_train: int, path: Path) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in (None, "default"):
        return None
    if kind not in ("linear", "yarn", "llama3"):
        raise ModelFileError(
            f"{path}: rope scaling {str(kind)[:40]!r}; linear, yarn and llama3 can be converted; remove it to "
            "convert for the original context"
        )
    factor = number(rope, "factor", path, 1e-3, 1e6)
    # As Transformers does: YaRN without an original context stretches the stated one.
    original = whole(rope, "original_max_position_embeddings", path, default=ctx_train if kind != "llama3" else None)
    if kind == "linear":
        return RopeScaling("linear", factor)
    if kind == "llama3":
        low, high = number(rope, "low_freq_factor", path, 1e-3, 1e6), number(rope, "high_freq_factor", path, 1e-3, 1e6)
        if low >= high:
            raise ModelFileError(
                f"{path}: low_freq_factor {low:g} must be below high_freq_factor {high:g}; mend the file"
            )
        return RopeScaling("llama3", factor, original, low, high)
    if rope.get("original_max_position_embeddings") is not None and not math.isclose(factor, ctx_train / original):
        logger.warning(
            "%s: YaRN factor %g, but the context grows by %g; the file keeps the stated factor",
            path,
            factor,
            ctx_train / original,
        )

    def optional(key: str) -> float | None:
        return None if rope.get(key) is None else number(rope, key, path, 1e-6, 1e6)

    return RopeScaling(
        "yarn",
        factor,
        original,
        attention_factor=optional("attention_factor"),
        beta_fast=optional("beta_fast"),
        beta_slow=optional("beta_slow"),
    )


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
                    f"{path}: added_tokens_decoder entry {key[:20]!r} is malformed; fetch the file anew"
                )
            added[int(key)] = (entry["content"], bool(entry.get("special")))
    return added
