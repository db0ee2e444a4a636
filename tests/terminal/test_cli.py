"""The command line as a shell sees it: stdout, stderr, exit status; held against the Python interface and llama.cpp."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import slimrt
from click_cli import cli
from slimrt.terminal.loading import announce_memory
from slimrt.terminal.options import LoadSettings
from slimrt.weights.gguf import GGUFFile
from tests.terminal_notes import without_backend_note
from tests.tiny_gguf import write_tiny_llama

GOLDENS = Path(__file__).parents[1] / "goldens"
COMMANDS = {"bench", "chat", "convert", "generate", "inspect", "pull", "quantize", "tokenize"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


def run(*args: object, input: str | bytes | None = None) -> Result:
    result = CliRunner().invoke(cli, [str(arg) for arg in args], input=input)
    result.stderr_bytes = without_backend_note(result.stderr_bytes)
    return result


def shell(*args: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "click_cli", *map(str, args)]
    done = subprocess.run(command, capture_output=options.pop("capture_output", True), timeout=120, **options)
    done.stderr = without_backend_note(done.stderr)
    return done


def assert_one_error_line(result: Result, *parts: str, status: int = 1) -> None:
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for part in parts:
        assert part in lines[0]


# -- help --------------------------------------------------------------------------------------------------------------


def test_help_lists_the_commands_without_loading_numpy() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from click_cli import cli\n"
        "print(CliRunner().invoke(cli, ['--help']).output)\n"
        "print('heavy:', sorted({'numpy', 'gguf', 'rich', 'jinja2', 'tiktoken'} & set(sys.modules)))"
    )
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout
    assert set(re.findall(r"^  (\w+)  ", text.partition("Commands:")[2], re.MULTILINE)) >= COMMANDS
    assert "heavy: []" in text


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_command_explains_itself(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


def test_types_are_listed_where_they_are_asked_for() -> None:
    shown = " ".join(run("convert", "--help").stdout.split())
    assert "f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_k_s, q5_1, q5_0, q4_k_m, q4_k_s, q4_1, q4_0, mxfp4_moe" in shown
    result = run("convert", "a", "b", "--type", "q9")
    assert result.exit_code == 2
    assert "'q9' is not one of f32, f16" in result.stderr


# -- generate ----------------------------------------------------------------------------------------------------------


def test_generate_writes_the_text_and_nothing_else_to_stdout(tiny: Path) -> None:
    expected = slimrt.load(tiny).generate("hello world", max_tokens=12)
    result = run("generate", "-m", tiny, "-n", 12, "hello world")
    assert result.exit_code == 0
    assert result.stdout == expected.text + "\n" * (not expected.text.endswith("\n"))
    pattern = r"TTFT [\d.]+ s · (?:[\d.]+ tokens/s · )?prompt (\d+) · answer (\d+) · memory .*\n"
    stats = re.fullmatch(pattern, result.stderr)
    assert stats, result.stderr
    assert (int(stats[1]), int(stats[2])) == (expected.usage.prompt_tokens, expected.usage.completion_tokens)


def test_generate_json_is_one_object_that_equals_the_python_result(tiny: Path) -> None:
    options = {
        "temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.99, "repeat_penalty": 1.1,
        "presence_penalty": 0.1, "frequency_penalty": 0.2, "seed": 7, "logit_bias": {5: -3.0, 9: 2.5},
    }  # fmt: skip
    expected = slimrt.load(tiny, ctx=256, rope_base=5000.0).generate("hello", max_tokens=20, stop=("zq",), **options)
    flags = [
        "--temperature", 0.9, "--top-k", 40, "--top-p", 0.95, "--min-p", 0.01, "--typical-p", 0.99, "--repeat-penalty",
        1.1, "--presence-penalty", 0.1, "--frequency-penalty", 0.2, "--seed", 7, "--logit-bias", "5=-3", "--logit-bias",
        "9=2.5", "--stop", "zq", "-n", 20, "-c", "256", "--rope-base", 5000,
    ]  # fmt: skip
    result = run("generate", "-m", tiny, "hello", "--json", *flags)
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 1
    data = json.loads(result.stdout)
    assert data["tokens"] == expected.tokens
    assert (data["text"], data["finish_reason"]) == (expected.text, expected.finish_reason)
    assert data["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    assert data["timings"]["ttft_s"] > 0
    assert result.stderr == ""


def test_a_context_that_is_asked_for_gets_its_memory_plan_first(tiny: Path) -> None:
    result = run("generate", "-m", tiny, "-n", 2, "-c", 512, "--rope-scaling", "none", "--kv-budget", 128, "hello")
    lines = result.stderr.splitlines()
    assert result.exit_code == 0 and len(lines) == 4
    assert any("a KV budget saves no memory on a CPU" in line for line in lines)
    assert lines[0] == "tiny · context 512 tokens"
    assert re.fullmatch(
        r"memory up to .* free: weights .*, keys and values .* and .* behind the budget, hidden states .*, scratch .*, "
        r"the program itself .*",
        lines[1],
    )


def test_the_cpus_memory_plan_is_not_told_where_a_gpu_computes(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    announce_memory(LoadSettings(ctx=512, device="cpu"), said.append)(GGUFFile(tiny))
    assert len(said) == 1 and "memory up to" in said[0]
    monkeypatch.setattr("slimrt.terminal.loading.find_gpu", lambda device: (object(), "a card"))
    announce_memory(LoadSettings(ctx=512), said.append)(GGUFFile(tiny))
    assert len(said) == 1


@pytest.mark.parametrize("flags", [["--chat"], ["--system", "be brief"]])
def test_generate_chat_goes_through_the_template(tiny: Path, flags: list[str]) -> None:
    system = [{"role": "system", "content": "be brief"}] if "--system" in flags else []
    expected = slimrt.load(tiny).chat([*system, {"role": "user", "content": "hello"}], max_tokens=5)
    data = json.loads(run("generate", "-m", tiny, "-n", 5, "--json", *flags, "hello").stdout)
    assert data["tokens"] == expected.tokens
    assert data["usage"]["prompt_tokens"] == expected.usage.prompt_tokens


def test_generate_reads_arguments_files_and_pipes_alike(tiny: Path, tmp_path: Path) -> None:
    document = tmp_path / "document.txt"
    document.write_bytes(b"\xef\xbb\xbfthe world\nover\n\n")

    def tokens(*args: object, input: str | None = None) -> list[int]:
        result = run("generate", "-m", tiny, "-n", 6, "--json", *args, input=input)
        assert result.exit_code == 0, result.output
        return list(json.loads(result.stdout)["tokens"])

    assert tokens("hello") == tokens("-", input="hello") == tokens(input="hello")
    assert tokens("-f", document) == tokens("the world\nover\n\n")
    assert tokens("-f", document, "who?") == tokens("the world\nover\n\nwho?")


def test_greedy_text_of_the_default_model_is_llama_cpps(default_model: Path) -> None:
    goldens = np.load(GOLDENS / "logits" / "llama_cpp.npz")
    # Tokens count as long as the two likeliest lie further apart than llama.cpp's own two runs of the model do.
    near = goldens["0.f32.gaps"] <= 2 * np.abs(goldens["0.f32.every16"] - goldens["0.q4_1.every16"]).max()
    length = int(np.argmax(near)) if near.any() else len(near)
    assert length >= 3
    result = run("generate", "-m", default_model, "--json", "-n", length, "--prune", "off", str(goldens["texts"][0]))
    assert json.loads(result.stdout)["tokens"] == goldens["0.f32.tokens"][:length].tolist()


def test_context_sizes_have_suffixes(tiny: Path) -> None:
    *_, error = run("generate", "-m", tiny, "-c", "8", "hello " * 9).stderr.splitlines()
    assert error.startswith("error: ") and "context holds 8" in error and "--ctx" in error
    assert run("generate", "-m", tiny, "-c", "0.5k", "-n", "1", "hello").exit_code == 0
    result = run("generate", "-m", tiny, "-c", "64q", "hello")
    assert result.exit_code == 2
    assert "64q" in result.stderr


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--temperature", "-1"], ["temperature -1.0"]),
        (["--temperature", "nan"], ["temperature nan"]),
        (["--top-p", "1.5"], ["top_p 1.5"]),
        (["--logit-bias", "999999=1"], ["999999"]),
        (["--prune", "no-such-plan.json"], ["no-such-plan.json"]),
        (["--rope-base", "-1"], ["-1"]),
        (["--stop", ""], ["stop '': must be a text"]),
        (["--chat-template", "{% if %}", "--chat"], ["template"]),
        (["--file", "no-such-file.txt"], ["no-such-file.txt", "No such file"]),
        (["--file", "/"], ["/: Is a directory"]),
        (["--system", "a\udcffb"], ["--system: character 1 is not valid UTF-8"]),
    ],
)
def test_bad_options_give_one_line(tiny: Path, flags: list[str], parts: list[str]) -> None:
    assert_one_error_line(run("generate", "-m", tiny, "hello", *flags), *parts)


@pytest.mark.parametrize("raw", [b"abc\xff", b"\xc3"])
def test_text_that_is_not_utf8_is_refused(tiny: Path, tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "bad.txt").write_bytes(raw)
    assert_one_error_line(run("generate", "-m", tiny, "-f", tmp_path / "bad.txt"), "bad.txt", "UTF-8", "iconv")
    assert_one_error_line(run("generate", "-m", tiny, "-", input=raw), "standard input", "UTF-8")
    result = shell("tokenize", "-m", tiny, os.fsdecode(raw))
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr.startswith(b"error: PROMPT: character")


def test_a_file_without_end_is_refused_after_a_bounded_part(tiny: Path) -> None:
    assert_one_error_line(run("generate", "-m", tiny, "-f", "/dev/zero"), "/dev/zero: more than 8,192 KiB")


@pytest.mark.parametrize("command", [["generate", "x", "-m"], ["tokenize", "x", "-m"], ["inspect"], ["chat", "-m"]])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a model, but long", b"GGUF\x03\0\0\0" + b"\xff" * 16])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, command: list[str], content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert_one_error_line(run(*command, path, input="hello\n"), "model.gguf")


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    for name in (tmp_path / "none.gguf", tmp_path, "hf:owner"):
        assert_one_error_line(run("generate", "x", "-m", name), str(name))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, tiny: Path) -> None:
    raw = bytearray(tiny.read_bytes())
    raw[-4:] = np.float32("nan").tobytes()  # the last value of the last tensor, the output norm
    (tmp_path / "nan.gguf").write_bytes(raw)
    result = run("generate", "-m", tmp_path / "nan.gguf", "hello")
    assert_one_error_line(result, "finite")


def test_usage_errors_have_status_2(tiny: Path) -> None:
    for args in (
        ["nope"],
        ["generate", "--nope"],
        ["inspect", tiny, "-m", tiny],
        ["generate", "--logit-bias", "5", "x"],
    ):
        result = run(*args)
        assert result.exit_code == 2, args
        assert result.stdout == ""


# -- the shell's own trouble -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_behind_stdout_gives_one_line(tiny: Path) -> None:
    for args in (["generate", "hello", "-n", 4], ["tokenize", "hello"], ["inspect"]):
        with Path("/dev/full").open("w") as full:
            result = shell(*args, "-m", tiny, stdout=full, stderr=subprocess.PIPE, capture_output=False)
        assert result.returncode == 1
        assert result.stderr == b"error: cannot write the output: No space left on device\n"


def test_a_closed_pipe_is_quiet(tiny: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        result = shell(
            "generate", "hello", "-n", 30, "-m", tiny, stdout=closed, stderr=subprocess.PIPE, capture_output=False
        )
    assert (result.returncode, result.stderr) == (141, b"")


def test_warnings_are_notes(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def warns(*args: Any, **options: Any) -> None:
        warnings.warn("kernels cannot be kept here", stacklevel=1)

    monkeypatch.setattr("slimrt.terminal.generate.generate", warns)
    monkeypatch.setattr(warnings, "filters", [("default", None, Warning, None, 0)])
    result = run("generate", "hello", "-m", tiny)
    assert (result.exit_code, result.stderr) == (0, "note: kernels cannot be kept here\n")


def test_ctrl_c_ends_with_130_and_no_traceback(tiny: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "click_cli", "generate", "hello", "-m", str(tiny), "-c", "64k", "-n", "60000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout and process.stderr
        process.stdout.read(1)  # the answer has begun
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode == 130


def test_ctrl_c_while_modules_are_imported_ends_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    result = shell("--help", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, b"", b"")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a folder that may not be written")
def test_an_unwritable_target_folder(tiny: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    result = run("quantize", tiny, tmp_path / "out.gguf", "--type", "q8_0")
    assert_one_error_line(result, "out.gguf")
    assert list(tmp_path.iterdir()) == []


def test_targets_that_cannot_be_written(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for target in (tmp_path / "none" / "out.gguf", tmp_path / "file" / "out.gguf"):
        assert_one_error_line(run("quantize", tiny, target, "--type", "q8_0"), str(target.parent))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_cache_that_cannot_be_made_gives_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLIMRT_CACHE", str(tmp_path / "file" / "cache"))
    assert_one_error_line(run("generate", "x"), "cache folder", "SLIMRT_CACHE")
    assert_one_error_line(run("pull"), "cache folder", "SLIMRT_CACHE")


# -- tokenize ----------------------------------------------------------------------------------------------------------


def test_tokenize_prints_llama_cpps_ids_for_the_default_model(default_model: Path) -> None:
    goldens = np.load(GOLDENS / "logits" / "llama_cpp.npz")
    for number, text in enumerate(map(str, goldens["texts"])):
        result = run("tokenize", "-m", default_model, "--special", text)
        assert result.stdout == " ".join(map(str, goldens[f"{number}.ids"])) + "\n"


def test_no_model_named_means_the_default_one(default_model: Path) -> None:
    assert run("tokenize", "Hello").stdout == run("tokenize", "-m", default_model, "Hello").stdout
    assert run("pull").stdout == f"{default_model}\n"
    listed = json.loads(run("pull", "--list", "--json").stdout)["models"]
    assert {"name": "smollm2-135m", "path": str(default_model), "bytes": default_model.stat().st_size} in listed


def test_tokenize_there_and_back(tiny: Path) -> None:
    text = "hello wörld \N{PARTY POPPER}<|im_end|>"
    data = json.loads(run("tokenize", "-m", tiny, "--json", "--special", text).stdout)
    assert data["count"] == len(data["tokens"]) == len(data["pieces"])
    assert data["tokens"][-1] == 2  # <|im_end|>
    assert data["pieces"][0] == "hello"
    assert "\\xf0" in data["pieces"]  # a part of the emoji
    assert run("tokenize", "-m", tiny, "--special", "--count", text).stdout == f"{data['count']}\n"
    ids = run("tokenize", "-m", tiny, "--special", text).stdout
    assert run("tokenize", "-m", tiny, "--decode", "--special", "-", input=ids).stdout == text + "\n"
    assert run("tokenize", "-m", tiny, "--decode", str(data["tokens"])).stdout == text.removesuffix("<|im_end|>") + "\n"
    assert json.loads(run("tokenize", "-m", tiny, "--json", text).stdout)["count"] > data["count"]  # as plain text
    assert_one_error_line(run("tokenize", "-m", tiny, "--decode", "1 two"), "'two'")
    assert_one_error_line(run("tokenize", "-m", tiny, "--decode", "99999"), "99999")


# -- inspect, quantize, convert ----------------------------------------------------------------------------------------


def test_inspect_shows_model_and_memory_plan(tiny: Path) -> None:
    text = run("inspect", tiny, "-c", "2k", "--tensors", "--metadata").stdout
    parts = [
        "2 of width 64",
        "4 heads of 16, 2 for keys",
        "Memory at --ctx 2,048, beyond the 512 trained on",
        "KV cache, 1k tokens",
    ]
    for part in [*parts, "blk.1.ffn_down.weight", "64 x 96", "tokenizer.ggml.merges"]:
        assert part in text, part
    data = json.loads(run("inspect", tiny, "-c", "2k", "--json", "--tensors", "--metadata").stdout)
    # 2 layers, keys and values, 2 heads of 16: 512 bytes a token in float32
    assert data["memory"]["kv"] == 2048 * (256 if data["backend"]["name"] == "fast" else 512)
    plain = json.loads(run("inspect", tiny, "-c", "2k", "--json", "--device", "numpy").stdout)
    assert plain["backend"] == {"name": "numpy", "why": "NumPy: asked for"}
    assert plain["memory"]["kv"] == 2048 * 512
    assert data["backend"]["why"] in run("inspect", tiny, "--device").stdout
    assert {t["name"]: t["shape"] for t in data["tensors"]}["blk.1.ffn_down.weight"] == [64, 96]
    assert data["metadata"]["llama.block_count"] == 2


def test_control_characters_of_a_file_do_not_reach_the_terminal(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "x.gguf", **{"general.name": "a\x1b]0;owned\x07b\x9b2J"})
    for flags in ([], ["--metadata"]):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", run("inspect", path, *flags).stdout)


def test_quantize_writes_what_was_asked_for(tiny: Path, tmp_path: Path) -> None:
    result = run("quantize", tiny, tmp_path / "q.gguf", "--type", "q8_0", "--json")
    path = tmp_path / "q.gguf"
    said = {"source": str(tiny), "path": str(path), "type": "q8_0", "bytes": path.stat().st_size}
    assert json.loads(result.stdout) == said
    types = json.loads(run("inspect", tmp_path / "q.gguf", "--json").stdout)["tensor_types"]
    assert types["Q8_0"]["tensors"] == 15  # the embedding and 7 matrices in each of 2 layers
    assert run("generate", "-m", tmp_path / "q.gguf", "-n", "2", "hello").exit_code == 0


def test_convert_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", tmp_path / "none"):
        assert_one_error_line(run("convert", source, tmp_path / "out.gguf"), str(source), "config.json")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


# -- bench -------------------------------------------------------------------------------------------------------------


def test_bench_measures_what_was_asked_for(tiny: Path, tmp_path: Path) -> None:
    flags = ["--length", "64", "--length", "32", "--repeats", "2", "--decode-tokens", "3", "--prune", "off"]
    result = shell("bench", "ttft", "-m", tiny, *flags, "--json")
    assert (result.returncode, result.stderr) == (0, b"")
    rows = json.loads(result.stdout)["rows"]
    assert [(row["contender"], row["length"], len(row["runs"])) for row in rows] == [
        ("slimrt off", 32, 2), ("slimrt off", 64, 2)
    ]  # fmt: skip
    assert_one_error_line(run("bench", "ttft", "-m", tiny, "--vs", "nothing"), "'nothing'")
    assert_one_error_line(run("bench", "ttft", "-m", tiny, "--png", tmp_path / "none" / "x.png"), "x.png")


# -- progress bars -----------------------------------------------------------------------------------------------------


def on_terminal(*args: object) -> tuple[int, bytes]:
    """Exit status and everything on the screen of a command whose stdout and stderr are a terminal."""
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    command = [sys.executable, "-m", "click_cli", *map(str, args)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=slave, stderr=slave, env=environment) as process:
        os.close(slave)
        output, end = b"", time.monotonic() + 60
        while time.monotonic() < end and select.select([master], [], [], 60)[0]:
            try:
                data = os.read(master, 65536)
            except OSError:  # the other side was closed
                break
            if not data:
                break
            output += data
    os.close(master)
    return process.returncode, output


def test_long_work_shows_a_bar_on_a_terminal_and_nothing_in_a_pipe(tmp_path: Path) -> None:
    large = write_tiny_llama(tmp_path / "large.gguf", d_model=512, d_ff=6144, n_layers=6, n_heads=8)
    status, screen = on_terminal("quantize", large, tmp_path / "a.gguf", "--type", "q5_1")
    assert status == 0
    assert b"quantising" in screen
    assert "━".encode() in screen
    result = shell("quantize", large, tmp_path / "b.gguf", "--type", "q5_1")
    assert (result.returncode, result.stdout) == (0, b"")
    assert result.stderr.decode().startswith(f"{tmp_path}/b.gguf: q5_1, ")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_embed_writes_lines_or_an_array_whole_or_not_at_all(tiny: Path, tmp_path: Path) -> None:
    texts, target = ["hello world", "hello"], tmp_path / "vectors.npy"
    with slimrt.load(tiny) as llm:
        expected = llm.embed(texts, pooling="last")
    result = run("embed", *texts, "--model", tiny, "--pooling", "last")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["text"] for line in lines] == texts
    assert np.array_equal(np.array([line["embedding"] for line in lines], np.float32), expected)
    (tmp_path / "lines.txt").write_text("hello world\nhello\n")
    more = ("--file", tmp_path / "lines.txt", "--model", tiny, "--pooling", "last", "-o", target)
    assert run("embed", *more).exit_code == 0 and np.array_equal(np.load(target), expected)
    for arguments, says in (
        (more, "exists already"),
        (("", "--model", tiny), "text 1: it is empty"),
        (("--model", tiny), "no texts"),
        (("a", *more), "both texts and --file"),
        (("hello", "hello " * 3000, "--model", tiny), "text 2: the prompt brings"),
    ):
        failed = run("embed", *arguments)
        assert failed.exit_code == 1 and says in failed.stderr and failed.stderr.count("\n") == 1
        assert not failed.stdout
    assert run("embed", *more, "--force").exit_code == 0
