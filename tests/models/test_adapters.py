"""LoRA adapters: what PEFT computes, on both CPU backends; the files of llama.cpp; what is refused, in one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGUFWriter

import slimrt
from click_cli import cli
from slimrt.convert import convert_adapter, convert_checkpoint
from slimrt.errors import ModelFileError, SessionFileError, SettingError, SlimrtError
from slimrt.models import read_config
from slimrt.models.adapters import read_adapter
from slimrt.ops.numpy.numpy_ops import NumpyOps
from slimrt.session import Session
from slimrt.weights.gguf import GGUFFile
from tests.families import GOLDENS, prompts, write_checkpoint
from tests.lora_files import CASES, SCALES, SETS, write_peft
from tests.rounded_ops import SLACK, RoundedOps, read_and_decoded, session_on

K = 4  # as in test_families
CTX = 128
CHOICES = {"a": (("a", 1.0),), "b": (("b", 1.0),), "both": tuple(SCALES.items())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each case the model ``<case>.gguf`` and its adapters ``<case>.<set>.gguf``, converted; the folders beside."""
    folder = tmp_path_factory.mktemp("adapters")
    for case in CASES:
        checkpoint = write_checkpoint(case, folder / case)
        convert_checkpoint(checkpoint, folder / f"{case}.gguf", "f32")
        for which in SETS:
            base = checkpoint if which == "a" else folder / f"{case}.gguf"
            convert_adapter(
                write_peft(case, which, folder / f"{case}-{which}"), folder / f"{case}.{which}.gguf", "f32", base=base
            )
    return folder


def adapted(folder: Path, case: str, chosen: str, ops: NumpyOps) -> Session:
    session = session_on(ops, folder / f"{case}.gguf", CTX)
    config = session.engine.config
    session.engine.model.adapt(
        [(read_adapter(folder / f"{case}.{which}.gguf", config), scale) for which, scale in CHOICES[chosen]]
    )
    return session


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, folder: Path) -> None:
    with np.load(GOLDENS / "lora" / "logits.npz") as expected, np.load(GOLDENS / "families" / "logits.npz") as plain:
        for chosen in CHOICES:
            session = adapted(folder, case, chosen, NumpyOps(1))
            for i, ids in enumerate(prompts()):
                exact, unit = expected[f"{case}/{chosen}/{i}"], float(expected[f"{case}/{chosen}/error{i}"])
                session.prefill(ids)
                assert session.logits is not None
                error = np.abs(session.logits - exact).max()
                assert error <= K * unit, f"{chosen}, prompt {i}: {error:g} > {K} * {unit:g}"
                assert np.abs(exact - plain[f"{case}/{i}"]).max() > 100 * K * unit  # they do change something


@pytest.mark.parametrize("case", CASES)
def test_compiled_kernels(case: str, folder: Path) -> None:
    pytest.importorskip("numba")
    from slimrt.ops.fast.fast_ops import FastOps
    from slimrt.ops.fast.features import detect

    if not detect().avx2:
        pytest.skip("this processor has no fast path")
    truth, naive, found = (
        read_and_decoded(adapted(folder, case, "both", ops), prompts()[0], 70)
        for ops in (NumpyOps(1), RoundedOps(1), FastOps(2))
    )
    error, unit = np.abs(found - truth).max(), np.abs(naive - truth).max()
    assert error <= SLACK * unit, f"{error:g} > {SLACK} * {unit:g}"
    # Several tokens in one pass are those one by one; other adapters have a program of their own.
    session, ids = adapted(folder, case, "both", FastOps(2)), prompts()[0][:86]
    engine = session.engine
    session.prefill(ids[:70])
    rows = session.decode(ids[70:71], ids[71:])
    assert engine.together >= len(rows)
    session.settle(rows[0])
    for row, one in zip(rows[1:], ids[71:], strict=True):
        session.extend([one])
        np.testing.assert_array_equal(session.logits, row)
    engine.model.adapt([])
    np.testing.assert_array_equal(
        engine.decode(engine.new_context(), ids[:3]),
        session_on(FastOps(2), folder / f"{case}.gguf", CTX).engine.decode(engine.new_context(), ids[:3]),
    )


@pytest.mark.parametrize("case", CASES)
def test_files_of_llama_cpp(case: str, folder: Path) -> None:
    """convert_lora_to_gguf.py and ``convert --lora`` make the same adapter of one folder."""
    config = read_config(GGUFFile(folder / f"{case}.gguf"))
    theirs, ours = (
        read_adapter(path, config) for path in (GOLDENS / "lora" / f"{case}.gguf", folder / f"{case}.a.gguf")
    )
    assert theirs.deltas.keys() == ours.deltas.keys()
    for key, deltas in theirs.deltas.items():
        for one, other in zip(
            sorted(deltas, key=lambda d: d.first), sorted(ours.deltas[key], key=lambda d: d.first), strict=True
        ):
            assert one.first == other.first
            np.testing.assert_array_equal(one.down, other.down)
            np.testing.assert_array_equal(one.up, other.up)


def test_switching(folder: Path, tmp_path: Path) -> None:
    """Between calls of one model; what was read under other adapters is never read on from."""
    a, b = folder / "qwen3.a.gguf", folder / "qwen3.b.gguf"
    how: Any = {"device": "numpy", "ctx": CTX, "threads": 1}
    ids = prompts()[0]
    with slimrt.load(folder / "qwen3.gguf", **how) as llm, slimrt.load(folder / "qwen3.gguf", lora=[a], **how) as other:
        plain = llm.generate(ids, max_tokens=1)
        logits = llm.current.logits
        llm.set_adapters([a])
        assert llm.generate(ids, max_tokens=1).timings.reused_tokens == 0
        other.generate(ids, max_tokens=1)
        np.testing.assert_array_equal(llm.current.logits, other.current.logits)
        assert llm.generate(ids, max_tokens=1).timings.reused_tokens == len(ids) - 1  # what they read is used again
        # A conversation that goes on, and one that was saved.
        talk = llm.session()
        talk.prefill(ids)
        talk.save(tmp_path / "talk.slim")
        llm.set_adapters([a, (b, 0.5)])
        for further in (lambda: talk.extend([1]), lambda: talk.decode([1])):
            with pytest.raises(SettingError, match="read under other adapters"):
                further()
        with pytest.raises(SessionFileError, match="saved with another model"):
            llm.restore(tmp_path / "talk.slim")
        assert talk.prefill(ids).reused == 0
        stream = llm.stream(ids, max_tokens=5)
        next(stream)
        llm.set_adapters([a])
        with pytest.raises(SettingError, match="read under other adapters"):
            list(stream)
        assert llm.restore(tmp_path / "talk.slim").tokens == ids
        # Without any it is the model again, to the bit.
        llm.set_adapters([])
        assert llm.generate(ids, max_tokens=1).text == plain.text
        np.testing.assert_array_equal(llm.current.logits, logits)
    with pytest.raises(SettingError, match="closed"):
        llm.generate(ids)


def test_a_file_that_changed_is_read_again(folder: Path, tmp_path: Path) -> None:
    path, ids = tmp_path / "adapter.gguf", [5, 6, 7]
    logits = []
    with slimrt.load(folder / "mistral.gguf", device="numpy", prune="off") as llm:
        for name in ("a", "b"):
            path.write_bytes((folder / f"mistral.{name}.gguf").read_bytes())
            os.utime(path, (len(logits), len(logits)))
            llm.set_adapters([path])
            logits.append(llm.logits(ids))
        llm.set_adapters([folder / "mistral.b.gguf"])
        assert np.array_equal(llm.logits(ids), logits[1]) and not np.array_equal(*logits)


def test_library(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document that was read under other adapters is not taken from the disk."""
    monkeypatch.setattr("slimrt.library.store.LEAST", 16)
    ids = prompts()[0]
    how: Any = {"device": "numpy", "ctx": CTX, "threads": 1, "cache": tmp_path, "prune": "off"}
    for lora, reused in (([], False), ([folder / "qwen3.a.gguf"], False), ([folder / "qwen3.a.gguf"], True)):
        with slimrt.load(folder / "qwen3.gguf", lora=lora, **how) as llm:
            assert (llm.current.prefill(ids).reused > 0) == reused
            llm.current.keep(len(ids), "")
            if lora:
                llm.set_adapters([])
                llm.current.keep(len(ids), "")  # read under what is no longer set
    assert len(list(tmp_path.iterdir())) == 2


def test_llama_and_command_line(folder: Path) -> None:
    a, model = folder / "qwen3.a.gguf", folder / "qwen3.gguf"
    how: Any = {"n_ctx": CTX, "device": "numpy", "verbose": False}
    drop_in = slimrt.Llama(str(model), lora_path=str(a), lora_scale=0.5, **how)
    drop_in.eval(prompts()[1])
    with slimrt.load(model, lora=[(a, 0.5)], device="numpy", ctx=CTX) as llm:
        llm.current.prefill(prompts()[1])
        np.testing.assert_array_equal(llm.current.logits, drop_in._session.logits)
        text = llm.generate("hello", max_tokens=6).text
    drop_in.close()
    run = CliRunner().invoke(
        cli, ["generate", "hello", "-m", str(model), "--lora", f"{a}:0.5", "-n", "6", "--device", "numpy", "-c", "128",
              "--no-cache", "--json"],
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    assert slimrt_text(run.stdout) == text


def slimrt_text(stdout: str) -> str:
    import json

    text: str = json.loads(stdout.splitlines()[-1])["text"]
    return text


def write(path: Path, change: Callable[[dict[str, Any], dict[str, np.ndarray]], None]) -> Path:
    """A small adapter of the case "qwen3", changed."""
    metadata: dict[str, Any] = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 4.0}
    arrays = {
        f"blk.0.attn_q.weight.lora_{side}": np.full(shape, 0.5, np.float32)
        for side, shape in (("a", (2, 64)), ("b", (64, 2)))
    }
    change(metadata, arrays)
    writer = GGUFWriter(path, metadata.pop("arch", "qwen3"))
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


Q = "blk.0.attn_q.weight.lora_"
SOUND = np.ones((2, 64), np.float32), np.ones((64, 2), np.float32)


def pair(name: str) -> Callable[..., None]:
    return lambda m, t: t.update({f"{name}.lora_a": SOUND[0], f"{name}.lora_b": SOUND[1]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, t: m.update({"general.type": "model"}), "general.type is 'model'"),
        (lambda m, t: m.update({"adapter.type": "ia3"}), "adapter.type is 'ia3'"),
        (lambda m, t: m.update(arch="llama"), "an adapter for llama, and the model is a qwen3"),
        (lambda m, t: m.update({"adapter.lora.alpha": float("nan")}), "alpha is nan"),
        (lambda m, t: m.update({"adapter.lora.alpha": "much"}), "must be float"),
        (lambda m, t: m.update({"adapter.alora.invocation_tokens": [1, 2]}), "activated LoRA"),
        (lambda m, t: t.clear(), "no tensors"),
        (lambda m, t: t.pop(Q + "b"), "has lora_a only"),
        (lambda m, t: t.pop(Q + "a"), "has lora_b only"),
        (lambda m, t: t.update({Q + "a": np.ones((2, 96), np.float32)}), r"\[64, 96\], the model's is \[64, 64\]"),
        (lambda m, t: t.update({Q + "a": np.ones((3, 64), np.float32)}), "of one rank"),
        (lambda m, t: t.update({Q + "a": np.ones(64, np.float32)}), "of one rank"),
        (lambda m, t: t[Q + "b"].__setitem__((3, 1), np.nan), "NaN or infinite"),
        (lambda m, t: t.update({"blk.0.attn_norm.weight": np.ones(64, np.float32)}), "is no lora_a or lora_b"),
        (pair("token_embd.weight"), "embedding or output"),
        (pair("output.weight"), "embedding or output"),
        (pair("blk.0.ffn_up_exps.weight"), "changes experts"),
        (pair("blk.3.attn_q.weight"), "no projection of a qwen3 model of 3 layers"),
        (pair("blk.0.attn_odd.weight"), "no projection"),
    ],
)  # fmt: skip
def test_bad_files(change: Any, message: str, folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.gguf", change)
    with pytest.raises(ModelFileError, match=message) as found:
        read_adapter(path, read_config(GGUFFile(folder / "qwen3.gguf")))
    assert "\n" not in str(found.value) and len(str(found.value)) < 400


def test_rank_zero_and_memory(folder: Path, tmp_path: Path) -> None:
    config = read_config(GGUFFile(folder / "qwen3.gguf"))
    none = np.zeros((0, 64), np.float32), np.zeros((64, 0), np.float32)
    with pytest.raises(ModelFileError):
        path = write(tmp_path / "0.gguf", lambda m, t: t.update({Q + "a": none[0], Q + "b": none[1]}))
        read_adapter(path, config)
    with pytest.raises(ModelFileError, match="GiB are free"):
        read_adapter(folder / "qwen3.a.gguf", config, limit=1000)


def test_a_path_without_a_file_names_the_remedy_of_adapters(folder: Path, tmp_path: Path) -> None:
    config = read_config(GGUFFile(folder / "qwen3.gguf"))
    with pytest.raises(ModelFileError, match=r"none\.gguf: no such file; name the \.gguf file of a LoRA adapter$"):
        read_adapter(tmp_path / "none.gguf", config)
    with pytest.raises(ModelFileError, match="a folder; 'slimrt convert --lora'"):
        read_adapter(tmp_path, config)


def test_bad_settings(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed change leaves what was set."""
    with slimrt.load(folder / "qwen3.gguf", device="numpy", ctx=CTX, lora=[folder / "qwen3.a.gguf"]) as llm:
        before = llm.engine.adapters
        for wrong in (
            "x.gguf",
            [(folder / "qwen3.a.gguf", float("nan"))],
            [(folder / "qwen3.a.gguf", "1")],
            3,
            [()],
            [3],
        ):
            with pytest.raises(SettingError):
                llm.set_adapters(wrong)  # type: ignore[arg-type]
        for path in (tmp_path / "none.gguf", folder / "mistral.a.gguf", folder / "qwen3.gguf"):
            with pytest.raises(SlimrtError):
                llm.set_adapters([path])
        with monkeypatch.context() as patch:
            patch.setattr(llm.backend.ops, "name", "cuda", raising=False)
            with pytest.raises(SettingError, match="on the CPU only"):
                llm.set_adapters([folder / "qwen3.b.gguf"])
        assert llm.engine.adapters == before != ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias is all"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"layers_pattern": "h"}, "layers_pattern"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"r": 0}, "r is 0"),
        ({"r": 8}, "has rank 4 and adapter_config.json says r 8"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
    ],
)
def test_bad_conversions(changes: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    source = write_peft("qwen3", "a", tmp_path / "peft", changes)
    with pytest.raises(ModelFileError, match=message) as found:
        convert_adapter(source, tmp_path / "out.gguf", base=folder / "qwen3")
    assert "\n" not in str(found.value) and not (tmp_path / "out.gguf").exists()


def test_bases(folder: Path, tmp_path: Path) -> None:
    """Without a base, with another model's, and on the command line."""
    source = write_peft("phi3", "a", tmp_path / "peft")
    with pytest.raises(SettingError, match="the base model 'None' is no folder here"):
        convert_adapter(source, tmp_path / "out.gguf")
    with pytest.raises(ModelFileError):
        convert_adapter(source, tmp_path / "out.gguf", base=folder / "qwen3")
    with pytest.raises(SettingError, match="f16 or f32"):
        convert_adapter(source, tmp_path / "out.gguf", "q8_0", base=folder / "phi3")
    arguments = ["convert", "--lora", str(source), str(tmp_path / "out.gguf"), "--base", str(folder / "phi3.gguf")]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    assert read_adapter(tmp_path / "out.gguf", read_config(GGUFFile(folder / "phi3.gguf"))).nbytes > 0
