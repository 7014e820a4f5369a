"""Turns flags of Megatron that are not ours into our settings, once all settings are known (megatron_flags.COMPUTED)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import starmap
from pathlib import Path
from typing import Any

from megatron_ft.config.fields import Option
from megatron_ft.config.megatron_flags import Foreign, Given, foreign
from megatron_ft.errors import ConfigError
from megatron_ft.log import logger

log = logger("config")

_TRACKER = "latest_checkpointed_iteration.txt"
_SETTINGS = "training.yaml"


def apply(given: dict[str, Given], values: dict[str, Any], levels: dict[str, int]) -> dict[str, Any]:
    """Return the settings that follow from foreign flags, and log which flags have no effect.

    values: all settings. levels: 2 or 1 for settings that were given on the command line or in a file. Raise ConfigError.
    """
    computed, sources = _steps_of_run(values), []
    for name, how in _COMPUTED.items():
        if name in given:
            for ours, value in how(name, given[name], {**values, **computed}).items():
                if _wins(name, given[name], ours, value, values, levels):
                    computed[ours] = value
                    sources.append(f"--{name}")
    computed |= _weights_between_prefixes({**values, **computed})
    if values["data_type"] == "instruction" and values["variable_seq_lengths"] and "packing" not in levels:
        computed["packing"] = False  # Megatron-LLM puts one sample in a row
    _log_idle({name: foreign()[name] for name in given})
    if computed:
        log.info(
            f"taken from {', '.join(dict.fromkeys(sources)) or 'what is given'}: {', '.join(starmap(_flag, computed.items()))}"
        )
    return computed


def _wins(name: str, flag: Given, ours: str, value: Any, values: dict[str, Any], levels: dict[str, int]) -> bool:
    """Return whether a computed value replaces that of our flag: the command line wins over a file."""
    level = levels.get(ours, 0)
    if level == flag.level and values.get(ours) != value and name not in _REPLACE:
        raise ConfigError(f"{flag.where} means --{ours} {value}, and --{ours} {values[ours]} is given too: keep one")
    return level <= flag.level


def _log_idle(flags: dict[str, Foreign]) -> None:
    """Log the flags without an effect, in one line."""
    idle: dict[str, list[str]] = {}
    for name, flag in flags.items():
        if flag.fate != "computed":
            idle.setdefault(flag.reason, []).append(f"--{name}")
    if idle:
        groups = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in idle.items())
        log.info(f"accepted, without an effect here: {groups}")


def _flag(name: str, value: Any) -> str:
    """Return a setting as it is written on the command line."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no_{name}"
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def _number(kind: type, flag: Given) -> Any:
    from megatron_ft.config.values import checked, from_text

    option = Option("", kind, None, False, "", object)
    read = from_text if isinstance(flag.value, str) else checked
    return read(option, flag.value, flag.where)


def _positive(kind: type, flag: Given) -> Any:
    value = _number(kind, flag)
    if not value > 0:
        raise ConfigError(f"{flag.where} {value}: must be above 0")
    return value


def _iterations(ours: str) -> Callable[[str, Given, dict[str, Any]], dict[str, Any]]:
    def compute(name: str, flag: Given, values: dict[str, Any]) -> dict[str, Any]:
        samples = _number(int, flag) if ours == "lr_warmup_iters" else _positive(int, flag)
        batch = values["global_batch_size"]
        if batch is None:
            raise ConfigError(
                f"{flag.where} {samples} needs --global_batch_size, to be counted in steps: add it, or give --{ours}"
            )
        steps = samples // batch
        if not steps and samples:
            raise ConfigError(f"{flag.where} {samples} is less than one step of --global_batch_size {batch}: raise it")
        return {ours: steps}

    return compute


def _pretrained(name: str, flag: Given, values: dict[str, Any]) -> dict[str, Any]:
    own = values.get("load")
    if own and (Path(own) / _TRACKER).is_file():
        return {}
    return {"load": str(flag.value), "finetune": True}


def _iteration(name: str, flag: Given, values: dict[str, Any]) -> dict[str, Any]:
    number = _positive(int, flag)
    if not values.get("load"):
        raise ConfigError(f"{flag.where} {number} needs --load, the folder that holds this iteration: add it")
    return {"load": str(Path(values["load"]) / f"iter_{number:07d}")}


def _interpolation(name: str, flag: Given, values: dict[str, Any]) -> dict[str, Any]:
    return {"rope_scaling_type": "linear", "rope_scaling_factor": _positive(float, flag)}


def _tokenizer(name: str, flag: Given, values: dict[str, Any]) -> dict[str, Any]:
    if Path(str(flag.value)).exists():
        return {"vocab_file": str(flag.value)}
    log.info(f"{flag.where} {flag.value}: no such file here, so it is not compared; the tokenizer is the checkpoint's")
    return {}


def _not_loaded(name: str, flag: Given, values: dict[str, Any]) -> dict[str, Any]:
    if not values["finetune"]:
        raise ConfigError(
            f"{flag.where} without --finetune: a resumed run loads everything; add --finetune to load the weights only and "
            f"count steps from 0, or drop it"
        )
    return {}


def _steps_of_run(values: dict[str, Any]) -> dict[str, Any]:
    """Return --train_iters of the run in --load where --use_checkpoint_args asks for it, as Megatron's scripts continue a run."""
    place = Path(values.get("load") or "") / _SETTINGS
    if (
        "train_iters" in values
        or values.get("epochs")
        or not values["use_checkpoint_args"]
        or not values.get("load")
        or not place.is_file()
    ):
        return {}
    import yaml

    try:
        return {"train_iters": int(yaml.safe_load(place.read_text(encoding="utf-8"))["batch"]["train_iters"])}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return {}


def _weights_between_prefixes(values: dict[str, Any]) -> dict[str, Any]:
    """Return prefixes and weights of Megatron's `--data_path 0.3 PREFIX 0.7 PREFIX`; {} where there are only prefixes."""
    words = list(map(str, values.get("data_path", [])))
    weights = [weight for word in words[::2] if (weight := _weight(word)) is not None]
    if not words or len(words) % 2 or len(weights) != len(words) // 2:
        return {}
    return {"data_path": words[1::2], "data_weights": weights}


def _weight(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


_REPLACE = {"pretrained_checkpoint", "load_iters", "ckpt_step"}
"""Flags that change --load, which is given too."""

_COMPUTED: dict[str, Callable[[str, Given, dict[str, Any]], dict[str, Any]]] = {
    "train_samples": _iterations("train_iters"),
    "lr_decay_samples": _iterations("lr_decay_iters"),
    "lr_warmup_samples": _iterations("lr_warmup_iters"),
    "lr_wsd_decay_samples": _iterations("lr_wsd_decay_iters"),
    "pretrained_checkpoint": _pretrained,
    "load_iters": _iteration,
    "ckpt_step": _iteration,
    "rotary_seq_len_interpolation_factor": _interpolation,
    "tokenizer_model": _tokenizer,
    "no_load_optim": _not_loaded,
    "no_load_rng": _not_loaded,
}
"""In the order in which one needs another."""
COMPUTED_ORDER = tuple(_COMPUTED)
