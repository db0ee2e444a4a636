"""Packed tensors to float32, in chunks that stay in the cache.

The block formats are those of ggml (ggml-common.h, ggml-quants.c); the reference is ``gguf.quants``, to which every
type here is bit-equal. The common types have an unpacker of their own that is 1.5 to 3 times quicker (Q4_1: 0.7 ns
an element against 1.6); all others go through the package. One thread: a second one was measured to lose, as each NumPy
call on a chunk is so short that the threads mostly wait for the interpreter lock.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from slimrt.errors import ComputeError, ModelFileError
from slimrt.weights.gguf import TensorInfo

__all__ = ["check_readable", "dequantize", "is_readable"]

Array = np.ndarray
Unpacker = Callable[[Array, Array], None]  # (blocks uint8 [n, block bytes], out float32 [n, block elements])

_CHUNK = 1 << 18  # elements at a time: 1 MiB of float32, and as much scratch at most, stay near the core
_UNPACKERS: dict[GGMLQuantizationType, Unpacker] = {}


@cache
def is_readable(kind: GGMLQuantizationType) -> bool:
    """Whether tensors of ``kind`` can be turned into float32."""
    if kind in _UNPACKERS:
        return True
    size = GGML_QUANT_SIZES[kind][1]
    try:
        gguf.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def check_readable(tensor: TensorInfo) -> None:
    """Raise ModelFileError if ``tensor`` is of a type that has no float32 reading."""
    if not is_readable(tensor.type):
        raise ModelFileError(
            f"tensor '{tensor.name}' has type {tensor.type.name}; it cannot be turned into float32; "
            "quantise the model to one of the common types (Q8_0, Q4_K, ...)"
        )


def dequantize(tensor: TensorInfo, rows: slice | None = None, *, out: Array | None = None) -> Array:
    """``tensor`` (or ``rows`` of one that has columns) as float32 [rows, columns], a new array or ``out``.

    ``out`` must be a C-contiguous float32 array of that shape. Scratch is bounded by the chunk, whatever the tensor's
    size.

    Raises ModelFileError for a type that has no float32 reading, ComputeError if a weight is NaN or infinite.
    """
    data = tensor.data if rows is None else tensor.data[rows]
    check_readable(tensor)
    shape = tensor.shape if rows is None else (len(data), *tensor.shape[1:])
    if out is None:
        out = np.empty(shape, np.float32)
    elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError(f"out is {out.dtype} {out.shape}; it must be C-contiguous float32 {shape}")
    elements, size = GGML_QUANT_SIZES[tensor.type]
    blocks = np.ascontiguousarray(data).reshape(-1).view(np.uint8).reshape(-1, size)
    target = out.reshape(-1, elements)
    unpack = _UNPACKERS.get(tensor.type) or _package_unpacker(tensor.type)
    step = max(1, _CHUNK // elements)
    for lo in range(0, len(blocks), step):
        chunk = target[lo : lo + step]
        with np.errstate(all="ignore"):  # NaN scales are reported by name below
            unpack(blocks[lo : lo + step], chunk)
        if not np.isfinite(chunk).all():
            raise ComputeError(
                f"tensor '{tensor.name}' ({tensor.type.name}) holds NaN or infinity; weights must be finite; "
                "the file is corrupt; fetch or convert it again"
            )
    return out


def _package_unpacker(kind: GGMLQuantizationType) -> Unpacker:
    def unpack(blocks: Array, out: Array) -> None:
        # One long row: the package loops over groups of 16 rows.
        out[...] = gguf.dequantize(blocks.reshape(1, -1), kind).reshape(out.shape)

    return unpack


def _unpacks(kind: GGMLQuantizationType) -> Callable[[Unpacker], Unpacker]:
    def register(unpacker: Unpacker) -> Unpacker:
        _UNPACKERS[kind] = unpacker
        return unpacker

    return register


@_unpacks(GGMLQuantizationType.F32)
def _f32(blocks: Array, out: Array) -> None:
    out[...] = blocks.view("<f4")


@_unpacks(GGMLQuantizationType.F64)
def _f64(blocks: Array, out: Array) -> None:
    out[...] = blocks.view("<f8")


@_unpacks(GGMLQuantizationType.BF16)
def _bf16(blocks: Array, out: Array) -> None:
    bits = out.view(np.uint32)
    bits[...] = blocks.view("<u2")
    np.left_shift(bits, 16, out=bits)


@_unpacks(GGMLQuantizationType.F16)
def _f16(blocks: Array, out: Array) -> None:
    # Exponent and fraction move to their float32 places, then one product mends the exponent's bias (15 to 127) and
    # normalises subnormals: exact, and quicker than NumPy's own conversion. Infinity and NaN have exponent
    # 31 and come out as 65536 or more, beyond every finite half, so they are turned back.
    bits = out.view(np.int32)
    bits[...] = blocks.view("<i2")  # sign extension fills bits 16 to 31 with the sign
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, np.int32(-0x70002000), out=bits)  # 0x8FFFE000
    np.multiply(out, np.float32(2.0**112), out=out)
    if out.size and max(out.max(), -out.min()) >= 65536:
        out[...] = blocks.view("<f2")


@_unpacks(GGMLQuantizationType.Q8_0)
def _q8_0(blocks: Array, out: Array) -> None:
    out[...] = blocks[:, 2:].view(np.int8)
    out *= _half(blocks, 0)


@_unpacks(GGMLQuantizationType.Q4_0)
def _q4_0(blocks: Array, out: Array) -> None:
    _centred(_nibbles(blocks, 2), 8, out)
    out *= _half(blocks, 0)


@_unpacks(GGMLQuantizationType.Q4_1)
def _q4_1(blocks: Array, out: Array) -> None:
    out[...] = _nibbles(blocks, 4)
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


@_unpacks(GGMLQuantizationType.Q5_0)
def _q5_0(blocks: Array, out: Array) -> None:
    _centred(_nibbles(blocks, 6) | _fifth_bits(blocks, 2), 16, out)
    out *= _half(blocks, 0)


@_unpacks(GGMLQuantizationType.Q5_1)
def _q5_1(blocks: Array, out: Array) -> None:
    out[...] = _nibbles(blocks, 8) | _fifth_bits(blocks, 4)
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)  # twice the values


@_unpacks(GGMLQuantizationType.MXFP4)
def _mxfp4(blocks: Array, out: Array) -> None:
    _E2M1.take(_nibbles(blocks, 1), out=out)
    out *= np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128)


@_unpacks(GGMLQuantizationType.Q4_K)
def _q4_k(blocks: Array, out: Array) -> None:
    out[...] = _grouped_nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(out.shape)
    _scale_and_shift(blocks, out)


@_unpacks(GGMLQuantizationType.Q5_K)
def _q5_k(blocks: Array, out: Array) -> None:
    values = _grouped_nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    high = np.ascontiguousarray(blocks[:, 16:48])  # bit i of byte j belongs to value j of sub-block i
    for i in range(8):
        values[:, i] |= ((high >> i) & 1) << 4
    out[...] = values.reshape(out.shape)
    _scale_and_shift(blocks, out)


@_unpacks(GGMLQuantizationType.Q6_K)
def _q6_k(blocks: Array, out: Array) -> None:
    # Two halves of 128 values: 64 bytes of low nibbles, then 32 bytes that hold four 2-bit tops each.
    values = _grouped_nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    tops = np.ascontiguousarray(blocks[:, 128:192]).reshape(-1, 2, 32)
    for i in range(4):
        values[:, :, i] |= ((tops >> (2 * i)) & 3) << 4
    _centred(values.reshape(out.shape), 32, out)
    scales = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    parts = out.reshape(-1, 16, 16)
    parts *= scales[:, :, None]


def _half(blocks: Array, at: int) -> Array:
    """The half-precision number at byte ``at`` of each block -> float32 [n, 1]."""
    return blocks[:, at : at + 2].view("<f2").astype(np.float32)


def _nibbles(blocks: Array, at: int) -> Array:
    """16 bytes from ``at`` of each block -> uint8 [n, 32]: the low nibbles, then the high ones."""
    size = blocks.shape[1]
    # complex128 stands for "16 bytes": NumPy moves such items in one go, rows of 16 bytes byte by byte.
    field = np.dtype({"names": ["q"], "formats": [np.complex128], "offsets": [at], "itemsize": size})
    packed = blocks.view(field)["q"].copy().view(np.uint8)
    result = np.empty((len(blocks), 2), np.complex128)
    result[:, :1] = (packed & 15).view(np.complex128)
    result[:, 1:] = (packed >> 4).view(np.complex128)
    return result.view(np.uint8)


def _grouped_nibbles(packed: Array) -> Array:
    """uint8 [n, groups, width] -> [n, groups, 2, width]: each group's low nibbles, then its high ones."""
    values = np.empty((*packed.shape[:2], 2, packed.shape[2]), np.uint8)
    np.bitwise_and(packed, 15, out=values[:, :, 0])
    np.right_shift(packed, 4, out=values[:, :, 1])
    return values


def _fifth_bits(blocks: Array, at: int) -> Array:
    """32 bits from byte ``at`` of each block -> uint8 [n, 32] of 0 or 16."""
    bits = np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little")
    return np.left_shift(bits, 4, out=bits)


def _centred(values: Array, centre: int, out: Array) -> None:
    """out = values - centre, exactly; values uint8 below 128."""
    signed = values.view(np.int8)
    np.subtract(signed, np.int8(centre), out=signed)
    out[...] = signed


def _scale_and_shift(blocks: Array, out: Array) -> None:
    """Q4_K and Q5_K: out [n, 256] times the 8 sub-block scales, minus the 8 sub-block minima, both of 6 bits."""
    packed = blocks[:, 4:16]
    scales = np.empty((len(blocks), 8), np.uint8)
    minima = np.empty((len(blocks), 8), np.uint8)
    # Bytes 0-3: scales 0-3 and the top bits of scales 4-7; bytes 4-7: the same of minima; 8-11: both low nibbles 4-7.
    scales[:, :4] = packed[:, :4] & 63
    minima[:, :4] = packed[:, 4:8] & 63
    scales[:, 4:] = (packed[:, 8:] & 15) | ((packed[:, :4] >> 2) & 48)
    minima[:, 4:] = (packed[:, 8:] >> 4) | ((packed[:, 4:8] >> 2) & 48)
    parts = out.reshape(-1, 8, 32)
    parts *= (_half(blocks, 0) * scales.astype(np.float32))[:, :, None]
    parts -= (_half(blocks, 2) * minima.astype(np.float32))[:, :, None]
