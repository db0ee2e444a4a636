"""Which type each tensor of a file gets: one type for all matrices, or llama.cpp's mixes of K-quants.

The mixes follow ``llama_tensor_get_type`` in llama.cpp's llama-quant.cpp, so that a name such as q4_k_m means the same
there and here: where errors cost most (the output, values and the feed-forward's way back in some layers) types are
wider.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from slimrt.errors import SettingError

__all__ = ["OUTPUT_TYPES", "OutputType", "check_takes_importance", "choose_types", "parse_type"]

logger = logging.getLogger(__name__)

_Type = GGMLQuantizationType
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class OutputType:
    """``base``: the type of most matrices. ``more``: the wider type of some of them in a mix, None for no mix."""

    name: str
    base: GGMLQuantizationType
    file_type: LlamaFileType
    more: GGMLQuantizationType | None = None


_TYPES = {
    output.name: output
    for output in (
        OutputType("f32", _Type.F32, LlamaFileType.ALL_F32),
        OutputType("f16", _Type.F16, LlamaFileType.MOSTLY_F16),
        OutputType("bf16", _Type.BF16, LlamaFileType.MOSTLY_BF16),
        OutputType("q8_0", _Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
        OutputType("q6_k", _Type.Q6_K, LlamaFileType.MOSTLY_Q6_K, _Type.Q6_K),
        OutputType("q5_k_m", _Type.Q5_K, LlamaFileType.MOSTLY_Q5_K_M, _Type.Q6_K),
        OutputType("q5_k_s", _Type.Q5_K, LlamaFileType.MOSTLY_Q5_K_S, _Type.Q5_K),
        OutputType("q5_1", _Type.Q5_1, LlamaFileType.MOSTLY_Q5_1),
        OutputType("q5_0", _Type.Q5_0, LlamaFileType.MOSTLY_Q5_0),
        OutputType("q4_k_m", _Type.Q4_K, LlamaFileType.MOSTLY_Q4_K_M, _Type.Q6_K),
        OutputType("q4_k_s", _Type.Q4_K, LlamaFileType.MOSTLY_Q4_K_S, _Type.Q5_K),
        OutputType("q4_1", _Type.Q4_1, LlamaFileType.MOSTLY_Q4_1),
        OutputType("q4_0", _Type.Q4_0, LlamaFileType.MOSTLY_Q4_0),
        OutputType("mxfp4_moe", _Type.Q8_0, LlamaFileType.MOSTLY_MXFP4_MOE),
    )
}
OUTPUT_TYPES = tuple(_TYPES)
"""The types that conversion and quantisation can write, from wide to narrow."""
_SHORT = {"q4_k": "q4_k_m", "q5_k": "q5_k_m"}  # as llama-quantize has them

# What takes the place of a type whose blocks do not divide a tensor's rows; float16 is next.
_NARROWER_BLOCKS = {_Type.Q4_K: _Type.Q5_0, _Type.Q5_K: _Type.Q5_1, _Type.Q6_K: _Type.Q8_0}
# Small matrices that decide much, or that are no operand of a product: they stay in float32.
_KEPT = re.compile(
    r"_norm\.weight$|ffn_gate_inp\.weight$|^position_embd\.|^token_types\.|ssm_conv1d|shortconv\.conv|altup|laurel"
    r"|per_layer_model_proj|attn_rel_b\.weight$|^rope_"
)
_LAYER = re.compile(r"^blk\.(\d+)\.")
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"


def parse_type(name: str) -> OutputType:
    """Raises SettingError for a name outside OUTPUT_TYPES."""
    name = name.lower()
    found = _TYPES.get(_SHORT.get(name, name))
    if found is None:
        raise SettingError(f"type {name[:40]!r}: must be one of {', '.join(OUTPUT_TYPES)}")
    return found


def check_takes_importance(output: OutputType) -> None:
    """Raises SettingError for a type that cannot make use of an importance matrix."""
    if output.more is None:
        names = ", ".join(known.name for known in _TYPES.values() if known.more is not None)
        raise SettingError(
            f"type {output.name}: an importance matrix serves {names}; take one of these or leave it out"
        )


def choose_types(shapes: Shapes, output: OutputType, arch: str) -> dict[str, GGMLQuantizationType]:
    """The type of every tensor of a model of architecture ``arch`` in a file of type ``output``, by name.

    Vectors, norms and what chooses experts stay float32. Rows that do not divide into blocks get a type of smaller
    blocks, or float16; that is logged.
    """
    mix = _Mix(shapes, output, arch) if output.more is not None else None
    types: dict[str, GGMLQuantizationType] = {}
    replaced: dict[tuple[GGMLQuantizationType, int], list[str]] = {}
    for name, shape in shapes.items():
        if len(shape) == 1 or not name.endswith(".weight") or _KEPT.search(name):
            types[name] = _Type.F32
        elif output.base in (_Type.F32, _Type.F16, _Type.BF16):
            types[name] = output.base
        else:
            # In files of one type too errors cost most in the embedding and the output.
            plain = _Type.Q8_0 if name in (_EMBEDDING, _OUTPUT) else output.base
            if output.file_type == LlamaFileType.MOSTLY_MXFP4_MOE and len(shape) == 3:
                plain = _Type.MXFP4  # the experts; all else is small beside them
            wanted = plain if mix is None else mix.type_of(name)
            types[name] = _fitting(wanted, shape[-1])
            if types[name] != wanted:
                replaced.setdefault((wanted, shape[-1]), []).append(name)
    _tell(replaced)
    return types


def _fitting(wanted: GGMLQuantizationType, columns: int) -> GGMLQuantizationType:
    """``wanted``, or what takes its place where its blocks do not divide rows of ``columns``."""
    return next(
        kind
        for kind in (wanted, _NARROWER_BLOCKS.get(wanted, _Type.F16), _Type.F16)
        if columns % GGML_QUANT_SIZES[kind][0] == 0
    )


def _tell(replaced: Mapping[tuple[GGMLQuantizationType, int], list[str]]) -> None:
    for (wanted, columns), names in replaced.items():
        logger.warning(
            "%s%s: rows of %d do not divide into %s blocks of %d; written as %s",
            names[0],
            f" and {len(names) - 1} more" if len(names) > 1 else "",
            columns,
            wanted.name,
            GGML_QUANT_SIZES[wanted][0],
            _fitting(wanted, columns).name,
        )


class _Mix:
    """The rules of one mix for one model."""

    def __init__(self, shapes: Shapes, output: OutputType, arch: str) -> None:
        self._output = output
        self._tied = _OUTPUT not in shapes
        numbers = {name: int(match[1]) for name in shapes if (match := _LAYER.match(name))}
        self._layers = max(numbers.values(), default=-1) + 1
        self._layer = numbers
        values = sorted(number for name, number in numbers.items() if _is_value(name))
        self._value_place = {number: place for place, number in enumerate(values)}
        self._eight_experts = any("_exps." in name and len(s) == 3 and s[0] == 8 for name, s in shapes.items())
        # LLaMA 70B and its like: eight heads share a value, so these matrices are small for what they decide.
        key, query = shapes.get("blk.0.attn_k.weight", (0,)), shapes.get("blk.0.attn_q.weight", (0,))
        self._few_values = arch in ("llama", "qwen2") and self._layers == 80 and key[0] < query[0]

    def type_of(self, name: str) -> GGMLQuantizationType:
        base, more, file_type = self._output.base, self._output.more, self._output.file_type
        assert more is not None
        medium = file_type in (LlamaFileType.MOSTLY_Q4_K_M, LlamaFileType.MOSTLY_Q5_K_M)
        small_4 = file_type == LlamaFileType.MOSTLY_Q4_K_S
        if name == _OUTPUT or (name == _EMBEDDING and self._tied):
            return _Type.Q6_K
        if name not in self._layer:
            return base
        layer = self._layer[name]
        if _is_value(name):
            place = self._value_place[layer]
            if self._eight_experts:
                return _Type.Q8_0
            if (medium and self._counts(place, len(self._value_place))) or (small_4 and place < 4):
                return more
            return _Type.Q5_K if self._few_values and base == _Type.Q4_K else base
        if "ffn_down" in name and (
            (medium and self._counts(layer, self._layers)) or (small_4 and layer < self._layers // 8)
        ):
            return more
        if self._eight_experts and name.endswith("attn_k.weight"):
            return _Type.Q8_0
        if self._eight_experts and name.endswith("attn_output.weight") and base == _Type.Q4_K:
            return _Type.Q5_K
        return base

    @staticmethod
    def _counts(layer: int, layers: int) -> bool:
        """Whether a layer is one that gets more bits: the first and last eighth, and every third between."""
        return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _is_value(name: str) -> bool:
    return name.endswith(("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight"))
