"""Safetensors files: the checked header, the tensors left on disk.

The format is a 64-bit length, that much JSON, then the data (https://github.com/huggingface/safetensors#format). The
``safetensors`` package is the reference in the tests but not the reader here: its NumPy side refuses bfloat16 and hands
out whole tensors, where conversion wants rows.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from slimrt.convert.checkpoint import FLOAT_TYPES, STORED_TYPES, StoredTensor, check_regular, parse_json, read_json
from slimrt.errors import ModelFileError

__all__ = ["read_safetensors", "read_safetensors_folder"]

_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
_PACKED = ("_blocks", "_scales")  # names of MXFP4's bytes end so
_SHARD_NAME = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors$")


def read_safetensors_folder(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint in one or many shards, by name.

    Raises ModelFileError for a missing shard, a tensor in two shards, or one that the index
    promises and no shard holds.
    """
    index_path = folder / "model.safetensors.index.json"
    promised: dict[str, str] = {}
    if index_path.exists():
        promised = _weight_map(index_path)
        shards = [folder / name for name in sorted(set(promised.values()))]
    else:
        shards = _shards_without_index(folder)
    missing = [shard.name for shard in shards if not shard.exists()]
    if missing:
        raise ModelFileError(
            f"{folder}: {len(missing)} of {len(shards)} shards are missing (first: {missing[0]}); fetch the whole "
            "folder"
        )
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for name, tensor in read_safetensors(shard).items():
            if name in tensors:
                raise ModelFileError(
                    f"{shard}: tensor '{name}' is in {tensors[name].path.name} too; names are unique; fetch both again"
                )
            tensors[name] = tensor
    for name, shard_name in promised.items():
        if name not in tensors or tensors[name].path.name != shard_name:
            raise ModelFileError(
                f"{index_path}: tensor '{name[:80]}' should be in {shard_name} and is not; fetch both files again"
            )
    return tensors


def _weight_map(index_path: Path) -> dict[str, str]:
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(
            f"{index_path}: 'weight_map' is missing or empty; it names the shard of every tensor; fetch it again"
        )
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelFileError(
                f"{index_path}: shard {str(shard)[:80]!r} must be the plain name of a .safetensors file; fetch it again"
            )
    return weight_map


def _shards_without_index(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    numbered = [match for path in folder.glob("model-*.safetensors") if (match := _SHARD_NAME.match(path.name))]
    if numbered:
        count = int(numbered[0][2])
        return [folder / f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    raise ModelFileError(
        f"{folder}: no model.safetensors and no model.safetensors.index.json; weights must be in the safetensors "
        "format; "
        "fetch those files, or save the model with safe_serialization=True"
    )


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name; raises ModelFileError if header and size do not fit each other exactly."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise ModelFileError(
                    f"{path}: {size} bytes, and the header should have {length}; the file is truncated or not "
                    "safetensors; fetch it again"
                )
            raw = file.read(length)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from None
    header = parse_json(raw, f"{path}: the header", object_pairs_hook=_unique_keys)
    if not isinstance(header, dict):
        raise ModelFileError(f"{path}: the header is not a JSON object; the file is corrupt; fetch it again")
    header.pop("__metadata__", None)
    return {name: _tensor(path, name, entry, 8 + length, size) for name, entry in header.items()}


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(name for name in names if names.count(name) > 1)}' occurs twice")
    return entries


def _tensor(path: Path, name: str, entry: Any, start: int, size: int) -> StoredTensor:
    label = f"{path}: tensor '{name[:80]}'"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ModelFileError(f"{label} lacks dtype, shape or data_offsets; the file is corrupt; fetch it again")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    known = STORED_TYPES if name.endswith(_PACKED) else FLOAT_TYPES
    if not isinstance(kind, str) or kind not in known:
        raise ModelFileError(
            f"{label} has type {str(kind)[:20]}; {', '.join(FLOAT_TYPES)} can be converted; fetch the unquantised "
            "checkpoint"
        )
    if (
        not _naturals(shape)
        or not _naturals(offsets)
        or len(offsets) != 2
        or not 1 <= len(shape) <= 4
        or min(shape) < 1
    ):
        raise ModelFileError(
            f"{label} has shape {str(shape)[:60]} at {str(offsets)[:60]}; the file is corrupt; fetch it again"
        )
    begin, end = offsets
    if end - begin != math.prod(shape) * STORED_TYPES[kind].itemsize or start + end > size:
        raise ModelFileError(
            f"{label} ({kind} {tuple(shape)}) claims bytes {begin} to {end} of {size - start}; they must hold it "
            "exactly; "
            "the file is truncated or corrupt; fetch it again"
        )
    return StoredTensor(path, name, kind, tuple(shape), start + begin, math.prod(shape[1:]))


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
