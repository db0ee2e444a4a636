"""The tiny checkpoints of tests/goldens/convert, and folders changed on purpose."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

GOLDENS = Path(__file__).parent / "goldens" / "convert"
HF_FOLDERS = sorted(path.name for path in GOLDENS.glob("hf-*"))
ALL_FOLDERS = [*HF_FOLDERS, "meta-one", "meta-two"]


def checkpoint(name: str) -> Path:
    """The folder to convert; ``meta-one`` keeps its weights one level below its tokenizer."""
    return GOLDENS / name / "weights" if name == "meta-one" else GOLDENS / name


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; the value ``...`` removes one."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_safetensors(path: Path, header: dict[str, Any] | str, data: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def bf16_to_f32(raw: bytes, shape: list[int]) -> np.ndarray:
    return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
