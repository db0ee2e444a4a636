"""Why a GGUF file of another kind does not run, in a line with the list of what does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from gguf.constants import MODEL_ARCH_NAMES


class HasMetadata(Protocol):
    """A file as far as it is needed here."""

    @property
    def metadata(self) -> Mapping[str, Any]: ...
    @property
    def path(self) -> Path: ...


__all__ = ["check_architecture_name", "what_it_is"]

_KINDS: dict[str, str] = {
    "a state-space or recurrent model, which has no keys and values to prune": (
        "mamba mamba2 rwkv6 rwkv6qwen2 rwkv7 arwkv7"
    ),
    "a hybrid of attention and recurrent layers": (
        "jamba falcon-h1 plamo2 granitehybrid lfm2 lfm2moe nemotron_h nemotron_h_moe qwen3next kimi-linear kimi-k3 "
        "bailingmoe3 glm5-next qwen35 qwen35moe qwen4exp deepseek4 minimax-01"
    ),
    "an encoder, which makes embeddings and writes no text": (
        "bert modern-bert nomic-bert nomic-bert-moe neo-bert jina-bert-v2 jina-bert-v3 eurobert gemma-embedding "
        "llama-embed t5encoder"
    ),
    "an encoder with a decoder": "t5",
    "the vision or sound part of a model, which does nothing without the file of its language model": "clip",
    "a diffusion language model": "dream llada llada-moe rnd1",
    "a speech model": "whisper wavtokenizer-dec qwen3tts pockettts",
    "a drafting head of another model": "eagle3 dflash gemma4-assistant",
    "a control vector for another model": "controlvector",
    "a model that makes images or video": (
        "flux sd1 sd3 sdxl wan hyvid ltxv lumina2 qwen_image aura cosmos hidream hunyuan_video z_image"
    ),
}
_WHAT = {name: what for what, names in _KINDS.items() for name in names.split()}
_TYPES = {
    "adapter": "a LoRA adapter, which changes another model",
    "mmproj": "the vision or sound part of a model, which does nothing without the file of its language model",
    "imatrix": "an importance matrix, a by-product of quantisation",
    "vocab": "a vocabulary without a model",
}


def what_it_is(file: HasMetadata) -> str | None:
    """What kind of file this is, where its metadata tell that it is no language model of a plain kind; else None."""
    kind, arch = file.metadata.get("general.type"), file.metadata.get("general.architecture")
    if isinstance(kind, str) and kind in _TYPES:
        return _TYPES[kind]
    return _WHAT.get(arch) if isinstance(arch, str) else None


def check_architecture_name(file: HasMetadata, supported: Iterable[str]) -> str | None:
    """Why the file does not run by its kind and architecture, or None; one line with what is ``supported``."""
    kind, arch = what_it_is(file), file.metadata.get("general.architecture")
    names = tuple(supported)
    runs = f"slimrt runs {', '.join(names)}; use a model of one of these"
    if arch is None:
        of = f"{kind}; it names no architecture" if kind else "metadata key 'general.architecture' is missing"
    elif not isinstance(arch, str):
        of = f"metadata key 'general.architecture' is {'an array' if hasattr(arch, '__len__') else arch}"
    elif kind:
        of = f"architecture '{arch[:80]}' is {kind}" if arch in _WHAT else f"{kind} (architecture '{arch[:80]}')"
    elif arch in names:
        return None
    else:
        known = arch in MODEL_ARCH_NAMES.values()
        of = f"architecture '{arch[:80]}'{' is another one' if known else ' is not a known one'}"
    return f"{file.path}: {of}; {runs}"
