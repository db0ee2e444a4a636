"""Two thousand damaged copies of a small valid model: each loads and computes, or is refused with one clear line."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGUFValueType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import slimrt
from slimrt.errors import SlimrtError
from slimrt.inspect import describe
from slimrt.weights.gguf import GGUFFile
from tests.tiny_gguf import write_tiny_llama

HEADER_EXAMPLES, LOAD_EXAMPLES = 1000, 1000
SECONDS = 5  # a refusal takes milliseconds; the machines are shared
ROOM = 1 << 30  # bytes of address space that a few kilobytes of damaged model may ask for

EXTREMES = [
    *(0, 1, 2, 3, 7, 31, 33, 64, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53),
    *(2**62, 2**63 - 1, 2**63, 2**64 - 33, 2**64 - 32, 2**64 - 1),
    *(int(np.float32(x).view(np.uint32)) for x in (0.0, -0.0, 1.0, -1.0, 1e-40, 3e38, np.inf, -np.inf, np.nan)),
]


Field = tuple[int, int]  # offset and width in bytes
TEXTS = (b"\xff\xfe", b"\n\r", b"\0\0", "é".encode(), b"{{", b"\x1b[")


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "m.gguf"


@pytest.fixture(scope="module")
def valid(victim: Path) -> bytes:
    path = victim.with_name("valid.gguf")
    # Every optional key that the loader reads is there, so that damage can reach it.
    keys = {
        "general.alignment": 32,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 2.0,
        "llama.rope.scaling.original_context_length": 256,
        "llama.rope.scaling.attn_factor": 1.0,
        "llama.rope.scaling.yarn_beta_fast": 32.0,
        "llama.rope.scaling.yarn_beta_slow": 1.0,
        "llama.expert_count": 0,
        "split.count": 0,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.scores": [0.0] * 277,
    }
    write_tiny_llama(path, n_layers=1, d_model=32, n_heads=2, n_kv_heads=1, d_ff=32, type="Q8_0", **keys)
    return path.read_bytes()


@pytest.fixture(scope="module")
def fields(valid: bytes, victim: Path) -> list[Field]:
    """The numbers of the header: values, tensor shapes, types and offsets first, then the lengths and counts."""
    file = GGUFFile(victim.with_name("valid.gguf"))
    values, lengths = [], [(4, 4), (8, 8), (16, 8)]
    for name in file.metadata:
        at = valid.index(struct.pack("<Q", len(name)) + name.encode())
        end = at + 8 + len(name)
        (kind,) = struct.unpack_from("<I", valid, end)
        lengths += [(at, 8), (end, 4)]
        if kind == GGUFValueType.ARRAY:
            lengths += [(end + 4, 4), (end + 8, 8)]
            values += [(end + 16 + 4 * n, 4) for n in range(4)]
        elif kind == GGUFValueType.STRING:
            lengths.append((end + 4, 8))
            values.append((end + 12, 1))
        else:
            values.append((end + 4, 1 if kind == GGUFValueType.BOOL else 4))
    for name, tensor in file.tensors.items():
        at = valid.index(struct.pack("<Q", len(name)) + name.encode())
        end, dims = at + 8 + len(name), len(tensor.shape)
        lengths += [(at, 8), (end, 4)]
        values += [(end + 4 + 8 * n, 8) for n in range(dims)]
        values += [(end + 4 + 8 * dims, 4), (end + 8 + 8 * dims, 8)]
    return values + lengths


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    resource = pytest.importorskip("resource", reason="address space is limited through POSIX")
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = Path("/proc/self/statm")
    if not pages.exists():
        pytest.skip("the size of the process is read from /proc")
    size = int(pages.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


Edit = tuple[str, int, int, int]  # kind, offset, and two numbers that say how


@st.composite
def edits(draw: st.DrawFn, fields: list[Field], size: int) -> list[Edit]:
    """One to four hurts, most of them to the header's numbers."""
    header = max(fields)[0] + 8
    number = st.sampled_from(EXTREMES) | st.integers(0, 300)
    result = []
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 4]))):
        kind = draw(st.sampled_from(["field"] * 8 + ["number", "bits", "cut", "delete", "repeat", "text"]))
        if kind == "field":
            at, width = draw(st.sampled_from(fields))
        else:
            at = draw(st.integers(0, header if draw(st.booleans()) else size - 1))
            width = draw(st.sampled_from([1, 4, 8]))
        how = draw(number) if kind in ("field", "number") else draw(st.integers(1, 255))
        result.append((kind, at, how, width))
    return result


def damaged(valid: bytes, hurts: list[Edit]) -> bytes:
    content = bytearray(valid)
    for kind, at, how, width in hurts:
        if kind in ("field", "number"):
            content[at : at + width] = (how % (1 << 8 * width)).to_bytes(width, "little")
        elif kind == "bits":
            content[at : at + 1] = bytes(byte ^ how for byte in content[at : at + 1])
        elif kind == "cut":
            del content[at:]
        elif kind == "delete":
            del content[at : at + how]
        elif kind == "repeat":
            content[at:at] = content[at : at + how]
        elif kind == "text":
            content[at : at + 2] = TEXTS[how % len(TEXTS)]
    return bytes(content)


def survives(path: Path, content: bytes, use: object) -> bool:
    """Call ``use(path)`` on a file of ``content``: True if it worked, False if it was refused as the rules say."""
    path.write_bytes(content)
    begun = time.perf_counter()
    try:
        use(path)  # type: ignore[operator]
    except SlimrtError as error:
        message = str(error)
        assert message.isprintable(), "one line, no control characters"
        assert len(message) < 1300
        return False
    finally:
        assert time.perf_counter() - begun < SECONDS
    return True


def read(path: Path) -> None:
    describe(GGUFFile(path))


def load(path: Path) -> None:
    llm = slimrt.load(path, threads=1)
    logits = llm.logits([5])
    assert np.isfinite(logits).all()
    llm.detokenize(llm.tokenize("hello the world <|im_end|>", special=True))


def test_the_undamaged_file_works(valid: bytes, victim: Path) -> None:
    assert survives(victim, valid, read)
    assert survives(victim, valid, load)


@pytest.mark.filterwarnings("error", "ignore:.*the pre-tokenizer 'default' is used")
@pytest.mark.usefixtures("bounded_memory")
@pytest.mark.parametrize(("use", "examples"), [(read, HEADER_EXAMPLES), (load, LOAD_EXAMPLES)], ids=["read", "load"])
def test_damaged_files_are_refused_or_work(
    use: object, examples: int, valid: bytes, fields: list[Field], victim: Path
) -> None:
    seen = {True: 0, False: 0}

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(hurts=edits(fields, len(valid)))
    def run(hurts: list[Edit]) -> None:
        seen[survives(victim, damaged(valid, hurts), use)] += 1

    run()
    assert min(seen.values()) > examples // 100, f"damage that is always, or never, fatal tests little: {seen}"
