"""What products and panels both read of a block: the scales of its sub-blocks, and the numbers that codes stand for.

The block formats are those of ggml (ggml-common.h, ggml-quants.c); ``gguf.quants`` is the same in NumPy, and the scales
here are its numbers bit for bit.
"""

from __future__ import annotations

from slimrt.ops.fast.kernels import inline
from slimrt.ops.fast.lanes import constant, joiner, picker, table
from slimrt.ops.fast.vectors import F32X8, F32X16, I32X8, I32X16, U8X16, Vector, convert, load, reinterpret, splat

__all__ = [
    "E2M1", "IQ4", "half", "iq4_xs_scales", "q2_k_numbers", "q3_k_numbers", "q6_k_numbers", "scales_and_minima",
    "times",
]  # fmt: skip

F16X1, F16X2 = Vector("f16", 1), Vector("f16", 2)
F32X1, F32X2 = Vector("f32", 1), Vector("f32", 2)
U16X1, U32X1, U32X2, U32X4, U32X8 = (Vector("u16", 1), *(Vector("u32", lanes) for lanes in (1, 2, 4, 8)))
I8X16 = Vector("i8", 16)

# MXFP4 (OCP Microscaling Formats 1.0): twice the numbers (e2m1) in the order of the codes.
E2M1 = table(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
IQ4 = table(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

_in_8, _in_16 = picker(*[0] * 8), picker(*[0] * 16)


@inline
def half(address):
    """The float16 at an address in every lane of F32X16."""
    return _in_16(convert(F32X1, load(F16X1, address)))


# -- Q4_K, Q5_K ------------------------------------------------------------------------------------------------------

_words_1_2, _words_3_3, _zipped = picker(1, 2), picker(3, 3), joiner(0, 2, 1, 3)
_nibble_of_word = constant(U32X2, 0, 4)
_d_and_dmin = picker(*[0] * 8, *[1] * 8)


@inline
def scales_and_minima(w):
    """Of a block of Q4_K or Q5_K d * scale of each of the 8 sub-blocks, then dmin * minimum: F32X16.

    The 6-bit numbers lie in bytes 4-15: 0-3 are scales 0-3 and, on top, two bits each of scales 4-7; 4-7 the same of
    minima; 8-11 the low nibbles of scales (low) and minima (high) 4-7.
    """
    head = load(U32X4, w)
    first, last = _words_1_2(head), _words_3_3(head) >> _nibble_of_word()
    last = (last & splat(U32X2, 0x0F0F0F0F)) | ((first >> splat(U32X2, 2)) & splat(U32X2, 0x30303030))
    bytes_ = reinterpret(U8X16, _zipped(first & splat(U32X2, 0x3F3F3F3F), last))
    d = convert(F32X2, load(F16X2, w))
    return _d_and_dmin(d) * convert(F32X16, convert(I32X16, bytes_))


# -- sub-blocks of 16: d (F32X16), whole scales (I8X16) and what a weight of 0 in its codes is less (F32X16) -----------


@inline
def times(d, scales):
    """d * scale of each sub-block: F32X16."""
    return d * convert(F32X16, convert(I32X16, scales))


@inline
def q2_k_numbers(w):
    """Of a block of Q2_K: bytes 0-15 are scales (low nibbles) and minima."""
    packed = load(U8X16, w)
    scales, minima = packed & splat(U8X16, 15), packed >> splat(U8X16, 4)
    return half(w + 80), reinterpret(I8X16, scales), times(half(w + 82), minima)


_low_bytes, _high_bytes = picker(*range(2, 10), *range(2, 10)), picker(*list(range(10, 14)) * 4)
_low_shifts, _high_shifts = constant(U32X4, 0, 0, 4, 4), constant(U32X4, 0, 2, 4, 6)


@inline
def q3_k_numbers(w):
    """Of a block of Q3_K: bytes 96-103 are the low nibbles of scales 0-7 (low) and 8-15, byte 104 + i has two bits each
    of scales i, i + 4, i + 8, i + 12. Scales are 32 less than their 6 bits."""
    packed = load(U8X16, w + 94)  # to the end of the block
    low = (reinterpret(U32X4, _low_bytes(packed)) >> _low_shifts()) & splat(U32X4, 0x0F0F0F0F)
    high = (reinterpret(U32X4, _high_bytes(packed)) >> _high_shifts()) & splat(U32X4, 0x03030303)
    d, scales = half(w + 108), reinterpret(I8X16, low | (high << splat(U32X4, 4))) - splat(I8X16, 32)
    return d, scales, times(d, scales)


@inline
def q6_k_numbers(w):
    """Of a block of Q6_K."""
    d, scales = half(w + 208), load(I8X16, w + 192)
    return d, scales, times(d, scales)


# -- IQ4_XS ----------------------------------------------------------------------------------------------------------

_nibbles, _pairs = constant(U32X8, *range(0, 32, 4)), constant(U32X8, *range(0, 16, 2))


@inline
def iq4_xs_scales(w):
    """d * scale of each of the 8 sub-blocks of a block of IQ4_XS: F32X8. Bytes 2 and 3 have the upper two bits of each,
    bytes 4-7 the low nibbles; scales are 32 less than their 6 bits."""
    high = (_in_8(convert(U32X1, load(U16X1, w + 2))) >> _pairs()) & splat(U32X8, 3)
    low = (_in_8(load(U32X1, w + 4)) >> _nibbles()) & splat(U32X8, 15)
    scales = reinterpret(I32X8, low | (high << splat(U32X8, 4))) - splat(I32X8, 32)
    return _in_8(convert(F32X1, load(F16X1, w))) * convert(F32X8, scales)
