"""The file reader against the gguf package, and what it says about files that are wrong."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType, GGUFEndian, GGUFValueType

from slimrt.errors import ComputeError, ModelFileError
from slimrt.weights.gguf import GGUFFile, TensorInfo
from slimrt.weights.quants import dequantize, is_readable
from tests.tiny_gguf import random_blocks, random_tensor, write_tiny_llama

DEQUANTISED = sorted(
    (kind for kind in GGMLQuantizationType if is_readable(kind) and kind != GGMLQuantizationType.F64),
    key=lambda kind: kind.value,
)


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, np.ndarray):
        return ours.tolist() == list(theirs)
    return type(ours) is type(theirs) and ours == theirs


def assert_as_the_package_reads_it(path: Path) -> None:
    ours, reader = GGUFFile(path), gguf.GGUFReader(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for name, field in fields.items():
        assert same(ours.metadata[name], field.contents()), name
    assert list(ours.tensors) == [tensor.name for tensor in reader.tensors]
    for theirs in reader.tensors:
        tensor = ours.tensor(theirs.name)
        assert tensor.shape == tuple(int(n) for n in theirs.shape[::-1])
        assert tensor.type == theirs.tensor_type
        assert tensor.data.tobytes() == theirs.data.tobytes()


# -- good files --------------------------------------------------------------------------------------------------------


def test_default_model_reads_as_in_the_package(default_model: Path) -> None:
    assert_as_the_package_reads_it(default_model)


def test_every_value_type_reads_as_in_the_package(tmp_path: Path) -> None:
    path = tmp_path / "values.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for kind in GGUFValueType:
        if kind in (GGUFValueType.ARRAY, GGUFValueType.STRING):
            continue
        bits = 8 * np.dtype(gguf.GGUFReader.gguf_scalar_to_np[kind]).itemsize
        if kind.name.startswith("UINT"):
            values: list[Any] = [0, 1, 2**bits - 1]
        elif kind.name.startswith("INT"):
            values = [-(2 ** (bits - 1)), -1, 2 ** (bits - 1) - 1]
        elif kind.name.startswith("FLOAT"):
            values = [0.0, -1.5, 3.0e38]
        else:
            values = [True, False]
        for n, value in enumerate(values):
            writer.add_key_value(f"one.{kind.name}.{n}", value, kind)
        writer.add_key_value(f"many.{kind.name}", values, GGUFValueType.ARRAY, kind)
    writer.add_string("text", "naïve 文 \N{GRINNING FACE}\n\0")
    writer.add_array("texts", ["", "a", "文", "\N{GRINNING FACE}" * 50])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_as_the_package_reads_it(path)


@pytest.mark.parametrize("kind", DEQUANTISED, ids=lambda kind: kind.name)
def test_every_tensor_type_unpacks_as_in_the_package(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", type=kind.name, d_model=256, d_ff=512)
    assert_as_the_package_reads_it(path)
    file = GGUFFile(path)
    for theirs in gguf.GGUFReader(path).tensors:
        expected = np.asarray(gguf.dequantize(theirs.data, theirs.tensor_type), np.float32)
        result = dequantize(file.tensor(theirs.name))
        assert result.dtype == np.float32
        np.testing.assert_array_equal(result.view(np.uint32), expected.reshape(result.shape).view(np.uint32))


def test_types_that_the_package_unpacks_are_all_there() -> None:
    names = (
        "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S "
        "IQ4_NL IQ4_XS TQ1_0 TQ2_0 MXFP4"
    )
    assert {kind.name for kind in DEQUANTISED} >= set(names.split())


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "Q3_K"])
def test_any_bytes_unpack_as_in_the_package(name: str) -> None:
    """All bit patterns of the quantised fields, across chunk borders, by rows, and into a given array."""
    kind, rng = GGMLQuantizationType[name], np.random.default_rng(1)
    shape = (700, 512)  # more than one chunk
    tensor = TensorInfo("t", shape, kind, random_blocks(kind, shape, rng))
    expected = gguf.dequantize(tensor.data, kind)
    np.testing.assert_array_equal(dequantize(tensor).view(np.uint32), expected.view(np.uint32))
    np.testing.assert_array_equal(dequantize(tensor, slice(13, 600)), expected[13:600])
    stacked = np.full((900, 512), np.nan, np.float32)
    assert dequantize(tensor, out=stacked[100:800]).base is stacked
    np.testing.assert_array_equal(stacked[100:800], expected)
    with pytest.raises(ValueError, match="C-contiguous"):
        dequantize(tensor, out=np.empty((512, 700), np.float32).T)


def test_all_halves_and_bfloats_are_exact() -> None:
    words = np.arange(1 << 16, dtype=np.uint16)
    halves = words.view(np.float16)
    for kind, data in (
        (GGMLQuantizationType.F16, halves[np.isfinite(halves)]),
        (GGMLQuantizationType.BF16, words[np.isfinite((words.astype(np.uint32) << 16).view(np.float32))]),
    ):
        result = dequantize(TensorInfo("t", data.shape, kind, data))
        expected = gguf.dequantize(data.view(np.uint8), kind)
        np.testing.assert_array_equal(result.view(np.uint32), expected.view(np.uint32))


def test_a_packed_vector_unpacks() -> None:
    kind = GGMLQuantizationType.Q4_1
    data = random_blocks(kind, (1, 96), np.random.default_rng(0))
    result = dequantize(TensorInfo("t", (96,), kind, data[0]))
    np.testing.assert_array_equal(result, gguf.dequantize(data, kind)[0])


def test_float64_narrows() -> None:
    data = np.array([[1 / 3, -2.5]])
    result = dequantize(TensorInfo("t", data.shape, GGMLQuantizationType.F64, data))
    np.testing.assert_array_equal(result, data.astype(np.float32))


def _poisoned(name: str) -> TensorInfo:
    kind = GGMLQuantizationType[name]
    data = random_tensor(kind, (600, 512), np.random.default_rng(0))
    if data.dtype == np.uint8:
        at = {"Q6_K": 208, "Q3_K": 108, "BF16": 0}.get(name, 0)
        data[431, at : at + 2] = (0xC0, 0x7F) if name == "BF16" else (0x00, 0x7E)
    else:
        data[431, 7] = np.inf
    return TensorInfo("blk.1.attn_q.weight", (600, 512), kind, data)


@pytest.mark.parametrize(
    "name", ["F32", "F16", "F64", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K", "Q3_K", "IQ4_XS"]
)
@pytest.mark.filterwarnings("error")
def test_weights_that_are_not_finite_are_refused_by_name(name: str) -> None:
    with pytest.raises(ComputeError, match=r"^tensor 'blk\.1\.attn_q\.weight' .*NaN or infinity"):
        dequantize(_poisoned(name))


def test_types_without_a_float_reading_are_refused() -> None:
    data = np.zeros((1, 292), np.uint8)
    with pytest.raises(ModelFileError, match="tensor 't' has type Q8_K"):
        dequantize(TensorInfo("t", (1, 256), GGMLQuantizationType.Q8_K, data))


# -- several parts -----------------------------------------------------------------------------------------------------


def test_parts_read_as_one_file(tmp_path: Path) -> None:
    whole = GGUFFile(write_tiny_llama(tmp_path / "whole.gguf"))
    first = write_tiny_llama(tmp_path / "cut.gguf", split_max_tensors=6)
    parts = GGUFFile(first)
    assert first.name == "cut-00001-of-00004.gguf"
    assert list(parts.tensors) == list(whole.tensors)
    for name, tensor in whole.tensors.items():
        assert parts.tensor(name).data.tobytes() == tensor.data.tobytes()
    assert parts.file_size == sum(path.stat().st_size for path in tmp_path.glob("cut-*"))


def test_parts_missing_swapped_misnamed(tmp_path: Path) -> None:
    first = write_tiny_llama(tmp_path / "cut.gguf", split_max_tensors=6)
    second, third = (first.with_name(first.name.replace("00001-", f"0000{n}-", 1)) for n in (2, 3))
    expect(second, "is opened by its first part")
    spare = tmp_path / "spare"
    second.rename(spare)
    expect(first, "1 of 4 parts are missing")
    third.rename(second)
    spare.rename(third)
    expect(first, "split.no is 2, the name says 1")
    first.rename(tmp_path / "other.gguf")
    expect(tmp_path / "other.gguf", "name must end in -00001-of-00004.gguf")


# -- wrong files -------------------------------------------------------------------------------------------------------


def expect(path: Path, what: str) -> None:
    """``path`` is refused with one line that says ``what``, within a second, in little memory."""
    tracemalloc.start()
    begun = time.perf_counter()
    try:
        with pytest.raises(ModelFileError) as caught:
            GGUFFile(path)
        took, peak = time.perf_counter() - begun, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert what in message
    assert message.isprintable(), "one line, no control characters"
    assert len(message) < 1000
    assert took < 1
    assert peak < 8 << 20


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, body: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + body


def tensor(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file(
    keys: list[bytes],
    tensors: list[bytes],
    data: int = 4096,
    *,
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
) -> bytes:
    n_keys, n_tensors = len(keys) if n_keys is None else n_keys, len(tensors) if n_tensors is None else n_tensors
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join(keys + tensors)
    return head + bytes(-len(head) % 32 + data)


HUGE = 2**64 - 1
BAD = {
    "empty": (b"", "0 bytes; a GGUF header takes 24"),
    "short": (b"GGUF" + bytes(19), "23 bytes; a GGUF header takes 24"),
    "magic": (b"PK\x03\x04" + bytes(60), r"starts with b'PK\x03\x04'"),
    "version": (file([], [], version=9), "GGUF version 9"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "key count": (file([], [], n_keys=HUGE), f"a metadata count of {HUGE} needs"),
    "tensor count": (file([], [], n_tensors=HUGE), f"a tensor count of {HUGE} needs"),
    "many tensors": (file([], [], 2 << 20, n_tensors=70_000), "70000 tensors; at most 65536 are read"),
    "tensor count, plausible": (file([], [], n_tensors=100), "tensor '' has 0 dimensions"),
    "key length": (file([struct.pack("<Q", HUGE)], []), f"a metadata key needs {HUGE} bytes"),
    "long key": (file([key(b"k" * 70000, 0, b"\1")], []), "70000 bytes; at most 65535"),
    "text length": (file([key(b"k", 8, struct.pack("<Q", 2**63))], []), f"the value of metadata key 'k' needs {2**63}"),
    "long text": (file([key(b"k", 8, struct.pack("<Q", 17 << 20))], [], 18 << 20), "at most 16777216 are allowed"),
    "UTF-8 key": (file([key(b"\xff\xfe", 0, b"\1")], []), "a metadata key is not valid UTF-8"),
    "UTF-8 text": (file([key(b"k", 8, text(b"\xff"))], []), "the value of metadata key 'k' is not valid UTF-8"),
    "UTF-8 texts": (file([key(b"k", 9, array(8, 2, text(b"a") + text(b"\x80")))], []), "entry 1 is not valid UTF-8"),
    "value type": (file([key(b"k", 13, b"")], []), "metadata key 'k' has value type 13"),
    "element type": (file([key(b"k", 9, array(99, 1))], []), "metadata key 'k' has element type 99"),
    "array length": (file([key(b"k", 9, array(4, HUGE))], []), f"'k' with {HUGE} elements needs {4 * HUGE} bytes"),
    "texts length": (file([key(b"k", 9, array(8, 2**60))], []), f"with {2**60} elements needs"),
    "many texts": (file([key(b"k", 9, array(8, 5 << 20))], [], 64 << 20), "to 5242880; at most 4194304"),
    "many arrays": (file([key(b"k", 9, array(9, 5 << 20))], [], 64 << 20), "to 5242880; at most 4194304"),
    "deep arrays": (file([key(b"k", 9, array(9, 1) * 50)], []), "nests arrays deeper than 4"),
    "key twice": (file([key(b"k\n", 0, b"\1")] * 2, []), r"metadata key 'k\n' occurs twice"),
    "alignment": (file([key(b"general.alignment", 4, struct.pack("<I", 0))], []), "general.alignment is 0"),
    "alignment type": (file([key(b"general.alignment", 8, text(b"x\ny" * 99))], []), r"general.alignment is 'x\nyx"),
    "dimensions": (file([], [tensor(b"t", (1, 1, 1, 1, 1))]), "tensor 't' has 5 dimensions"),
    "empty shape": (file([], [tensor(b"t", (32, 0))]), "tensor 't' has shape (0, 32)"),
    "huge shape": (file([], [tensor(b"t", (HUGE, HUGE, HUGE, HUGE))]), "needs"),
    "shape past the end": (file([], [tensor(b"t", (1025,))]), "tensor 't' (F32 (1025,)) needs 4100 bytes"),
    "row": (file([], [tensor(b"t", (33, 2), 2)]), "rows of 33 do not divide into Q4_0 blocks of 32"),
    "tensor type": (file([], [tensor(b"t", (32,), 4)]), "tensor 't' has type number 4"),
    "tensor type, negative": (file([], [tensor(b"t", (32,), 2**32 - 1)]), "type number 4294967295"),
    "offset": (file([], [tensor(b"t", (32,), 0, 1 << 40)]), "needs 128 bytes at offset 1099511"),
    "offset, wrapping": (file([], [tensor(b"t", (32,), 0, 2**64 - 32)]), "tensor 't' (F32 (32,)) needs"),
    "offset, unaligned": (file([], [tensor(b"t", (32,), 0, 4)]), "tensors are aligned to 32"),
    "tensor twice": (file([], [tensor(b"t\x1b", (32,))] * 2), r"tensor 't\x1b' occurs twice"),
    "overlap": (file([], [tensor(b"a", (32,), 0, 32), tensor(b"b", (32,))]), "tensor 'a' overlaps tensor 'b'"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_files_are_refused(tmp_path: Path, name: str) -> None:
    content, what = BAD[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    expect(path, what)


def test_big_endian_file_of_the_package_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "be.gguf", "llama", endianess=GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    expect(tmp_path / "be.gguf", "big-endian")


def test_truncation_at_every_byte_of_the_header_is_seen(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", n_layers=1, d_ff=32, **{"general.name": "文"})
    content = path.read_bytes()
    header = len(content) - sum(t.nbytes for t in GGUFFile(path).tensors.values())
    assert 4096 < header < 16384, "every kind of header entry, and few enough cuts for a short test"
    cut = tmp_path / "cut.gguf"
    for length in [*range(header), *np.linspace(header, len(content) - 1, 50, dtype=int).tolist()]:
        cut.write_bytes(content[:length])
        with pytest.raises(ModelFileError) as caught:
            GGUFFile(cut)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda path: path.mkdir(), "a folder"),
        (lambda path: None, "no such file"),
        (lambda path: path.symlink_to("/dev/zero"), "a device or a pipe"),
        (lambda path: os.mkfifo(path), "a device or a pipe"),
        (lambda path: path.symlink_to(path), "cannot be read"),
    ],
    ids=["folder", "missing", "device", "pipe", "loop"],
)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes and device files are POSIX")
def test_what_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], None], what: str) -> None:
    path = tmp_path / "m.gguf"
    make(path)
    expect(path, what)


def test_names_that_no_file_can_have_are_refused(tmp_path: Path) -> None:
    expect(Path("a\0b"), "no file can have a NUL byte in its name")
    expect(tmp_path / ("x" * 300), "cannot be read")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file_is_refused(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf")
    path.chmod(0)
    expect(path, "cannot be read (Permission denied)")


def test_get_checks_presence_and_kind(tmp_path: Path) -> None:
    model = GGUFFile(write_tiny_llama(tmp_path / "m.gguf"))
    assert model.get("llama.block_count", int) == 2
    assert model.get("llama.block_count", float) == 2.0
    assert model.get("llama.nothing", int, 7) == 7
    for name, kind, what in (
        ("llama.nothing", int, "metadata key 'llama.nothing' is missing"),
        ("general.name", int, "metadata key 'general.name' is str, it must be int"),
        ("tokenizer.ggml.add_bos_token", int, "is bool, it must be int"),
        ("tokenizer.ggml.tokens", str, "is an array, it must be str"),
    ):
        with pytest.raises(ModelFileError, match=what):
            model.get(name, kind)
    with pytest.raises(ModelFileError, match=r"tensor 'blk\.9\.attn_q\.weight' is missing"):
        model.tensor("blk.9.attn_q.weight")
