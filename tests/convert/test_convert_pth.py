"""Meta's format: shards are joined, and a .pth file can do nothing but describe tensors."""

from __future__ import annotations

import io
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimrt.convert import convert_checkpoint
from slimrt.convert.pth_reader import read_pth
from slimrt.errors import ModelFileError, SlimrtError
from slimrt.weights.gguf import GGUFFile
from tests.convert_cases import checkpoint, edit_json


class _Global:
    """Pickles as a reference to ``module.name`` called with ``arguments``."""

    def __init__(self, module: str, name: str, arguments: tuple[Any, ...]) -> None:
        self.module, self.name, self.arguments = module, name, arguments


class _Pickler(pickle._Pickler):  # the Python one can write references to modules that are not installed
    def save(self, obj: Any, save_persistent_id: bool = True) -> Any:
        if isinstance(obj, _Global):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
            return None
        return super().save(obj, save_persistent_id)


def _pickled(state: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(state)
    return buffer.getvalue()


def _archive(path: Path, entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("name", ["meta-one", "meta-two"])
def test_metadata_of_metas_releases(name: str, tmp_path: Path) -> None:
    convert_checkpoint(checkpoint(name), tmp_path / "model.gguf", "f16")
    metadata = GGUFFile(tmp_path / "model.gguf").metadata
    llama3 = name == "meta-two"
    assert {key: metadata[f"llama.{key}"] for key in ("context_length", "feed_forward_length", "vocab_size")} == {
        "context_length": 131072 if llama3 else 4096,
        "feed_forward_length": 64,
        "vocab_size": 384,
    }
    assert metadata["tokenizer.ggml.model"] == ("gpt2" if llama3 else "llama")
    assert metadata["tokenizer.ggml.bos_token_id"] == (368 if llama3 else 1)
    assert "llama.attention.key_length" not in metadata  # Meta's head width is always D/H


def test_tensors_in_strided_slices_of_a_larger_storage() -> None:
    """meta-two's shards keep column slices as views: wo is one half of each row of what is stored."""
    first, second = (read_pth(checkpoint("meta-two") / f"consolidated.0{i}.pth") for i in (0, 1))
    name = "layers.0.attention.wo.weight"
    assert first[name].shape == (32, 16) and first[name].row_stride == 32
    left, right = first[name].rows(3, 9), second[name].rows(3, 9)
    assert left.shape == right.shape == (6, 16) and np.isfinite(left).all() and not np.array_equal(left, right)


EVIL = {
    "os.system": _Global("os", "system", ("touch evil",)),
    "posix.system": _Global("posix", "system", ("touch evil",)),
    "builtins.eval": _Global("builtins", "eval", ("open('evil', 'w')",)),
    "builtins.getattr": _Global("builtins", "getattr", (1, "real")),
    "torch.load": _Global("torch", "load", ("x",)),
    "torch.storage._load_from_bytes": _Global("torch.storage", "_load_from_bytes", (b"x",)),
    "collections.Counter": _Global("collections", "Counter", ()),
    "torch._utils._rebuild_tensor_v2.__globals__": _Global("torch._utils", "_rebuild_tensor_v2.__globals__", ()),
}


@pytest.mark.parametrize("name", EVIL)
def test_other_globals_are_refused_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = _archive(tmp_path / "consolidated.00.pth", {"a/data.pkl": _pickled({"x": EVIL[name]})})
    with pytest.raises(ModelFileError, match=f"the pickle asks for '{name}'; only tensors") as caught:
        read_pth(path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def _tensor_bytes(numel: Any = 4, first: Any = 0, shape: Any = (2, 2), strides: Any = (2, 1)) -> bytes:
    """data.pkl of one float32 tensor, as torch.save writes it, with storage 0."""

    class Pickler(_Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", _Reference("torch", "FloatStorage"), "0", "cpu", numel) if obj is storage else None

        def save(self, obj: Any, save_persistent_id: bool = True) -> Any:
            if isinstance(obj, _Reference):
                self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
                return None
            return super().save(obj, save_persistent_id)

    class _Reference:
        def __init__(self, module: str, name: str) -> None:
            self.module, self.name = module, name

    storage = object()
    tensor = _Global("torch._utils", "_rebuild_tensor_v2", (storage, first, shape, strides, False, OrderedDict()))
    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({"x": tensor})
    return buffer.getvalue()


def test_a_handmade_file_is_read(tmp_path: Path) -> None:
    values = np.arange(4, dtype="<f4")
    path = _archive(tmp_path / "a.pth", {"a/data.pkl": _tensor_bytes(), "a/data/0": values.tobytes()})
    np.testing.assert_array_equal(read_pth(path)["x"].rows(0, 2), values.reshape(2, 2))


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (_tensor_bytes(numel=5), r"storage 0 should hold 5 values and has 16 bytes"),
        (_tensor_bytes(numel=1 << 60), r"storage 0 should hold"),
        (_tensor_bytes(numel=-1), r"storage 0 should hold -1"),
        (_tensor_bytes(first=1), r"exceeds its storage of 4 values"),
        (_tensor_bytes(shape=(1 << 40, 2)), r"exceeds its storage"),
        (_tensor_bytes(shape=(0, 2)), r"has shape \(0, 2\)"),
        (_tensor_bytes(shape=()), r"data.pkl is corrupt \(a malformed tensor\)"),
        (_tensor_bytes(strides=(1, 2)), r"has strides \(1, 2\) .* save tensor.contiguous\(\)"),
        (_tensor_bytes(strides=(0, 1)), r"rows must be contiguous"),
        (_tensor_bytes(first=-1), r"a malformed tensor"),
        (_tensor_bytes(shape=5), r"data.pkl is corrupt"),
        (_pickled({"x": 1}), r"'x' is a int; a tensor is expected"),
        (_pickled({1: 1}), r"a key is a int, not a name"),
        (_pickled([1]), r"holds a list; a dictionary of tensors"),
        (_pickled({}), r"holds a dict; a dictionary of tensors"),
        (b"\x80\x02r\xff\xff\xff\xff.", r"data.pkl is corrupt"),  # LONG_BINPUT at 2**32 - 1
        (b"\x80\x02" + b"(" * 5000 + b"t" * 5000 + b".", r"holds a tuple"),
        (b"", r"data.pkl is corrupt"),
    ],
)
def test_bad_descriptions(pickled: bytes, message: str, tmp_path: Path) -> None:
    path = _archive(tmp_path / "a.pth", {"a/data.pkl": pickled, "a/data/0": bytes(16)})
    with pytest.raises(ModelFileError, match=message) as caught:
        read_pth(path)
    assert "\n" not in str(caught.value)


def _doubled(levels: int) -> bytes:
    """A tuple of two equal tuples, and so on: 2**levels leaves in 7 bytes a level."""
    code = b"K\x01"
    for level in range(levels):
        code += b"r" + struct.pack("<I", level) + b"0" + (b"j" + struct.pack("<I", level)) * 2 + b"\x86"
    return code


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02}" + _doubled(60) + b"K\x01s.",  # as a key
        b"\x80\x02(ctorch\nFloatStorage\n".replace(b"(c", b"}X\x01\x00\x00\x00x(X\x07\x00\x00\x00storagec")
        + _doubled(60)
        + b"X\x03\x00\x00\x00cpuK\x04tQs.",  # as the name of a storage
        b"\x80\x02}X\x01\x00\x00\x00x" + _doubled(60) + b"s.",  # as a tensor
    ],
)
def test_shared_tuples_are_refused_at_once(pickled: bytes, tmp_path: Path) -> None:
    """In a process of its own: neither hashing nor printing 2**60 leaves ends, or can be interrupted."""
    path = _archive(tmp_path / "a.pth", {"a/data.pkl": pickled, "a/data/0": bytes(16)})
    script = (
        "import sys; from pathlib import Path; from slimrt.convert.pth_reader import read_pth\n"
        "try: read_pth(Path(sys.argv[1]))\n"
        "except ValueError as error: print(type(error).__name__, error)"
    )
    run = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=30)
    assert run.stdout.startswith("ModelFileError") and not run.stderr


def test_a_refused_global_is_named_as_such(tmp_path: Path) -> None:
    path = _archive(tmp_path / "a.pth", {"a/data.pkl": _pickled({"x": EVIL["os.system"]})})
    with pytest.raises(ModelFileError) as caught:
        read_pth(path)
    assert "zip" not in str(caught.value)


def test_bad_archives(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")  # how files before PyTorch 1.6 begin
    with pytest.raises(ModelFileError, match=r"not a zip archive; .* load it with PyTorch and save it again"):
        read_pth(path)
    _archive(path, {"a/data/0": b""})
    with pytest.raises(ModelFileError, match=r"0 entries called data.pkl"):
        read_pth(path)
    _archive(path, {"a/data.pkl": _tensor_bytes(), "a/data/0": bytes(16)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ModelFileError, match="storage 0 is compressed"):
        read_pth(path)
    _archive(path, {"a/data.pkl": _tensor_bytes(), "a/data/0": bytes(16), "a/byteorder": b"big"})
    with pytest.raises(ModelFileError, match="big-endian"):
        read_pth(path)
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_pth(tmp_path / "missing.pth")


ONE = (checkpoint("meta-one") / "consolidated.00.pth").read_bytes()
DIRECTORY = ONE.index(b"PK\x01\x02")


@given(
    st.lists(st.tuples(st.integers(0, 3000) | st.integers(DIRECTORY, len(ONE) - 1), st.integers(0, 255)), max_size=8),
    st.just(len(ONE)) | st.integers(1, len(ONE)),
)
def test_mutated_files_never_crash(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], keep: int
) -> None:
    raw = bytearray(ONE[:keep])
    for position, value in changes:
        raw[position % len(raw)] = value
    path = tmp_path_factory.getbasetemp() / "mutated.pth"
    path.write_bytes(raw)
    try:
        tensors = read_pth(path)
    except ModelFileError:
        return
    for tensor in tensors.values():
        assert tensor.rows(0, tensor.shape[0]).shape == tensor.shape


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "consolidated.00.pth").unlink(), r"consolidated.00.pth is missing"),
        (lambda f: (f / "consolidated.01.pth").unlink(), r"has shape \(\d+, \d+\); the configuration says"),
        (lambda f: shutil.copy(f / "consolidated.01.pth", f / "consolidated.03.pth"), r"02.pth is missing"),
        (lambda f: shutil.copy(f / "consolidated.01.pth", f / "consolidated.02.pth"), r"the configuration says"),
        (lambda f: edit_json(f / "params.json", dim=...), r"'dim' is missing"),
        (lambda f: edit_json(f / "params.json", n_layers=10**9), r"1000000000 layers need at least"),
        (lambda f: edit_json(f / "params.json", n_kv_heads=4), r"blk.0.attn_k.weight has shape"),
        (lambda f: edit_json(f / "params.json", vocab_size=385), r"token_embd.weight has shape"),
        (lambda f: edit_json(f / "params.json", use_scaled_rope="yes"), r"must be true or false"),
        (lambda f: (f / "tokenizer.model").unlink(), r"no tokenizer.model there or in the parent folder"),
        (lambda f: (f / "tokenizer.model").write_text("IQ== 0\nIg== 1\n"), r"ranks must be 0 to n-1 and cover"),
        (lambda f: (f / "tokenizer.model").write_text("IQ== 0\nIg== x\n"), r"line 2 is not a base64 token and a rank"),
    ],
)  # fmt: skip
def test_bad_folders(spoil: Any, message: str, tmp_path: Path) -> None:
    folder, output = tmp_path / "checkpoint", tmp_path / "output"
    shutil.copytree(checkpoint("meta-two"), folder)
    output.mkdir()
    spoil(folder)
    with pytest.raises(SlimrtError, match=message) as caught:
        convert_checkpoint(folder, output / "model.gguf")
    assert "\n" not in str(caught.value) and list(output.iterdir()) == []
