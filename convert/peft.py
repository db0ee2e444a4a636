"""LoRA adapters that PEFT saved into GGUF adapters: the entry point of ``slimrt convert --lora``.

What PEFT computes (its LoRA documentation): y = W x + s B (A x), s = alpha / r, or alpha / sqrt(r) with ``use_rslora``.
GGUF states an alpha and readers divide by each matrix's rank, so rsLoRA's is written as alpha * sqrt(r).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, cast

import numpy as np
from gguf import GGMLQuantizationType, GGUFType, GGUFWriter, LlamaFileType

from slimrt.convert.checkpoint import Rows, StoredTensor, permute_heads, read_json
from slimrt.convert.config_json import read_config as read_config_json
from slimrt.convert.mixes import parse_type
from slimrt.convert.safetensors_reader import read_safetensors
from slimrt.convert.source import gguf_names
from slimrt.convert.writer import OutputTensor, Progress, encoded, write_gguf
from slimrt.errors import ModelFileError, SettingError
from slimrt.models import ARCHITECTURES, read_config
from slimrt.models.adapters import projections
from slimrt.output import check_output
from slimrt.paths import user_path
from slimrt.weights.gguf import GGUFFile

__all__ = ["convert_adapter"]

_NAME = re.compile(r"^(?:base_model\.model\.)?(?P<base>.+)\.lora_(?P<side>[AB])\.weight$")
_TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
}
# What changes the product beyond A and B, or some ranks only: (key, what it may be).
_ABSENT: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False), "modules_to_save": (None, []), "bias": (None, "none"), "lora_bias": (None, False),
    "rank_pattern": (None, {}), "alpha_pattern": (None, {}), "fan_in_fan_out": (None, False),
    "layer_replication": (None, []), "layers_pattern": (None, [], "layers", ["layers"]),
    "trainable_token_indices": (None, [], {}), "target_parameters": (None, []), "use_qalora": (None, False),
    "alora_invocation_tokens": (None, []),
}  # fmt: skip


class _Sizes:
    """What of the base model decides the file, from either kind of base."""

    def __init__(self, base: Path) -> None:
        self.query_scale = 1.0
        if base.is_dir():
            path = base / "config.json"
            sizes = read_config_json(read_json(path), path)
            self.arch, self.n_layers, self.experts = sizes.arch, sizes.n_layers, cast(Any, sizes.experts)
            self.n_heads, self.n_kv_heads, self.head_dim = sizes.n_heads, sizes.n_kv_heads, sizes.head_dim
            self.d_model, self.d_ff = sizes.d_model, sizes.d_ff
            if sizes.family.qk_norm == "none":  # else it is in the norms of heads
                self.query_scale = sizes.query_scale
        else:
            config = read_config(GGUFFile(base))
            self.arch, self.n_layers, self.experts = config.arch, config.n_layers, config.experts
            self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
            self.d_model, self.d_ff = config.d_model, config.d_ff
        family = ARCHITECTURES[self.arch]
        self.permuted, self.grouped = family.permuted, family.grouped_qkv
        if not base.is_dir() and family.wide_at and family.qk_norm == "none":
            raise ModelFileError(
                f"{base}: a {self.arch} file does not tell how its queries were scaled; name the checkpoint's folder"
            )


def convert_adapter(
    source: str | Path,
    target: str | Path,
    type: str = "f16",
    progress: Progress | None = None,
    *,
    base: str | Path | None = None,
    force: bool = False,
) -> None:
    """Convert a folder that PEFT saved a LoRA adapter to (adapter_config.json, adapter_model.safetensors) to a GGUF
    adapter of ``type`` "f16" or "f32".

    ``base``: the model that it changes: its Hugging Face folder (config.json is enough) or a GGUF file of it; None: the
    folder that adapter_config.json names. ``progress`` and ``target``: as for ``convert_checkpoint``.

    Raises SettingError for another type or no base, ModelFileError for what GGUF cannot express (DoRA, whole modules,
    biases, patterns of ranks) or does not fit the base, OutputError if the target cannot be written.
    """
    source, target = user_path(source), user_path(target)
    kind = parse_type(type).name
    if kind not in _TYPES:
        raise SettingError(f"type {kind}: adapters are written as f16 or f32; take one of these")
    path = source / "adapter_config.json"
    settings = read_json(path)
    weights = source / "adapter_model.safetensors"
    check_output(target, sources=[path, weights], force=force)
    alpha = _alpha(settings, path)
    sizes = _Sizes(_base(base, settings, path))
    if not weights.exists():
        raise ModelFileError(f"{weights}: no such file; save the adapter with safe_serialization=True")
    tensors = _tensors(read_safetensors(weights), settings["r"], sizes, source, _TYPES[kind][0])

    def describe(writer: GGUFWriter) -> None:
        writer.add_type(GGUFType.ADAPTER)
        writer.add_name(source.resolve().name)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        writer.add_file_type(_TYPES[kind][1])

    write_gguf(target, sizes.arch, describe, tensors, progress)


def _base(base: str | Path | None, settings: dict[str, Any], path: Path) -> Path:
    named = settings.get("base_model_name_or_path")
    if base is None and isinstance(named, str) and named and Path(named).is_dir():
        return Path(named)
    if base is None:
        raise SettingError(
            f"{path}: the base model {str(named)[:80]!r} is no folder here; name its folder or a GGUF file of it "
            "(base=, --base)"
        )
    found = user_path(base)
    if not found.exists():
        raise SettingError(f"{found}: no such file or folder; name the base model's folder or a GGUF file of it")
    return found


def _alpha(settings: dict[str, Any], path: Path) -> float:
    """What GGUF calls alpha: what is multiplied with the product times the rank."""
    if settings.get("peft_type") != "LORA":
        raise ModelFileError(
            f"{path}: peft_type {str(settings.get('peft_type'))[:40]!r}; LORA can be converted; use another adapter"
        )
    for key, allowed in _ABSENT.items():
        if settings.get(key) not in allowed:
            raise ModelFileError(
                f"{path}: {key} is {str(settings[key])[:60]}, which slimrt cannot express in a GGUF adapter; merge the "
                "adapter into the model and convert that"
            )
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ModelFileError(f"{path}: r is {str(rank)[:40]}; a rank is a whole number of at least 1; mend the file")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha) or alpha == 0:
        raise ModelFileError(
            f"{path}: lora_alpha is {str(alpha)[:40]}; it must be a finite number other than 0; mend the file"
        )
    rooted = settings.get("use_rslora") or False
    if not isinstance(rooted, bool):
        raise ModelFileError(f"{path}: use_rslora is {str(rooted)[:40]}; it must be true or false; mend the file")
    return alpha * math.sqrt(rank) if rooted else float(alpha)


def _tensors(
    stored: dict[str, StoredTensor], rank: int, sizes: _Sizes, folder: Path, kind: GGMLQuantizationType
) -> list[OutputTensor]:
    pairs: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        match = _NAME.match(name)
        if match is None:
            raise ModelFileError(
                f"{folder}: tensor '{name[:80]}' is no lora_A or lora_B of a linear layer; leaving it out would change "
                "the results; merge the adapter into the model and convert that"
            )
        pairs.setdefault(match["base"] + ".weight", {})[match["side"]] = tensor
    if not pairs:
        raise ModelFileError(f"{folder}: the adapter has no tensors; save it again")
    result = []
    for gguf, name in gguf_names(list(pairs), sizes.arch, sizes.n_layers, folder).items():
        part, halves = gguf.split(".")[-2], pairs[name]
        places = projections(sizes).get(part, ())  # type: ignore[arg-type]
        if not places or sizes.grouped:
            raise ModelFileError(
                f"{folder}: '{name[:80]}' of {sizes.arch}; slimrt applies adapters to the projections of attention and "
                "of plain feed-forwards only; merge the adapter into the model and convert that"
            )
        if len(halves) != 2:
            raise ModelFileError(
                f"{folder}: '{name[:80]}' has lora_{next(iter(halves))} only; both halves are needed; fetch it again"
            )
        a, b = halves["A"], halves["B"]
        if a.shape[0] != rank:
            raise ModelFileError(
                f"{folder}: '{name[:80]}' has rank {a.shape[0]} and adapter_config.json says r {rank}; a GGUF adapter "
                "has one alpha; merge the adapter into the model and convert that"
            )
        shapes = [place.shape for place in places]
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) not in shapes:
            raise ModelFileError(
                f"{folder}: '{name[:80]}' has lora_A {a.shape} and lora_B {b.shape}; the base model's matrix is "
                f"{' or '.join(map(str, shapes))}; name the adapter's own base model"
            )
        rows: Rows = b.rows
        if sizes.permuted and part in ("attn_q", "attn_k"):
            rows = permute_heads(rows, b.shape[0], sizes.n_heads if part == "attn_q" else sizes.n_kv_heads)
        if part == "attn_q" and sizes.query_scale != 1:
            rows = _scaled(rows, sizes.query_scale)
        for side, tensor, values in (("a", a, a.rows), ("b", b, rows)):
            title = f"{gguf}.lora_{side}"
            result.append(
                OutputTensor(title, tensor.shape, kind, encoded(title, values, kind, f"{tensor.path}: '{name}'"))
            )
    return result


def _scaled(rows: Rows, scale: float) -> Rows:
    return lambda start, stop: rows(start, stop) * np.float32(scale)
