"""Arguments of the Python interface: what is no prompt, no size, no option or no plan gets one clear line."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
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
        ({1, 2}, "prompt of type set"),
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
        ({"stop": 5}, "stop 5: must be a text or a list of texts"),
        ({"stop": b"x"}, "stop b'x': must be a text or a list of texts"),
        ({"temperature": Fraction(1, 2)}, "temperature Fraction(1, 2): must be a number"),
        ({"temperature": 10**400}, ": must be a number of at least 0"),
        ({"presence_penalty": -1e300}, "presence_penalty -1e+300: must be a number from -1e+06 to 1e+06"),
        ({"frequency_penalty": float("-inf")}, "frequency_penalty -inf: must be a number from"),
        ({"repeat_penalty": 1e-300}, "repeat_penalty 1e-300: must be at least 1e-06; 1 switches it off"),
        ({"ignore_eos": "no"}, "ignore_eos 'no': must be True or False"),
        ({"logits_processors": [5]}, "logits_processors: '5' is none; each must be callable"),
        ({"logits_processors": 5}, "logits_processors: must be a list of callables"),
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


def test_numbers_of_numpy_and_texts_from_a_generator_are_those(llm: slimrt.LLM, model: Path) -> None:
    options: dict[str, Any] = {"max_tokens": np.int64(3), "logprobs": np.int8(2), "n_keep": np.int32(1)}
    done, plain = llm.generate("a", **options), llm.generate("a", max_tokens=3, logprobs=2)
    assert done.text == plain.text and done.logprobs == plain.logprobs
    assert np.array_equal(llm.embed(text for text in ("a", "the")), llm.embed(["a", "the"]))
    assert np.array_equal(llm.embed(iter([1, 2])), llm.embed([1, 2]))
    small = slimrt.load(model, device="numpy", ctx=np.int64(128), kv_budget=np.int64(96))  # type: ignore[arg-type]
    assert json.dumps([small.ctx, small.kv_budget]) == "[128, 96]"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda llm: llm.tokenize(b"a"), "text of type bytes: must be a str; decode bytes first"),
        (lambda llm: llm.tokenize(None), "text of type NoneType"),
        (lambda llm: llm.detokenize(3), "ids '3': must be a list of token ids"),
        (lambda llm: llm.detokenize([1.0]), "token id '1.0': must be a whole number"),
        (lambda llm: llm.logprobs([1, 2, 3], 1.0), "start 1.0: must be a whole number"),
        (lambda llm: llm.continuation_logits([1, 2, 3], None), "start None: must be a whole number"),
        (lambda llm: llm.chat([{"role": "user", "content": None}]), "message 0 of the user has the content None"),
        (lambda llm: llm.session().save("\ud800"), "no file can be called so"),
        (copy.copy, "a loaded model cannot be pickled or copied; load it"),
        (pickle.dumps, "a loaded model cannot be pickled or copied; load it"),
        (lambda llm: copy.copy(llm.session()), "fork() goes its own way from here, save() writes it to a file"),
        (lambda llm: copy.deepcopy(llm.session()), "a session cannot be pickled or copied"),
        (lambda llm: copy.copy(llm.stream("a")), "a stream cannot be pickled or copied"),
    ],
)
def test_calls_that_cannot_be(llm: slimrt.LLM, call: Callable[[slimrt.LLM], Any], said: str) -> None:
    with pytest.raises(SettingError) as caught:
        call(llm)
    assert said in str(caught.value)


def test_a_progress_callback_cannot_move_its_own_session_on(llm: slimrt.LLM) -> None:
    wanted = llm.generate("the hello", max_tokens=4).text

    def meddles(done: int, total: int) -> None:
        llm.generate("world", max_tokens=1)

    llm.reset()
    with pytest.raises(SettingError, match="use a session of its own there"):
        llm.generate("the hello", max_tokens=4, progress=meddles)
    assert llm.generate("the hello", max_tokens=4).text == wanted
    llm.reset()
    free = llm.generate("the hello", max_tokens=4, progress=lambda *done: llm.session().prefill([1, 2]))
    assert free.text == wanted


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
        ({"ctx": 10**21}, "ctx 1,000,000,000,000,000,000,000: must be at most 2,147,483,647"),
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
