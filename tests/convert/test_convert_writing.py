"""What reaches the disk, and when: complete files or nothing, in bounded memory."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from slimrt.convert import convert_checkpoint
from slimrt.errors import OutputError
from slimrt.weights.gguf import GGUFFile
from tests.convert_cases import checkpoint


def test_an_existing_file_is_replaced_only_by_a_complete_one(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    target.write_bytes(b"old")

    def interrupt(done: int, total: int, what: str) -> None:
        if done > total // 2:
            assert target.read_bytes() == b"old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(checkpoint("hf-qwen2"), target, "f16", interrupt, force=True)
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]
    convert_checkpoint(checkpoint("hf-qwen2"), target, "f16", force=True)
    assert GGUFFile(target).tensors and list(tmp_path.iterdir()) == [target]


def test_a_killed_run_leaves_no_model_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    target = tmp_path / "model [1].gguf"  # brackets mean something to glob
    script = (
        "import os, sys; from pathlib import Path; from slimrt.convert import convert_checkpoint\n"
        "def progress(done, total, what):\n"
        "    if done > total // 2: os.kill(os.getpid(), 9)\n"
        "convert_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), 'f16', progress)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(checkpoint("hf-qwen2")), str(target)], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".model [1].gguf.") and leftover.suffix == ".part"
    unrelated = tmp_path / ".other.gguf.0123abcd.part"
    unrelated.touch()
    convert_checkpoint(checkpoint("hf-qwen2"), target, "f16")
    assert set(tmp_path.iterdir()) == {target, unrelated}


def test_two_runs_with_one_target_leave_each_other_alone(tmp_path: Path) -> None:
    """The second run starts, and ends, while the first one is half-way."""
    target = tmp_path / "model.gguf"
    calls = 0

    def second(done: int, total: int, what: str) -> None:
        nonlocal calls
        if calls == 0 and done > total // 2:
            calls += 1
            convert_checkpoint(checkpoint("hf-qwen2"), target, "f32")

    convert_checkpoint(checkpoint("hf-qwen2"), target, "f16", second)
    assert calls == 1 and GGUFFile(target).metadata["general.file_type"] == 1  # the first run's
    assert list(tmp_path.iterdir()) == [target]


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    """A limit on the file size gives the error that a full disk gives, in the middle of the tensors."""
    script = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from slimrt.convert import convert_checkpoint; from slimrt.errors import OutputError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
        "try: convert_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), 'f32')\n"
        "except OutputError as error: print(error)"
    )
    target = tmp_path / "model.gguf"
    arguments = [sys.executable, "-c", script, str(checkpoint("hf-qwen2")), str(target)]
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert run.stderr == ""
    assert run.stdout.startswith(f"{target}: cannot be written (") and run.stdout.count("\n") == 1
    assert "free some space or choose another disk" in run.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OutputError, match=r"needs 0.00 GB and the disk has 0.00 GB left; free some space"):
        convert_checkpoint(checkpoint("hf-qwen2"), tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match=r"cannot be written \(Permission denied\)"):
        convert_checkpoint(checkpoint("hf-qwen2"), tmp_path / "model.gguf")


def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    """A checkpoint of 400 MB (sparse on disk) with an embedding of 268 MB: the peak stays far under one tensor."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    width, inner, vocab = 1024, 4096, 65536
    shapes = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (width, inner)
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": width, "intermediate_size": inner, "vocab_size": vocab,
        "num_hidden_layers": 2, "num_attention_heads": 16, "max_position_embeddings": 512, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes((checkpoint("hf-llama-linear") / "tokenizer.json").read_bytes())
    script = (
        "import resource, sys; from pathlib import Path; from slimrt.convert import convert_checkpoint\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); convert_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), 'q8_0'); print(peak() - before)"
    )
    arguments = [sys.executable, "-c", script, str(folder), str(tmp_path / "model.gguf")]
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True)
    assert at > 400_000_000 and int(run.stdout) < 160 * 1024  # KiB; 65 536 vocabulary entries take their part
