"""What is measured: a model in slimrt or llama.cpp, loaded once, asked for the time of one prompt."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from slimrt.bench.peak import measure_peak
from slimrt.errors import ComputeError, SettingError

__all__ = ["Contender", "Measurement", "Setup", "check_installed", "open_contender"]


@dataclass(frozen=True)
class Setup:
    """How a contender is loaded: the same for all. ``ctx`` tokens, ``threads`` cores, and for slimrt ``kv_budget``, the
    resident rows of a layer (None: all), and the ``device`` that computes, as ``slimrt.load`` takes it."""

    model: str
    ctx: int
    threads: int
    kv_budget: int | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Measurement:
    """One prompt. ``ttft_s``: seconds from the call to the first token. ``decode_tok_s``: tokens a second after it.

    ``peak_bytes``: resident memory at its highest during the call (on Linux; elsewhere since the process began).
    ``kept``: tokens kept after each cut of the prune plan. ``first_token``: what was drawn, to compare contenders.
    ``further_s``: seconds to the first token of the answer to each further question on the same context. ``kv_bytes``:
    keys and values where the model computes, and in host memory under a budget, after the answer (None where the
    program does not tell). ``fetched``: bytes that decode asked the host for, those of them that came in time, and how
    often it waited (None without a budget).
    """

    ttft_s: float
    decode_tok_s: float
    peak_bytes: int
    first_token: int
    kept: tuple[int, ...] = ()
    further_s: tuple[float, ...] = ()
    kv_bytes: tuple[int, int] | None = None
    fetched: tuple[int, int, int] | None = None


class Contender(Protocol):
    """A loaded model."""

    def measure(
        self, ids: Sequence[int], decode_tokens: int, plan: str, further: Sequence[Sequence[int]] = ()
    ) -> Measurement:
        """Read ``ids`` as if nothing had been read before, draw greedily, decode ``decode_tokens`` more tokens; then
        read each of ``further`` behind it all, as a further question, and draw once more."""

    def about(self) -> dict[str, Any]:
        """Versions and settings that belong in the report."""


class Slimrt:
    """This package; ``plan`` is what ``prune`` takes (off, auto, fast, a plan's file)."""

    def __init__(self, setup: Setup) -> None:
        import slimrt

        self._llm = slimrt.load(
            setup.model, ctx=setup.ctx, device=setup.device, threads=setup.threads, kv_budget=setup.kv_budget
        )

    def measure(
        self, ids: Sequence[int], decode_tokens: int, plan: str, further: Sequence[Sequence[int]] = ()
    ) -> Measurement:
        self._llm.reset()
        _reset_peak()
        done = self._llm.generate(ids, max_tokens=decode_tokens + 1, ignore_eos=True, prune=plan)
        times, conversation, asked = done.timings, [*ids, *done.tokens], []
        for question in further:
            conversation += question
            answer = self._llm.generate(conversation, max_tokens=1, ignore_eos=True, prune=plan)
            conversation += answer.tokens
            asked.append(answer.timings.ttft_s)
        kv_bytes = times.kv_bytes_device, times.kv_bytes_host
        fetched = times.kv_bytes_fetched, times.kv_bytes_in_time, times.kv_waits
        budget = self._llm.kv_budget is not None
        return Measurement(
            times.ttft_s, times.decode_tok_s, _peak(), done.tokens[0], times.stages, tuple(asked), kv_bytes,
            fetched if budget else None,
        )  # fmt: skip

    def about(self) -> dict[str, Any]:
        import numpy as np
        from threadpoolctl import threadpool_info

        import slimrt

        wanted = ("internal_api", "version", "architecture", "threading_layer")
        features: Any = np.show_config(mode="dicts")
        peak, ops = measure_peak(self._llm.engine.ops), self._llm.engine.ops
        return {
            "slimrt": slimrt.__version__,
            "backend": {"name": ops.name, "why": self._llm.backend.why},
            "peak": {"operations_s": peak.operations_s, "bytes_s": peak.bytes_s},
            "kv_per_token": self._llm.engine.kv_bytes_per_token,
            "numpy": np.__version__,
            "blas": [{k: info.get(k) for k in wanted} for info in threadpool_info() if info["user_api"] == "blas"],
            "cpu_features": features["SIMD Extensions"]["found"],
            "notes": self._llm.notes,
        }


class LlamaCpp:
    """llama.cpp through llama-cpp-python: flash attention, default batch sizes; ``plan`` means nothing to it."""

    def __init__(self, setup: Setup) -> None:
        import llama_cpp

        self._llm = llama_cpp.Llama(
            self._model(setup),
            n_ctx=setup.ctx,
            n_threads=setup.threads,
            n_threads_batch=setup.threads,
            flash_attn=True,
            verbose=False,
        )

    def _model(self, setup: Setup) -> str:
        return setup.model

    def measure(
        self, ids: Sequence[int], decode_tokens: int, plan: str, further: Sequence[Sequence[int]] = ()
    ) -> Measurement:
        llm = self._llm
        _reset_peak()
        begun = time.perf_counter()
        llm.reset()  # eval then drops every earlier key and value
        llm.eval(ids)
        token = first = llm.sample(temp=0)
        ttft = time.perf_counter() - begun
        for _ in range(decode_tokens):
            llm.eval([token])
            token = llm.sample(temp=0)
        decoding = time.perf_counter() - begun - ttft
        asked = []
        for question in further:
            begun = time.perf_counter()
            llm.eval([token, *question])
            token = llm.sample(temp=0)
            asked.append(time.perf_counter() - begun)
        rate = decode_tokens / decoding if decode_tokens else 0.0
        return Measurement(ttft, rate, _peak(), first, further_s=tuple(asked))

    def about(self) -> dict[str, Any]:
        import llama_cpp

        system = llama_cpp.llama_print_system_info().decode(errors="replace").strip()
        return {"llama_cpp_python": llama_cpp.__version__, "llama_cpp_system": system}


class LlamaCppBest(LlamaCpp):
    """llama.cpp on the model requantised, by itself, to bfloat16: the format that it reads prompts fastest in."""

    def _model(self, setup: Setup) -> str:
        import llama_cpp

        self._folder = tempfile.TemporaryDirectory(prefix="slimrt-bench-")  # goes with this object
        path = Path(self._folder.name) / "bf16.gguf"
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize, params.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_BF16, True, setup.threads
        if llama_cpp.llama_model_quantize(setup.model.encode(), str(path).encode(), params) != 0:
            raise ComputeError(f"{setup.model}: llama.cpp cannot turn it into bfloat16; leave --vs llama_cpp_best out")
        return str(path)


class OpenVino:
    """OpenVINO GenAI on the CPU, which reads the same file; ``plan`` means nothing to it.

    Its prefix cache is off, since each prompt is to be read as if for the first time, so it is asked no further
    questions: ``further_s`` stays empty. Prompts go in as one piece; keys and values are as it likes them (8 bits).
    """

    def __init__(self, setup: Setup) -> None:
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching, scheduler.max_num_batched_tokens = False, setup.ctx
        self._llm = openvino_genai.LLMPipeline(
            setup.model, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=setup.threads
        )

    def measure(
        self, ids: Sequence[int], decode_tokens: int, plan: str, further: Sequence[Sequence[int]] = ()
    ) -> Measurement:
        import numpy as np
        import openvino
        import openvino_genai

        row = np.array([ids], np.int64)
        prompt = openvino_genai.TokenizedInputs(openvino.Tensor(row), openvino.Tensor(np.ones_like(row)))
        settings = openvino_genai.GenerationConfig(max_new_tokens=decode_tokens + 1, do_sample=False, ignore_eos=True)
        _reset_peak()
        done = self._llm.generate(prompt, settings)
        ttft, between = (one.mean / 1000 for one in (done.perf_metrics.get_ttft(), done.perf_metrics.get_tpot()))
        return Measurement(ttft, 1 / between if decode_tokens else 0.0, _peak(), int(done.tokens[0][0]))

    def about(self) -> dict[str, Any]:
        import openvino_genai

        return {"openvino_genai": openvino_genai.__version__}


_CONTENDERS: dict[str, tuple[str, str, Callable[[Setup], Contender]]] = {
    "slimrt": ("slimrt", "slimrt", Slimrt),
    "llama_cpp": ("llama_cpp", "llama-cpp-python", LlamaCpp),
    "llama_cpp_best": ("llama_cpp", "llama-cpp-python", LlamaCppBest),
    "openvino": ("openvino_genai", "openvino-genai", OpenVino),
}


def check_installed(name: str) -> None:
    """Raises SettingError if there is no contender ``name``, or its package is not installed."""
    if name not in _CONTENDERS:
        known = ", ".join(other for other in _CONTENDERS if other != "slimrt")
        raise SettingError(f"--vs {name!r}: not a known program; slimrt can be measured against {known}")
    module, package, _ = _CONTENDERS[name]
    if importlib.util.find_spec(module) is None:
        raise SettingError(f"--vs {name}: {package} is not installed; run 'pip install {package}', or leave --vs out")


def open_contender(name: str, setup: Setup) -> Contender:
    """Load the model of ``setup`` in the program ``name``."""
    return _CONTENDERS[name][2](setup)


def _reset_peak() -> None:
    """Let the peak of resident memory begin again, where the system can (Linux 4.0)."""
    if os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Bytes of resident memory at its highest; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
