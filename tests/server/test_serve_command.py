"""``slimrt serve`` as a process, and ``slimrt bench serve``."""

from __future__ import annotations

import http.server
import importlib.util
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("starlette")

from click_cli import cli
from slimrt.bench import servers
from tests.terminal_notes import without_backend_note
from tests.tiny_gguf import write_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", n_layers=4, ctx=2048)


def test_it_says_where_it_listens_and_lets_streams_end_when_it_is_told_to_stop(model: Path) -> None:
    command = [sys.executable, "-u", "-m", "click_cli", "serve", "-m", str(model), "--port", "0", "--device", "numpy"]
    with subprocess.Popen(
        [*command, "--grace", "3", "--overflow", "shift"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None and server.stderr is not None
            line = server.stdout.readline()
            found = re.search(r"at (http://127\.0\.0\.1:\d+) \(context 2,048, \d at once\)", line)
            assert found, line

            def stream(tokens: int) -> Any:
                body = {"prompt": "hello", "max_tokens": tokens, "stream": True, "ignore_eos": True}
                url, headers = f"{found[1]}/v1/completions", {"Content-Type": "application/json"}
                return urllib.request.urlopen(
                    urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=30
                )

            with stream(100_000) as long, stream(12) as short:
                assert long.readline().startswith(b"data: {") and short.readline().startswith(b"data: {")
                server.send_signal(signal.SIGTERM)
                # One has the time to end, the other one ends with the reason; both end as HTTP wants it, or read()
                # would raise IncompleteRead.
                assert short.read().rstrip().endswith(b"data: [DONE]")
                last = long.read().rstrip().splitlines()[-1].removeprefix(b"data: ")
                assert json.loads(last)["error"]["message"].startswith("the server is stopping")
                assert server.wait(30) in (0, -signal.SIGTERM)
            assert re.fullmatch(r"note: stopping: (1 request has|2 requests have) 3 s to end\n", server.stderr.read())
        finally:
            server.kill()


def test_a_second_ctrl_c_ends_at_once_without_a_traceback(model: Path) -> None:
    command = [sys.executable, "-u", "-m", "click_cli", "serve", "-m", str(model), "--port", "0", "--device", "numpy"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stderr is not None
        found = re.search(r":(\d+) ", server.stdout.readline())
        assert found
        with socket.create_connection(("127.0.0.1", int(found[1]))) as half:
            half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
            for _ in range(2):  # the second one within the time that requests have to end
                time.sleep(0.3)
                server.send_signal(signal.SIGINT)
            assert server.wait(5) == 130
        assert "Traceback" not in server.stderr.read()


def test_what_cannot_be_served_is_one_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: str) -> str:
        result = CliRunner().invoke(cli, ["serve", "-m", str(model), *arguments])
        assert result.exit_code != 0 and without_backend_note(result.stderr).count("\n") == 1, result.output
        return result.stderr

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port}: " in refused("--port", str(port)) and "choose another" in refused("--port", str(port))
    assert "--host no.such.host.invalid" in refused("--host", "no.such.host.invalid")
    assert "cannot carry" in refused("--api-key", "schlüssel")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'slimrt[server]'" in refused()


def test_the_benchmark_tells_what_clients_get(model: Path) -> None:
    options = ["--length", "1300", "--prompt", "40", "--decode-tokens", "4", "--clients", "2", "--prune", "off"]
    result = CliRunner().invoke(cli, ["bench", "serve", "-m", str(model), *options, "--threads", "1", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["standstill"]["length"] == 1300 and told["standstill"]["tokens"] >= 0
    assert 0 < told["standstill"]["median_s"] <= told["standstill"]["longest_s"]
    (crowd,) = told["crowds"]
    assert crowd["clients"] == 2 and crowd["tokens_per_s"] > 0 and crowd["ttft_s"] > 0


LLAMA_SERVER = """#!{python}
import os, sys
options = dict(zip(sys.argv[1:-1], sys.argv[2:]))
os.execv({python!r}, [{python!r}, "-m", "click_cli", "serve", "--device", "numpy", "--threads", "1", "--prune", "off",
         "--sessions", options["--parallel"],
         *(part for name in ("--model", "--port") for part in (name, options[name]))])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="programs begin otherwise")
def test_the_benchmark_beside_another_server(model: Path, tmp_path: Path) -> None:
    """What is given for llama.cpp's server takes its options, and serves as slimrt does."""
    program = tmp_path / "llama-server"
    options = ["--length", "600", "--prompt", "20", "--decode-tokens", "6", "--clients", "2", "--repeats", "1"]
    command = ["bench", "serve", "-m", str(model), *options, "--device", "numpy", "--threads", "1", "--prune", "off"]
    command += ["--llama-server", str(program), "--json"]
    assert "no program" in CliRunner().invoke(cli, command).stderr
    program.write_text("#!/bin/sh\necho cannot load the model; exit 1\n")
    program.chmod(0o755)
    assert f"{program}: does not serve; it said: cannot load the model" in CliRunner().invoke(cli, command).stderr
    assert "--overflow: llama.cpp's server" in CliRunner().invoke(cli, [*command, "--overflow", "shift"]).stderr
    program.write_text(LLAMA_SERVER.format(python=sys.executable))
    result = CliRunner().invoke(cli, [*command, "--output", str(tmp_path / "report.json")])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert json.loads((tmp_path / "report.json").read_text()) == told
    assert "exists already" in CliRunner().invoke(cli, [*command, "-o", str(tmp_path / "report.json")]).stderr
    assert told["medians"].keys() == {"llama.cpp", "slimrt"} and told["environment"]["cores"] >= 1
    for name in told["medians"]:
        (crowd,), (standstill,) = told["crowds"][name]["2"], told["standstills"][name]
        assert crowd["clients"] == 2 and crowd["tokens_per_s"] > 0 and crowd["ttft_s"] > 0
        assert standstill["length"] == 600 and 0 < standstill["median_s"] <= standstill["longest_s"]


def test_a_model_that_writes_the_word_error_is_no_failure() -> None:
    """Only an event that is one."""
    events: list[dict[str, object]] = [{"choices": [{"text": "error"}]}, {"choices": [{"text": '"error"'}]}]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events))

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for error in ("", "no room"):
            events += [{"error": {"message": error}}] if error else []
            stream = servers._Stream(f"127.0.0.1:{server.server_port}", [1, 2], 2)
            stream.start()
            stream.join(30)
            assert len(stream.came) == 2 and error in stream.error and bool(stream.error) == bool(error)
        server.shutdown()
