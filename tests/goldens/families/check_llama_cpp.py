"""Files go both ways between slimrt and llama.cpp: by hand, in four steps and one more, from the repository's root.

    python -m tests.goldens.families.check_llama_cpp write FOLDER      slimrt's environment: checkpoints, slimrt's files
    python -m tests.goldens.families.check_llama_cpp convert FOLDER LLAMA_CPP    llama-cpp-python's: llama.cpp's files
    python -m tests.goldens.families.check_llama_cpp read FOLDER       llama-cpp-python's: llama.cpp's logits of both
    python -m tests.goldens.families.check_llama_cpp compare FOLDER    slimrt's: its own logits of both, and a table
    python -m tests.goldens.families.check_llama_cpp spread FOLDER CASE    both in one: KL by prompt

LLAMA_CPP: the sources that llama-cpp-python 0.3.36 carries. ``convert`` and ``read`` run in an environment with torch
2.13.0, transformers 5.24.0 and llama-cpp-python. Pre-tokenizers are named by hand, as in ``convert/make_reference.py``,
and every vocabulary is read as byte pairs: what is compared are logits. The table has the largest differences to
Transformers in float64 over both prompts, and of llama.cpp, whose products round activations, to slimrt. A second table
has the mean KL divergence to NumPy's float32 over the long prompt, read in one piece and token by token, of slimrt's
compiled kernels and of llama.cpp, on slimrt's file in float32 and in Q8_0. ``spread`` has the same of Q8_0, token by
token, over that prompt and eight random ones.
"""

from __future__ import annotations

import sys
from functools import partialmethod
from pathlib import Path

import numpy as np

from tests.families import CASES, GOLDENS, V, prompts, write_checkpoint

CTX = 128  # Phi's long factors are taken by the context: the short prompt is compared with the others


def write(folder: Path) -> None:
    from slimrt.convert import convert_checkpoint

    for name in CASES:
        checkpoint = write_checkpoint(name, _checkpoint(folder, name))
        for kind, maker in (("f32", "slimrt"), ("q8_0", "q8_0")):
            convert_checkpoint(checkpoint, folder / f"{name}.{maker}.gguf", kind, force=True)


def _checkpoint(folder: Path, name: str) -> Path:
    """Its folder, which names the model: of one called phi3 llama.cpp expects Phi-3's control tokens."""
    return folder / name.replace("phi3", "phi")


def convert(folder: Path, sources: str) -> None:
    sys.path += [sources, f"{sources}/gguf-py"]
    import convert_hf_to_gguf
    from conversion import gemma, phi  # noqa: F401  # whose classes set_vocab is replaced in
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = partialmethod(lambda self, name, tokenizer: name, "qwen2")
    for model in (TextModel, *_below(TextModel)):
        model.set_vocab = TextModel._set_vocab_gpt2
    for name in CASES:
        target = folder / f"{name}.llama_cpp.gguf"
        sys.argv = [
            "convert_hf_to_gguf.py",
            str(_checkpoint(folder, name)),
            "--outtype",
            "f32",
            "--outfile",
            str(target),
        ]
        try:
            convert_hf_to_gguf.main()
        except (Exception, SystemExit) as error:  # it leaves the process for a model that it does not know
            print(f"{name}: llama.cpp's converter: {error!r}")


def _below(model: type) -> list[type]:
    return [one for child in model.__subclasses__() for one in (child, *_below(child))]


def read(folder: Path) -> None:
    import llama_cpp

    found = {}
    for path in sorted(folder.glob("*.gguf")):
        try:
            llm = llama_cpp.Llama(str(path), n_ctx=CTX, n_threads=1, logits_all=False, verbose=False)
        except Exception as error:
            print(f"{path.name}: llama.cpp: {error!r}")
            continue
        for i, ids in enumerate(prompts()):
            llm.reset()
            llm.eval(ids)
            pointer = llama_cpp.llama_get_logits(llm.ctx)
            found[f"{path.stem}/{i}"] = np.ctypeslib.as_array(pointer, shape=(llm.n_vocab(),)).copy()
        llm.close()
        if path.stem.endswith(".llama_cpp"):
            continue
        llm = llama_cpp.Llama(str(path), n_ctx=CTX, n_threads=1, logits_all=True, verbose=False)
        llm.eval(prompts()[0])
        found[f"{path.stem}/prefill"] = llm.scores[: len(prompts()[0])].copy()
        llm.reset()
        for id in prompts()[0]:
            llm.eval([id])
        found[f"{path.stem}/decode"] = llm.scores[: len(prompts()[0])].copy()
        llm.close()
    np.savez(folder / "llama_cpp.npz", **found)


def compare(folder: Path) -> None:
    from slimrt.config import CacheConfig
    from slimrt.engine import Engine
    from slimrt.models import build, read_config, stretch_rope
    from slimrt.ops.numpy.numpy_ops import NumpyOps
    from slimrt.session import Session
    from slimrt.weights.gguf import GGUFFile

    exact = np.load(GOLDENS / "families" / "logits.npz")
    theirs = dict(np.load(folder / "llama_cpp.npz")) if (folder / "llama_cpp.npz").exists() else {}
    print(f"{'case':14}{'float32':>10}{'file by slimrt':>28}{'file by llama.cpp':>28}")
    print(f"{'':14}{'errs by':>10}{'slimrt':>14}{'llama.cpp':>14}{'slimrt':>14}{'llama.cpp':>14}")
    for name in CASES:
        cells = [f"{max(exact[f'{name}/error0'], exact[f'{name}/error1']):.1e}"]
        for maker in ("slimrt", "llama_cpp"):
            path = folder / f"{name}.{maker}.gguf"
            if not path.exists():
                cells += ["-", "-"]
                continue
            file, ops, ours, other = GGUFFile(path), NumpyOps(1), 0.0, 0.0
            config = stretch_rope(read_config(file), CTX)
            for i, ids in enumerate(prompts()):
                if max(ids) >= config.vocab_size:  # llama.cpp cuts Gemma 3's embedding to the vocabulary
                    continue
                session = Session(Engine(build(config, file, ops), ops, CacheConfig(CTX)), CTX)
                session.prefill(ids)
                assert session.logits is not None
                n = min(V, len(session.logits))
                if name != "phi3-long" or i == 0:
                    ours = max(ours, np.abs(session.logits[:n] - exact[f"{name}/{i}"][:n]).max())
                if (logits := theirs.get(f"{name}.{maker}/{i}")) is not None:
                    other = max(other, np.abs(session.logits[:n] - logits[:n]).max())
            cells += [f"{ours:.1e}", f"{other:.1e}" if f"{name}.{maker}/0" in theirs else "-"]
        print(f"{name:14}{cells[0]:>10}" + "".join(f"{cell:>14}" for cell in cells[1:]))
    _divergences(folder, theirs)


def _divergences(folder: Path, theirs: dict[str, np.ndarray]) -> None:
    from slimrt.config import CacheConfig
    from slimrt.engine import Engine
    from slimrt.eval.metrics import kl
    from slimrt.models import build, read_config, stretch_rope
    from slimrt.ops.fast.fast_ops import FastOps
    from slimrt.ops.numpy.numpy_ops import NumpyOps
    from slimrt.weights.gguf import GGUFFile

    ids = prompts()[0]

    def prefilled(engine: Engine) -> np.ndarray:
        return engine.logits(engine.prefill(engine.new_context(), ids, wanted=len(ids))[0])

    def decoded(engine: Engine) -> np.ndarray:
        context = engine.new_context()
        return np.stack([engine.decode_one_token(context, id) for id in ids])

    print(f"\n{'mean KL':14}" + "".join(f"{kind:>30}" for kind in ("float32", "Q8_0")))
    print(f"{'':14}" + f"{'prefill':>16}{'decode':>14}" * 2 + "   slimrt / llama.cpp")
    for name in CASES:
        cells = []
        for maker in ("slimrt", "q8_0"):
            file = GGUFFile(folder / f"{name}.{maker}.gguf")
            config = stretch_rope(read_config(file), CTX)
            engines = [Engine(build(config, file, ops), ops, CacheConfig(CTX)) for ops in (NumpyOps(1), FastOps(1))]
            exact = prefilled(engines[0])
            for way, read in (("prefill", prefilled), ("decode", decoded)):
                other = theirs.get(f"{name}.{maker}/{way}")
                ours = kl(exact, read(engines[1])).mean()
                cells.append(f"{ours:.1e}/" + ("-" if other is None else f"{kl(exact, other).mean():.1e}"))
        print(f"{name:14}" + "".join(f"{cell:>17}" for cell in cells))


def spread(folder: Path, name: str) -> None:
    import llama_cpp

    from slimrt.config import CacheConfig
    from slimrt.engine import Engine
    from slimrt.eval.metrics import kl
    from slimrt.models import build, read_config, stretch_rope
    from slimrt.ops.fast.fast_ops import FastOps
    from slimrt.ops.numpy.numpy_ops import NumpyOps
    from slimrt.weights.gguf import GGUFFile

    path, rng = folder / f"{name}.q8_0.gguf", np.random.default_rng(5)
    file = GGUFFile(path)
    config = stretch_rope(read_config(file), CTX)
    plain, fast = (Engine(build(config, file, ops), ops, CacheConfig(CTX)) for ops in (NumpyOps(1), FastOps(1)))
    llm = llama_cpp.Llama(str(path), n_ctx=CTX, n_threads=1, logits_all=True, verbose=False)
    ours, theirs = [], []
    for ids in (prompts()[0], *(rng.integers(3, V - 1, 100).tolist() for _ in range(8))):
        exact = plain.logits(plain.prefill(plain.new_context(), ids, wanted=len(ids))[0])
        context = fast.new_context()
        ours.append(kl(exact, np.stack([fast.decode_one_token(context, id) for id in ids])))
        llm.reset()
        for id in ids:
            llm.eval([id])
        theirs.append(kl(exact, llm.scores[: len(ids), : exact.shape[1]]))
    print(
        f"{name}: slimrt / llama.cpp by prompt",
        *(f"{a.mean() / b.mean():.2f}" for a, b in zip(ours, theirs, strict=True)),
    )
    for what, of in (("mean", np.mean), ("median", np.median), ("largest", np.max)):
        print(f"{what:8}{of(np.concatenate(ours)):10.2e}{of(np.concatenate(theirs)):10.2e}")


if __name__ == "__main__":
    {"write": write, "convert": convert, "read": read, "compare": compare, "spread": spread}[sys.argv[1]](
        Path(sys.argv[2]), *sys.argv[3:]
    )
