"""Arguments of the Python interface: what is no prompt, no size, no option or no plan gets one clear line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimrt
from slimrt.config import RopeConfig, SamplingConfig
from slimrt.errors import SettingError, SlimrtError
from slimrt.models.rope import RopeTable
from slimrt.prune.plan import PrunePlan, Stage
from tests.tiny_gguf import write_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("arguments") / "tiny.gguf", ctx=512, n_layers=3)


@pytest.fixture(scope="module")
def llm(model: Path) -> slimrt.LLM:
    return slimrt.load(model, device="numpy", threads=1)


@pytest.mark.parametrize("call", ["generate", "stream", "logits"])
@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (b"hello", "prompt of type bytes: must be a text or a list of token ids; decode bytes first"),
        (["hello", "world"], "prompt: item 0 is 'hello'; a prompt is one text, or a list of token ids"),
        ([1, 2.5], "prompt: item 1 is '2.5'"),
        ([True], "prompt: item 0 is 'True'"),
        ([1, -5], "prompt: item 1 is the token id -5; this model has ids 0 to"),
        ([10**6], "prompt: item 0 is the token id 1000000; this model has ids 0 to"),
        ({"role": "user"}, "prompt of type dict"),
        (None, "prompt of type NoneType"),
        (7, "prompt of type int"),
    ],
)
def test_what_is_no_prompt(llm: slimrt.LLM, call: str, prompt: Any, said: str) -> None:
    with pytest.raises(SettingError) as caught:
        getattr(llm, call)(prompt)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "prompt", [[1, 2, 3], (1, 2, 3), np.array([1, 2, 3]), np.array([1, 2, 3], np.uint16), range(1, 4)]
)
def test_ids_of_any_kind(llm: slimrt.LLM, prompt: Any) -> None:
    assert llm.generate(prompt, max_tokens=4).tokens == llm.generate([1, 2, 3], max_tokens=4).tokens


@pytest.mark.parametrize("texts", [7, None, b"hello", [2.5]])
def test_what_is_no_text_to_embed(llm: slimrt.LLM, texts: Any) -> None:
    with pytest.raises(SettingError, match="must be a text or a list of token ids"):
        llm.embed(texts)


@pytest.mark.parametrize("ids", [[1, -5, 2], [1, 10**6, 2]])
def test_ids_to_judge_are_checked(llm: slimrt.LLM, ids: list[int]) -> None:
    for judge in (llm.logprobs, llm.continuation_logits):
        with pytest.raises(SettingError, match="this model has ids 0 to"):
            judge(ids, 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temprature": 0.5}, "unknown option 'temprature'; did you mean temperature?"),
        ({"xyzzy": 1}, "unknown option 'xyzzy'; known are max_tokens, stop"),
        ({"top_k": 2.5}, "top_k 2.5: must be a whole number, at least 0"),
        ({"top_k": True}, "top_k True: must be a whole number"),
        ({"penalty_last_n": 0.5}, "penalty_last_n 0.5: must be a whole number"),
        ({"temperature": "hot"}, "temperature 'hot': must be a number of at least 0"),
        ({"repeat_penalty": "much"}, "repeat_penalty 'much': must be a number"),
        ({"top_p": float("nan")}, "top_p nan: must be a number from 0 to 1"),
        ({"max_tokens": "many"}, "max_tokens 'many': must be a whole number"),
        ({"max_tokens": 2.5}, "max_tokens 2.5: must be a whole number"),
        ({"logprobs": True}, "logprobs True: must be a whole number"),
        ({"stop": [1]}, "stop 1: must be a text or a list of texts"),
        ({"stop": [""]}, "stop '': must be a text or a list of texts, none of them empty"),
        ({"logit_bias": [1]}, "logit_bias [1]: must be a dict"),
        ({"logits_processors": lambda ids, logits: logits}, "logits_processors: must be a list of callables"),
    ],
)
def test_options_that_cannot_be(llm: slimrt.LLM, options: dict[str, Any], said: str) -> None:
    calls: list[Callable[..., Any]] = [
        lambda **options: llm.generate("a", **options),
        lambda **options: llm.chat([{"role": "user", "content": "a"}], **options),
        lambda **options: llm.session().ask("a", **options),
    ]
    for call in calls:
        with pytest.raises(SettingError) as caught:
            call(**options)
        assert said in str(caught.value)


def test_none_means_the_default(llm: slimrt.LLM) -> None:
    nothing: dict[str, Any] = dict.fromkeys(("stop", "seed", "temperature", "top_k", "logit_bias", "overflow"))
    assert llm.generate("a", max_tokens=3, **nothing).text == llm.generate("a", max_tokens=3).text
    assert SamplingConfig(top_k=np.int64(3), temperature=np.float32(0.5)).top_k == 3  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ctx": "8k"}, "ctx '8k': must be a whole number, at least 1"),
        ({"ctx": 0}, "ctx 0: must be a whole number"),
        ({"ctx": 2.5}, "ctx 2.5: must be a whole number"),
        ({"threads": "2"}, "threads '2': must be a whole number"),
        ({"prune": 3}, "prune 3: must be off, auto, fast, a plan's file or a PrunePlan"),
        ({"prune": "~/no-such-plan.json"}, "there is no such file"),
        ({"overflow": "wrap"}, "overflow 'wrap'"),
        ({"chat_template": 3}, "chat_template '3': must be a Jinja template or a name"),
    ],
)
def test_loads_that_cannot_be(model: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError) as caught:
        slimrt.load(model, device="numpy", **options)
    assert said in str(caught.value)


def test_a_context_beyond_the_trained_one_is_advised_as_such(model: Path) -> None:
    llm = slimrt.load(model, ctx=64, device="numpy")
    for count, said in (
        (100, r"ctx=100 or more \(--ctx\)$"),
        (600, r"\(--ctx\), beyond the 512 that the model was trained"),
    ):
        for ask in (llm.generate, lambda ids: llm.logprobs(ids, 1)):
            with pytest.raises(SlimrtError, match=said):
                ask([1] * count)


def test_the_users_folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m.gguf").symlink_to(model)
    (tmp_path / "plan.json").write_text(PrunePlan((Stage(1, 0.5),)).to_json())
    llm = slimrt.load("~/m.gguf", prune="~/plan.json", device="numpy", threads=1)
    assert llm.plan.plan is not None and PrunePlan.from_file("~/plan.json") == llm.plan.plan
    with llm.session() as talk:
        talk.save("~/talk.slim")
        llm.restore("~/talk.slim")
    assert (tmp_path / "talk.slim").is_file()
    with pytest.raises(SlimrtError, match="write the folder out"):
        slimrt.load("~nobody-of-that-name/m.gguf")


# -- plans -------------------------------------------------------------------------------------------------------------

BAD_PLANS = {
    "no file": None,
    "nothing": b"",
    "no JSON": b"{",
    "no UTF-8": b"\xff\xfe\x00",
    "nested": b"[" * 100_000,
    "a list": b"[]",
    "large": b" " * (2 << 20),
    "unknown key": b'{"layers": 3}',
    "a text for a number": b'{"follow": "x"}',
    "absurd block": json.dumps({"block": 1 << 27, "unit": 1 << 27}).encode(),
}


@pytest.mark.parametrize("name", BAD_PLANS)
def test_files_that_are_no_plan(name: str, model: Path, tmp_path: Path) -> None:
    path, content = tmp_path / "plan.json", BAD_PLANS[name]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingError) as caught:
        PrunePlan.from_file(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(SettingError):
        slimrt.load(model, prune=path, device="numpy")


@pytest.mark.parametrize("name", [name for name in BAD_PLANS if name != "no file"])
def test_a_bad_presets_file_beside_a_model_is_named(name: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").symlink_to(model)
    beside = tmp_path / "m.slim.json"
    beside.write_bytes(BAD_PLANS[name] or b"")
    with pytest.raises(SettingError, match=r"m\.slim\.json"):
        slimrt.load(tmp_path / "m.gguf", device="numpy")


@pytest.mark.parametrize(("fast", "slow"), [(1e308, 1.0), (1e308, 1e307), (32.0, 5e-324), (1e-300, 1e-305)])
def test_absurd_turns_of_yarn_are_computed(fast: float, slow: float) -> None:
    config = RopeConfig(scaling="yarn", factor=4.0, original_ctx=2048, beta_fast=fast, beta_slow=slow)
    cos, sin = RopeTable(config)(np.arange(100))
    assert np.isfinite(cos).all() and np.isfinite(sin).all()


# -- what a type checker sees ------------------------------------------------------------------------------------------


def test_a_type_checker_sees_misspelt_names(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    script = tmp_path / "script.py"
    script.write_text(
        "import slimrt\n"
        "llm = slimrt.load('m.gguf')\n"
        "llm.generate('a', max_tokens=3, temperature=0.5, stop=['x'], prune='off')\n"
        "llm.generate('a', temprature=0.5)\n"
        "llm.chat([{'role': 'user', 'content': 'a'}], max_token=3)\n"
        "llm.session().ask('a', topk=3)\n"
        "slimrt.lode('m.gguf')\n"
        "from slimrt import Lama\n"
        "llm.generate(['a', 'b'])\n"
    )
    root = Path(__file__).parents[1]
    layout = tmp_path / "layout"
    (layout / "slimrt").mkdir(parents=True)
    for entry in (root / "slimrt").iterdir():
        (layout / "slimrt" / entry.name).symlink_to(entry)
    for name in ("models", "convert", "kernels_cu"):
        (layout / "slimrt" / name).symlink_to(root / name)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(root / "pyproject.toml"),
        "--follow-imports",
        "silent",
    ]
    run = subprocess.run(
        [*command, "--cache-dir", str(root / ".mypy_cache"), str(script)],
        capture_output=True, text=True, timeout=400, env={"MYPYPATH": str(layout), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    found = {int(line.split(":")[1]) for line in run.stdout.splitlines() if "script.py:" in line and "error" in line}
    assert found == {4, 5, 6, 7, 8, 9}, (run.stdout, run.stderr)


def test_heads_wider_than_any_models_are_refused_before_kernels_are_compiled(tmp_path: Path) -> None:
    from slimrt.errors import ModelFileError

    path = write_tiny_llama(tmp_path / "wide.gguf", d_model=32, n_heads=1, n_kv_heads=1, head_dim=65536, n_layers=1)
    with pytest.raises(ModelFileError, match=r"heads are 65536 wide; .* at most 1024"):
        slimrt.load(path)
