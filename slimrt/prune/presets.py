"""Which prune plan a model runs with: the one beside it, the one shipped for it, or none."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from slimrt.config import ModelConfig
from slimrt.errors import SettingError
from slimrt.paths import user_path
from slimrt.prune.plan import PrunePlan, Stage, check_plan, read_plan_file

__all__ = ["PRESETS", "PlanChoice", "choose_plan", "fingerprint", "preset_path"]

PRESETS = ("auto", "fast")


@dataclass(frozen=True)
class PlanChoice:
    """A plan (None: dense) and where it comes from, in words for the user."""

    plan: PrunePlan | None
    source: str


def fingerprint(config: ModelConfig) -> dict[str, Any]:
    """What a plan must share with the model that it was calibrated on."""
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


def choose_plan(spec: PrunePlan | str | Path, model: Path, config: ModelConfig) -> PlanChoice:
    """``spec``: "off", a preset ("auto", "fast"), a plan, or a path to one (a plan, or a presets file: its "auto").

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
        plan = _preset(data, "auto", path, config) if "presets" in data else PrunePlan.from_dict(data)
        check_plan(plan, config)
        return PlanChoice(None if plan.does_nothing else plan, str(path))
    beside = preset_path(model)
    if beside.exists():
        return PlanChoice(_preset(read_plan_file(beside), spec, beside, config), f"'{spec}' of {beside.name}")
    for shipped in sorted(resources.files("slimrt.plans").iterdir(), key=lambda entry: entry.name):
        if shipped.name.endswith(".slim.json"):
            data = json.loads(shipped.read_text())
            if data["model"] == fingerprint(config):
                return PlanChoice(_preset(data, spec, Path(shipped.name), config), f"'{spec}' shipped for this model")
    if spec == "auto":
        return PlanChoice(
            None, "'auto': no plan is calibrated for this model, prompts run dense (slimrt calibrate finds one)"
        )
    return PlanChoice(
        _cautious(config),
        f"'{spec}': no plan is calibrated for this model, cautious default (slimrt calibrate finds a faster one)",
    )


def _cautious(config: ModelConfig) -> PrunePlan | None:
    """Half of the tokens after three quarters of the layers, or None for a model too shallow for that."""
    layer = round(0.75 * config.n_layers)
    if layer >= config.n_layers - 1:
        return None
    return PrunePlan(stages=(Stage(layer, 0.5),), min_tokens=1024)


def _preset(data: dict[str, Any], name: str, path: Path, config: ModelConfig) -> PrunePlan:
    if data.get("model") != fingerprint(config):
        raise SettingError(
            f"{path}: calibrated on another model ({data.get('model')}); this one is {fingerprint(config)}; "
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
