"""Which device is chosen, and what is said where a GPU cannot be used: one line, and the process goes on on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimrt
from slimrt.config import CacheConfig, ModelConfig, RopeConfig
from slimrt.errors import DeviceError, SettingError, SlimrtError
from slimrt.memory import cuda as memory_cuda
from slimrt.memory.cuda import Weights, place_weights, plan
from slimrt.ops.backend import check_device, find_gpu
from slimrt.ops.cuda import device as cuda_device
from slimrt.ops.cuda.device import probe
from slimrt.ops.cuda.weights import packed_nbytes
from slimrt.weights.gguf import GGUFFile
from tests.fake_cupy import FakeCupy
from tests.tiny_gguf import write_tiny_llama

GIB = 1 << 30


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny.gguf", head_dim=64, type="Q8_0")


class Hidden:
    """A finder that hides a package."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name == "cupy":
            raise ModuleNotFoundError("No module named 'cupy'", name="cupy")


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"driver": 0}, "no NVIDIA driver"),
        ({"without": "cublas"}, r"CuPy finds no cublas of CUDA 13.0 .*slimrt\[cuda13\]"),
        ({"driver": 12040, "runtime": 13000}, r"driver supports CUDA 12.4, this CuPy needs 13.0.*slimrt\[cuda12\]"),
        ({"devices": 0}, "CUDA finds no GPU"),
        ({"capability": (7, 5)}, r"compute capability 7\.5, the kernels need 8\.0"),
    ],
)
def test_why_a_gpu_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, model: Path, facts: dict[str, Any], said: str
) -> None:
    FakeCupy(monkeypatch, **facts)
    with pytest.raises(DeviceError, match=said) as caught:
        slimrt.load(model, device="cuda")
    assert "\n" not in str(caught.value) and "device='cpu'" in str(caught.value)
    monkeypatch.setattr("slimrt.opening.wants_gpu", lambda: True)
    llm = slimrt.load(model)  # "auto" takes the CPU and says why
    assert any(note.startswith("computing on the CPU: ") and str(caught.value) in note for note in llm.notes)
    assert llm.generate([1, 2, 3], max_tokens=2).tokens


def test_no_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Hidden(), *sys.meta_path])
    with pytest.raises(DeviceError, match=r"CuPy is not installed; pip install 'slimrt\[cuda13\]'"):
        check_device("cuda")
    assert find_gpu("auto")[0] is None and "CuPy is not installed" in find_gpu("auto")[1]
    assert find_gpu("cpu") == (None, "the CPU was asked for")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'fastrlock'", name="fastrlock"), "fastrlock is missing"),
        (
            ImportError("libcublas.so.13: cannot open shared object file\nmore"),
            "CuPy cannot be imported .libcublas.so.13",
        ),
        (PermissionError(13, "Permission denied"), "CUPY_CACHE_DIR"),
    ],
)
def test_a_cupy_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    def refuse(_: str) -> None:
        raise error

    monkeypatch.setattr(cuda_device, "import_module", refuse)
    with pytest.raises(DeviceError, match=said) as caught:
        probe()
    assert "\n" not in str(caught.value)


def test_an_unknown_device(model: Path) -> None:
    with pytest.raises(SettingError, match="device 'tpu': must be one of auto, cuda, cpu, numpy"):
        slimrt.load(model, device="tpu")


def test_streams_of_threads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCupy(monkeypatch)
    monkeypatch.setenv("CUPY_CUDA_PER_THREAD_DEFAULT_STREAM", "1")
    with pytest.raises(DeviceError, match=r"PER_THREAD_DEFAULT_STREAM is set; .* unset it"):
        probe()


def test_a_gpu_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCupy(monkeypatch)
    gpu, why = find_gpu("auto")
    assert gpu is not None and gpu.capability == (9, 0)
    assert "Emulated GPU (sm_90" in why and "CUDA 13.0, CuPy 14.2.0" in why


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    FakeCupy(monkeypatch, total=1 * GIB)
    with pytest.raises(SettingError, match=r"needs .* GiB of the GPU at a context of 262144 .* a context of \d+ fits"):
        slimrt.load(model, device="cuda", ctx=1 << 18)
    FakeCupy(monkeypatch, total=100 << 20)
    with pytest.raises(SettingError, match="its weights alone exceed the GPU"):
        slimrt.load(model, device="cuda")
    monkeypatch.setattr("slimrt.opening.wants_gpu", lambda: True)
    llm = slimrt.load(model)
    assert any("its weights alone exceed" in note for note in llm.notes) and llm.backend.ops.name != "cuda"


def test_sizes_without_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    FakeCupy(monkeypatch)
    with pytest.raises(SettingError, match="heads are 16 wide"):
        slimrt.load(write_tiny_llama(tmp_path / "narrow.gguf"), device="cuda")


# -- the memory plan --------------------------------------------------------------------------------------------------

LLAMA_8B = ModelConfig(
    name="8B", arch="llama", n_layers=32, d_model=4096, n_heads=32, n_kv_heads=8, head_dim=128, d_ff=14336,
    vocab_size=128256, ctx_train=131072, norm_eps=1e-5, rope=RopeConfig(base=5e5, dims=128, interleaved=True),
    n_params=8030261248,
)  # fmt: skip
Q4_0 = 18 / 32  # bytes a weight


def weights_8b(rate: float) -> Weights:
    return Weights(int(rate * (LLAMA_8B.n_params - 65 * 4096)) + 4 * 65 * 4096)


def test_128k_tokens_of_an_8b_model_fit_into_24_gib() -> None:
    """Worked out by hand, term by term, and held against what the plan says."""
    cache = CacheConfig(131072, 4096)
    result = plan(LLAMA_8B, weights_8b(Q4_0), cache, 24 * GIB)
    n = 131072
    assert result.unpacked == 2 * 218103808  # the weights of one layer: 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    assert result.ring == 2 * n * 4096  # 4 KB of keys and values a token and layer, two slots
    # One key of 2 KB for 8 tokens in every layer, and one for a group of blocks of 16; room for twice as many.
    means = 32 * (n // 8 + n // 16 // cache.group) * 2048 * 2
    assert result.kv == 32 * 4096 * 4096 + means
    x, qkv = 4 * 4096, 2 * 6144
    assert result.rows == n * (x + 2 * qkv + 4 * 128)
    assert result.boundary == n * 4 * 4096
    assert result.host == 32 * n * 4096 == 16 * GIB
    assert result.fits() and result.total < 21 * GIB
    # Without a budget the keys and values alone take 16 GiB.
    whole = plan(LLAMA_8B, weights_8b(Q4_0), CacheConfig(131072), 24 * GIB)
    assert whole.kv == 16 * GIB and whole.host == 0 and not whole.fits()
    # float16 weights leave no room on such a card for so long a prompt, but do for a shorter one.
    half = plan(LLAMA_8B, weights_8b(2), cache, 24 * GIB)
    assert not half.fits()
    room = memory_cuda.largest_context(LLAMA_8B, weights_8b(2), cache, 24 * GIB)
    assert 0 < room < 131072 and f"a context of {room} fits" in half.refusal(room)
    assert plan(LLAMA_8B, weights_8b(2), CacheConfig(room, 4096), 24 * GIB).fits()
    assert sum(row.nbytes for row in result.table()[:7]) <= result.table()[8].nbytes == result.total


def test_unpacked_layers_are_kept_where_memory_is_plentiful(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The plan decides and says so, the backend follows, and what it computes is the same."""
    path = write_tiny_llama(tmp_path / "m.gguf", head_dim=64, n_layers=3, d_model=128, d_ff=256, type="Q4_0")
    weights = place_weights(GGUFFile(path))
    matrices = [t for name, t in GGUFFile(path).tensors.items() if name.startswith("blk.") and len(t.shape) > 1]
    assert weights.unpacked == sum(2 * t.shape[0] * t.shape[1] for t in matrices)
    found, room = [], 80 * GIB
    for keeps in (True, False):
        fake = FakeCupy(monkeypatch, total=room)
        llm = slimrt.load(path, device="cuda", ctx=512, prune="off")
        assert llm.memory.keeps is keeps is llm.backend.ops.keeps_unpacked  # type: ignore[union-attr]
        assert any("kept from prompt to prompt" in row.note for row in llm.memory.table()) is keeps  # type: ignore[union-attr]
        launched = []
        for first in (5, 6):
            before = fake.launches.count("dequantize")
            found.append(llm.logits([first] * 40))
            launched.append(fake.launches.count("dequantize") - before)
        assert launched == ([12, 0] if keeps else [12, 12])
        room = llm.memory.total - 1  # the next finds one byte too few for that
    assert np.array_equal(found[0], found[2]) and np.array_equal(found[1], found[3])


def test_the_plan_bounds_what_a_prompt_takes(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    """The stand-in counts bytes; the plan (less CUDA's own) must not be exceeded, nor be several times too large."""
    for budget in (None, 96):
        fake = FakeCupy(monkeypatch)
        llm = slimrt.load(model, device="cuda", ctx=512, kv_budget=budget, prune="off")
        peak = 0
        allocate = fake.empty

        def counted(*args: Any, fake: FakeCupy = fake, allocate: Any = allocate) -> Any:
            nonlocal peak
            result = allocate(*args)
            peak = max(peak, fake.used)
            return result

        monkeypatch.setattr(fake, "empty", counted)
        llm.logits([5] * 512)
        planned = llm.memory.total - memory_cuda._CONTEXT  # type: ignore[union-attr]
        assert planned / 3 < peak <= planned, (budget, peak, planned)
        monkeypatch.setattr(fake, "empty", allocate)


def test_weights_larger_than_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Refused with a plan that names the remedy; with it, the same model runs in what its layers leave."""
    path = write_tiny_llama(tmp_path / "many.gguf", head_dim=64, n_layers=12, d_ff=256, type="Q8_0")
    file = GGUFFile(path)
    whole, streamed = place_weights(file), place_weights(file, stream=True)
    layers = sum(
        packed_nbytes(t.type.name, *t.shape) for name, t in file.tensors.items() if len(t.shape) > 1 and "blk" in name
    )
    # Each of a layer's seven matrices begins at a multiple of 256 bytes.
    assert layers <= streamed.host < layers + 12 * 7 * 256
    assert abs(streamed.device - (whole.device - layers + 2 * layers / 12)) < 2 * 7 * 256
    FakeCupy(monkeypatch, total=(800 << 20) + whole.device - 1)
    with pytest.raises(SettingError, match=r"weights alone exceed the GPU; stream them .*--stream-weights"):
        slimrt.load(path, device="cuda", ctx=256)
    with pytest.raises(SettingError, match="stream_weights: weights are streamed to a GPU, this runs on the CPU"):
        slimrt.load(path, device="cpu", stream_weights=True)
    found = []
    for stream in (False, True):  # one stand-in at a time: they share what is current
        fake = FakeCupy(monkeypatch, copies="late", compute="late")
        llm = slimrt.load(path, device="cuda", ctx=64, prune="off", stream_weights=stream)
        if stream:
            assert fake.used < whole.device and fake.pinned_bytes == streamed.host
        text = llm.generate([5, 6, 7], max_tokens=3, ignore_eos=True).tokens
        found.append((text, *(llm.logits(tokens).tolist() for tokens in ([1, 2, 3], list(range(30))))))
    assert found[0] == found[1]
    assert llm.memory.streamed == streamed.host  # type: ignore[union-attr]


def test_errors_are_slimrts() -> None:
    assert issubclass(DeviceError, SlimrtError)
