"""Which prune plan a model runs with: the one beside it, the one shipped for it, or none."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from slimrt.config import ModelConfig
from slimrt.errors import SettingError
from slimrt.paths import user_path
from slimrt.prune.asked import ASKED
from slimrt.prune.plan import PrunePlan, Stage, check_plan, read_plan_file
from slimrt.weights.gguf import GGUFFile
from slimrt.weights.quants import dequantize

__all__ = ["PRESETS", "PlanChoice", "choose_plan", "fingerprint", "preset_path"]

PRESETS = ("auto", "fast")


@dataclass(frozen=True)
class PlanChoice:
    """A plan (None: dense) and where it comes from, in words for the user. ``preset``: its name, if it is one."""

    plan: PrunePlan | None
    source: str
    preset: str = ""

    @property
    def lasting(self) -> PrunePlan | None:
        """The plan for a conversation, of which further questions are to be expected.

        After a cut each of them computes the pruned stages again, which from the fourth or so costs more than the cut
        had saved. So "auto" keeps its windows there and cuts nothing; "fast" and plans of one's own stay as they are.
        """
        if self.preset != "auto" or self.plan is None:
            return self.plan
        plan = self.plan.without_cuts
        return None if plan.does_nothing else plan


def fingerprint(file: GGUFFile, config: ModelConfig, adapters: str = "") -> dict[str, Any]:
    """What a plan must share with the model that it was calibrated on: the sizes, and the training that made it.

    "norms" is the SHA-256 of the weights of all norms, by name, in float32. Files of every type of quantisation keep
    them as they were trained, so a model has one in all its files; models of the same sizes have others. "adapters" is
    there where some are applied (``Engine.adapters``).
    """
    digest = hashlib.sha256()
    for name in sorted(file.tensors):
        if name.endswith("norm.weight"):
            digest.update(name.encode() + np.ascontiguousarray(dequantize(file.tensors[name]), "<f4").tobytes())
    return _sizes(config) | {"norms": digest.hexdigest()} | ({"adapters": adapters} if adapters else {})


def _sizes(config: ModelConfig) -> dict[str, Any]:
    return {
        "arch": config.arch,
        "n_layers": config.n_layers,
        "d_model": config.d_model,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "vocab_size": config.vocab_size,
    }


def preset_path(model: Path) -> Path:
    """Where the presets of a model file are looked for."""
    return model.with_name(model.name.removesuffix(".gguf") + ".slim.json")


def choose_plan(
    spec: PrunePlan | str | Path, file: GGUFFile, config: ModelConfig, adapters: str = ""
) -> PlanChoice:  # fmt: skip
    """``spec``: "off", a preset ("auto", "fast"), a plan, or a path to one (a plan, or a presets file: its "auto").

    Presets of the model itself serve it under ``adapters`` (``Engine.adapters``) as well; those that were calibrated
    under adapters serve under the same ones only.

    Raises SettingError for a plan that does not fit the model, or a file that is not a plan.
    """
    if isinstance(spec, PrunePlan):
        check_plan(spec, config)
        return PlanChoice(None if spec.does_nothing else spec, "given")
    if spec == "off":
        return PlanChoice(None, "off: dense")
    if not isinstance(spec, (str, Path)):
        raise SettingError(f"prune {spec!r}: must be off, {', '.join(PRESETS)}, a plan's file or a PrunePlan")
    if isinstance(spec, Path) or spec not in PRESETS:
        path = user_path(spec)
        if not path.exists():
            raise SettingError(
                f"prune '{spec}': must be off, {', '.join(PRESETS)} or a plan's file; there is no such file"
            )
        data = read_plan_file(path)
        own = fingerprint(file, config, adapters)
        plan = _preset(data, "auto", path, own, config) if "presets" in data else PrunePlan.from_dict(data)
        check_plan(plan, config)
        return PlanChoice(None if plan.does_nothing else plan, str(path))
    beside = preset_path(file.path)
    if beside.exists():
        return PlanChoice(
            _preset(read_plan_file(beside), spec, beside, fingerprint(file, config, adapters), config),
            f"'{spec}' of {beside.name}",
            spec,
        )
    like = ""
    for shipped in sorted(resources.files("slimrt.plans").iterdir(), key=lambda entry: entry.name):
        if shipped.name.endswith(".slim.json"):
            data = json.loads(shipped.read_text())
            if data["model"] == fingerprint(file, config):
                plan = _preset(data, spec, Path(shipped.name), data["model"], config)
                return PlanChoice(plan, f"'{spec}' shipped for this model", spec)
            if {**data["model"], "norms": ""} == {**_sizes(config), "norms": ""}:
                like = f" (it has the sizes of {shipped.name.removesuffix('.slim.json')}, but not its weights)"
    none = f"'{spec}': no plan is calibrated for this model{like}"
    if spec == "auto":
        return PlanChoice(None, f"{none}, prompts run dense (slimrt calibrate finds one)")
    return PlanChoice(_cautious(config), f"{none}, cautious default (slimrt calibrate finds a faster one)")


def _cautious(config: ModelConfig) -> PrunePlan | None:
    """Half of the tokens after three quarters of the layers, or the nearest layer that sees everything; None for a
    model too shallow for that."""
    wanted = round(0.75 * config.n_layers)
    layers = [layer for layer in config.sees_all() if 1 <= layer < config.n_layers - 1]
    if wanted >= config.n_layers - 1 or not layers:
        return None
    layer = min(layers, key=lambda one: (abs(one - wanted), one))
    return PrunePlan(stages=(Stage(layer, 0.5),), score=ASKED, min_tokens=1024)


def _preset(data: dict[str, Any], name: str, path: Path, own: dict[str, Any], config: ModelConfig) -> PrunePlan:
    made_on, plain = data.get("model"), {key: value for key, value in own.items() if key != "adapters"}
    if made_on not in (own, plain):
        if isinstance(made_on, dict) and {key: made_on[key] for key in made_on if key != "adapters"} == plain:
            raise SettingError(
                f"{path}: calibrated under adapters that are not applied now; apply them with their scales, or run "
                "slimrt calibrate again"
            )
        raise SettingError(
            f"{path}: calibrated on another model ({made_on}); this one is {own}; "
            "run slimrt calibrate again or remove the file"
        )
    try:
        plan = PrunePlan.from_dict(data["presets"][name]["plan"])
    except (KeyError, TypeError) as error:
        raise SettingError(
            f"{path}: has no preset '{name}' ({error}); run slimrt calibrate again or remove the file"
        ) from None
    check_plan(plan, config)
    return plan
