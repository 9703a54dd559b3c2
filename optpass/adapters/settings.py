"""What an adapter's configuration says about each module: rank, alpha, rank-stabilised or not.

peft writes it into ``adapter_config.json``, diffusers into the safetensors header under
``COMPONENT.r``, ``COMPONENT.lora_alpha`` …; other layouts have none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optpass.adapters.keys import ModuleKey
from optpass.errors import UserError
from optpass.ir.weights import Expression

KINDS = ("LORA", "LOHA", "LOKR")
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations after which the base model is not the one that was published."""
OPTIONS = (
    *("use_qalora", "use_bdlora", "kasa_config", "alora_invocation_tokens", "layer_replication", "target_parameters"),
    *("monteclora_config", "arrow_config", "velora_config", "trainable_token_indices"),
)
"""peft's options that make a LoRA another function than W + BA."""


@dataclass(frozen=True)
class Settings:
    """Configurations by component; under ``""`` the one for every module. Empty where the file has none."""

    file: Path
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def covers(self, module: ModuleKey) -> bool:
        """Whether there is a configuration for ``module``."""
        return bool(self._of(module))

    def _of(self, module: ModuleKey) -> Mapping[str, Any]:
        return self.configs.get(module.component, self.configs.get("", {}))

    def checked_rank(self, module: ModuleKey, found: int | None, key: str) -> int:
        """The rank of a module: what its factors have, or where these are full matrices, what the configuration says.

        Raises:
            UserError: the configuration says another rank than the factors have.
        """
        config = self._of(module)
        stated = _number(_pattern(config, "rank_pattern", module, config.get("r")), "r", self.file)
        if found is not None and stated is not None and stated != found:
            raise UserError(f"{self.file}: {key!r} has rank {found}, and the adapter's configuration says {stated:g}")
        return found or int(stated or 1)

    def alpha(self, module: ModuleKey, rank: int) -> float:
        """α of a module: the rank where nothing is said."""
        config = self._of(module)
        default = config.get("lora_alpha", config.get("alpha"))
        alpha = _number(_pattern(config, "alpha_pattern", module, default), "lora_alpha", self.file)
        if alpha is None and config:
            raise UserError(f"{self.file}: the adapter's configuration has no alpha for {module}")
        return float(rank) if alpha is None else alpha

    def rank_stabilised(self, module: ModuleKey) -> bool:
        return bool(self._of(module).get("use_rslora"))

    def check_magnitude(self, module: ModuleKey, magnitude: Expression | None, key: str) -> None:
        """
        Raises:
            UserError: the configuration says DoRA, and the module has no magnitude.
        """
        if self._of(module).get("use_dora") and magnitude is None:
            raise UserError(f"{self.file}: {key!r} is half of a pair: use_dora, and there is no lora_magnitude_vector")


def settings_of(config: Mapping[str, Any] | None, metadata: Mapping[str, Any] | None, file: Path) -> Settings:
    """From peft's configuration or diffusers' metadata.

    Raises:
        UserError: it is of a kind, or has an option, that is not merged.
    """
    if config is not None:
        kind = str(config.get("peft_type", "LORA")).upper()
        if kind not in KINDS:
            raise UserError(f"{file.parent} is an adapter of the kind {kind}; merged are {', '.join(KINDS)}")
        _check(config, file)
        return Settings(file, {"": config})
    found: dict[str, dict[str, Any]] = {}
    for key, value in (metadata or {}).items():
        component, _, name = key.partition(".")
        if name:
            found.setdefault(component, {})[name] = value
    for part in found.values():
        _check(part, file)
    return Settings(file, found)


def _check(config: Mapping[str, Any], file: Path) -> None:
    for option in OPTIONS:
        if config.get(option):
            raise UserError(f"{file}: the adapter's configuration has {option}, which is more than W + BA; not merged")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(BASE_CHANGING):
        raise UserError(
            f"{file}: init_lora_weights is {start!r}, which changes the base weights too; save the adapter with "
            "path_initial_model_for_weight_conversion to have it in the ordinary form"
        )


def _pattern(config: Mapping[str, Any], name: str, module: ModuleKey, default: Any) -> Any:
    """peft's rule: the first pattern that matches the path's end, after a dot, as a regular expression."""
    patterns = config.get(name)
    if not isinstance(patterns, Mapping):
        return default
    for pattern, value in patterns.items():
        try:
            if any(re.match(rf"(.*\.)?({pattern})$", path) for path in (module.path, str(module))):
                return value
        except re.error as error:
            raise UserError(f"{name} of the adapter's configuration: {pattern!r} is no pattern: {error}") from None
    return default


def _number(value: Any, name: str, file: Path) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{file}: {name} of the adapter's configuration is {value!r} where a number belongs")
    return float(value)
