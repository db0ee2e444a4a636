"""LoRA adapters by the files that hold them: each read once, and again when it has changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from slimrt.config import ModelConfig
from slimrt.errors import SettingError
from slimrt.load_options import Adapters
from slimrt.memory.plan import available_memory
from slimrt.models.adapters import Adapter, read_adapter
from slimrt.ops.protocol import Ops
from slimrt.paths import user_path

__all__ = ["AdapterFiles"]


class AdapterFiles:
    """The adapters of a model of ``config`` on ``ops`` that were read."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        self._config, self._ops = config, ops
        self._held: dict[Path, tuple[tuple[int, int], Adapter]] = {}  # with what tells that a file changed

    def read(self, adapters: Adapters) -> list[tuple[Adapter, float]]:
        """The adapters of these files with their scales. Raises as ``LLM.set_adapters`` does."""
        pairs = _pairs(adapters)
        if pairs and self._ops.name == "cuda":
            raise SettingError("lora: adapters are applied on the CPU only; leave them out, or load with device='cpu'")
        found = []
        for given, scale in pairs:
            path = user_path(given)
            version = (0, 0)
            if path.exists():  # else reading it says what is wrong
                status = path.stat()
                version = status.st_mtime_ns, status.st_size
            held, adapter = self._held.get(path, (None, None))
            if adapter is None or held != version:
                adapter = read_adapter(path, self._config, available_memory())
                self._held[path] = version, adapter
            found.append((adapter, scale))
        return found


def _pairs(adapters: Adapters) -> list[tuple[str | Path, float]]:
    """Files with their scales. Raises SettingError for anything but a list of files, or of (file, finite scale)."""
    if isinstance(adapters, (str, bytes, Path)) or not isinstance(adapters, Sequence):
        raise SettingError(f"lora {str(adapters)[:80]!r}: must be a list of files, or of (file, scale)")
    pairs = []
    for one in adapters:
        pair = one if isinstance(one, tuple) else (one, 1.0)
        if len(pair) != 2 or not isinstance(pair[0], (str, Path)):
            raise SettingError(f"adapter {str(one)[:80]!r}: must be a file, or (file, scale)")
        path, scale = pair
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise SettingError(f"adapter {str(path)[:80]}: scale {str(scale)[:40]}; must be a finite number, as 0.5")
        pairs.append((path, float(scale)))
    return pairs
