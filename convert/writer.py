"""GGUF files written tensor by tensor: header first, then rows in chunks, under a temporary name until complete."""

from __future__ import annotations

import errno
import logging
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quants

from slimrt.convert.checkpoint import Rows
from slimrt.errors import ModelFileError, OutputError
from slimrt.output import whole_or_nothing
from slimrt.weights.kquants import KQUANTS, quantize_k

__all__ = ["OutputTensor", "Progress", "encoded", "write_gguf"]

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
"""Called with (bytes written, bytes in all, name of the tensor being written)."""

_CHUNK_VALUES = 4 << 20  # 16 MiB of float32; quantising takes a few times that
_F16_MAX = 65504.0


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the file: ``encode(start, stop)`` gives the packed bytes of these rows (values, for a vector)."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    encode: Rows

    @property
    def n_rows(self) -> int:
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else self.shape[0]

    @property
    def nbytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * block_bytes


def encoded(
    name: str, rows: Rows, kind: GGMLQuantizationType, source: str, importance: np.ndarray | None = None
) -> Rows:
    """Rows packed as ``kind``; ``source`` names the tensor in errors. ``importance``: see ``quantize_k``.

    Raises ModelFileError for NaN and infinite weights, and for those that float16 (in F16 itself, and in the scales of
    quantised blocks) cannot hold.
    """
    narrow = kind not in (GGMLQuantizationType.F32, GGMLQuantizationType.BF16)

    def encode(start: int, stop: int) -> np.ndarray:
        values = rows(start, stop)
        # NaN survives min and max, so two reductions without a temporary check everything.
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            row = start + int(np.argmin(np.isfinite(values).reshape(stop - start, -1).all(axis=1)))
            raise ModelFileError(
                f"{source}: row {row} holds NaN or infinite weights; a model needs finite ones; the file is "
                "corrupt; fetch it again"
            )
        if narrow and max(-low, high) > _F16_MAX:
            raise ModelFileError(
                f"{source}: a weight of {max(-low, high):g} exceeds what float16 holds ({_F16_MAX:g}), and "
                f"{kind.name} uses it; "
                f"convert {name} as f32 or bf16"
            )
        if kind in KQUANTS:
            return quantize_k(values, kind, importance)
        return np.ascontiguousarray(quants.quantize(values, kind))

    return encode


def write_gguf(
    target: Path,
    arch: str,
    describe: Callable[[GGUFWriter], None],
    tensors: Sequence[OutputTensor],
    progress: Progress | None,
) -> None:
    """Write a complete file to ``target``; memory stays bounded by one chunk of rows.

    ``describe`` adds the metadata. Nothing appears under the final name before every byte is on disk.
    Raises OutputError if the target cannot be written or the disk is full.
    """
    writer = GGUFWriter(None, arch)
    describe(writer)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=tensor.type)
    total = sum(tensor.nbytes for tensor in tensors)
    _check_space(target, total)
    with _told_in_a_line(target), whole_or_nothing(target) as part:
        _write_header(writer, part)
        with part.open("ab") as file:
            done = 0
            for tensor in tensors:
                file.write(bytes(-file.tell() % writer.data_alignment))
                if progress is not None:
                    progress(done, total, tensor.name)
                step = max(1, _CHUNK_VALUES * tensor.n_rows // math.prod(tensor.shape))
                for start in range(0, tensor.n_rows, step):
                    chunk = tensor.encode(start, min(start + step, tensor.n_rows))
                    file.write(chunk.data)
                    done += chunk.nbytes
                    if progress is not None:
                        progress(done, total, tensor.name)
            file.write(bytes(-file.tell() % writer.data_alignment))
            file.flush()
            os.fsync(file.fileno())


def _write_header(writer: GGUFWriter, part: Path) -> None:
    try:
        writer.write_header_to_file(part)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    except (UnicodeEncodeError, TypeError, ValueError, struct.error) as error:
        # Metadata comes from JSON and YAML files: lone surrogates, or a text where a number belongs.
        raise ModelFileError(
            f"the metadata cannot be stored ({str(error)[:100]}); a value has the wrong kind or is not valid Unicode; "
            "mend the tokenizer files, generation_config.json or README.md"
        ) from None
    finally:
        writer.close()


@contextmanager
def _told_in_a_line(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        remedy = "free some space or choose another disk" if full else "check the folder and its permissions"
        raise OutputError(
            f"{target}: cannot be written ({error.strerror}); nothing was left behind; {remedy}"
        ) from None


def _check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise OutputError(
            f"{target}: needs {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB left; free some space or "
            "choose another disk"
        )
