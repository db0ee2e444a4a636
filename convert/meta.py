"""Meta's original folders: params.json, consolidated.NN.pth, tokenizer.model (github.com/meta-llama/llama-models).

The projections are already in the layout of GGUF's llama architecture (RoPE turns neighbouring rows), so nothing is
permuted. Several files hold slices of every matrix (model parallelism), along the axis that makes the shapes fit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from slimrt.convert.checkpoint import StoredTensor, concatenate, read_json
from slimrt.convert.hyperparameters import Hyperparameters, RopeScaling, flag, number, whole
from slimrt.convert.pth_reader import read_pth
from slimrt.convert.ranks import from_tiktoken, is_tiktoken
from slimrt.convert.source import Source, SourceTensor, check_complete, check_layers, gguf_names
from slimrt.convert.vocabulary import Vocabulary, from_sentencepiece
from slimrt.errors import ModelFileError

__all__ = ["open_meta"]

_SHARD_NAME = re.compile(r"consolidated\.(\d{2})\.pth$")


def open_meta(folder: Path) -> Source:
    """Read parameters, tensor descriptions and vocabulary; no weights yet.

    Raises ModelFileError or TokenizerError for anything unknown, missing or contradictory.
    """
    shards = [read_pth(path) for path in _shard_paths(folder)]
    parts = _collect(shards, folder)
    sizes = _read_params(folder, parts)
    named = {gguf: parts[name] for gguf, name in gguf_names(list(parts), "llama", sizes.n_layers, folder).items()}
    expected = sizes.shapes()
    shapes, tensors = {}, {}
    for name, stored in named.items():
        stored, shape, axis = _fit(stored, expected.get(name))
        shapes[name] = shape
        tensors[name] = SourceTensor(concatenate(stored, axis), f"{stored[0].path}: tensor '{stored[0].name}'")
    check_complete(shapes, sizes, folder)
    return Source(folder, sizes, tensors, _read_vocabulary(folder, sizes.vocab_size))


def _shard_paths(folder: Path) -> list[Path]:
    numbers = sorted(int(match[1]) for path in folder.iterdir() if (match := _SHARD_NAME.match(path.name)))
    if not numbers:
        raise ModelFileError(
            f"{folder}: params.json without consolidated.00.pth; both belong to a checkpoint; fetch the whole folder"
        )
    missing = sorted(set(range(numbers[-1] + 1)) - set(numbers))
    if missing:
        raise ModelFileError(
            f"{folder}: consolidated.{missing[0]:02d}.pth is missing; shards are numbered from 00; fetch the whole "
            "folder"
        )
    return [folder / f"consolidated.{number:02d}.pth" for number in numbers]


def _collect(shards: Sequence[dict[str, StoredTensor]], folder: Path) -> dict[str, list[StoredTensor]]:
    first = shards[0]
    for shard in shards[1:]:
        if odd := sorted(first.keys() ^ shard.keys()):
            raise ModelFileError(
                f"{folder}: tensor '{odd[0][:80]}' is not in every shard; shards hold slices of the same tensors; "
                "fetch them again"
            )
    return {name: [shard[name] for shard in shards] for name in first}


def _fit(
    parts: list[StoredTensor], expected: tuple[int, ...] | None
) -> tuple[list[StoredTensor], tuple[int, ...], int]:
    """The parts to join, the shape that gives, and the axis; a tensor that every shard has whole is taken once."""
    shape = parts[0].shape
    if shape == expected or len(parts) == 1:
        return parts[:1], shape, 0
    for axis in range(min(len(shape), 2)):
        same_otherwise = all(
            part.shape[:axis] + part.shape[axis + 1 :] == shape[:axis] + shape[axis + 1 :] for part in parts
        )
        joined = (*shape[:axis], sum(part.shape[axis] for part in parts if len(part.shape) > axis), *shape[axis + 1 :])
        if same_otherwise and joined == expected:
            return parts, joined, axis
    return parts[:1], shape, 0  # does not fit: check_complete says what was expected


def _read_params(folder: Path, parts: dict[str, list[StoredTensor]]) -> Hyperparameters:
    path = folder / "params.json"
    params = read_json(path)
    d_model, n_heads, n_layers = (whole(params, key, path) for key in ("dim", "n_heads", "n_layers"))
    check_layers(n_layers, len(parts), path)
    if d_model % n_heads:
        raise ModelFileError(f"{path}: width {d_model} does not divide into {n_heads} heads; fetch the file again")
    if "layers.0.feed_forward.w1.weight" not in parts or "tok_embeddings.weight" not in parts:
        raise ModelFileError(
            f"{folder}: no feed_forward.w1 or tok_embeddings; a dense LLaMA 1 to 3 has both; other models cannot "
            "be converted"
        )
    base = number(params, "rope_theta", path, 1.0001, 1e12, 10000.0)
    scaled = flag(params, "use_scaled_rope", path)
    vocab_size = whole(params, "vocab_size", path, -1, -1)
    if vocab_size < 1:
        # LLaMA 1 and 2 leave it to the tokenizer; the embedding is split by columns there and by rows in LLaMA 3.
        embedding = parts["tok_embeddings.weight"]
        vocab_size = (
            embedding[0].shape[0] if embedding[0].shape[-1] != d_model else sum(part.shape[0] for part in embedding)
        )
    eps = number(params, "norm_eps", path, 1e-12, 0.1, 1e-5)
    sizes = Hyperparameters(
        arch="llama",
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=whole(params, "n_kv_heads", path, default=n_heads),
        head_dim=d_model // n_heads,
        explicit_head_dim=False,
        d_ff=sum(part.shape[0] for part in parts["layers.0.feed_forward.w1.weight"]),
        vocab_size=vocab_size,
        ctx_train=_training_context(base, scaled, eps),
        norm_eps=eps,
        rope_base=base,
        # The figures of llama-models' apply_scaling, which params.json only switches on.
        rope_scaling=RopeScaling("llama3", 8.0, 8192, 1.0, 4.0) if scaled else None,
        tied="output.weight" not in parts,
    )
    sizes.check(path)
    return sizes


def _training_context(base: float, scaled: bool, eps: float) -> int:
    """The context of the release: 3.1 scales RoPE, 3 and Code Llama have other bases, 2 another epsilon than 1.

    params.json does not state it.
    """
    if scaled:
        return 131072
    if base == 500000.0:
        return 8192
    if base == 1000000.0:
        return 16384
    return 4096 if eps == 1e-5 else 2048


def _read_vocabulary(folder: Path, size: int) -> Vocabulary:
    path = next(
        (place / "tokenizer.model" for place in (folder, folder.parent) if (place / "tokenizer.model").exists()), None
    )
    if path is None:
        raise ModelFileError(
            f"{folder}: no tokenizer.model there or in the parent folder; a GGUF file carries its vocabulary; fetch it"
        )
    vocabulary = from_tiktoken(path, size) if is_tiktoken(path) else from_sentencepiece(path)
    vocabulary.resize(size, path)
    vocabulary.find_turn_ends()
    return vocabulary
