"""The parameters that are trained: one value that the model, the optimizer, saves and loads use.

Names are those of a checkpoint, with the global number of the layer: decoder.layers.31.mlp.linear_fc2.weight, in every layout.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_ft.errors import ConfigError
from megatron_ft.models.architecture import Architecture

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module, Parameter

    from megatron_ft.models.weights import Placed

_LAYER = re.compile(r"^(decoder\.layers\.)(\d+)(?=\.)")


@dataclass(frozen=True)
class Trainable:
    """Parameters whose name holds a match of one of the regular expressions are trained; without any expression all are."""

    patterns: tuple[str, ...] = ()

    def __contains__(self, name: str) -> bool:
        return not self.patterns or any(re.search(pattern, name) for pattern in self.patterns)

    def freeze_others(self, chunk: Module) -> None:
        """Freeze the other parameters in a chunk of a stage, before the engine's wrappers allocate gradient buffers."""
        for name, parameter in named_parameters(chunk):
            if name not in self:
                parameter.requires_grad_(False)
        embedding = getattr(chunk, "embedding", None)
        if embedding is not None and not _is_trained(embedding) and _needs_gradients(chunk):
            embedding.register_forward_hook(_ask_for_gradients)


ALL = Trainable()


def _is_trained(module: Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _needs_gradients(chunk: Any) -> bool:
    """Return whether the layers' input has to require gradients. Recomputed layers compute some only if it does, and a stage that
    trains nothing is asked for them too. Elsewhere they would be computed down to the embedding for nothing.
    """
    return chunk.config.recompute_granularity is not None or not _is_trained(chunk)


def _ask_for_gradients(_module: Module, _args: Any, output: Tensor) -> None:
    import torch

    if torch.is_grad_enabled():
        output.requires_grad_()


def global_name(chunk: Module, name: str) -> str:
    """Return the name in a checkpoint of what a chunk of a stage calls by its own number of the layer."""
    found = _LAYER.match(name)
    if not found:
        return name
    decoder: Any = chunk.decoder
    number = decoder.layers[int(found[2])].layer_number - 1
    return f"{found[1]}{number}{name[found.end() :]}"


def named_parameters(chunk: Module) -> Iterator[tuple[str, Parameter]]:
    """Yield (name in a checkpoint, parameter) of a bare chunk."""
    for name, parameter in chunk.named_parameters():
        yield global_name(chunk, name), parameter


def count(arch: Architecture, trainable: Trainable) -> tuple[int, int]:
    """Return (parameters that are trained, all parameters) of the whole model, without vocabulary padding."""
    sizes = {placed.key: math.prod(placed.rule.full_shape(arch)) for placed in _placed(arch)}
    return sum(size for name, size in sizes.items() if name in trainable), sum(sizes.values())


def _placed(arch: Architecture) -> list[Placed]:
    from megatron_ft.models.families import family_of
    from megatron_ft.models.weights import placed_rules

    return list(placed_rules(arch, family_of(arch).rules(arch)))


def check_patterns(patterns: Sequence[str], arch: Architecture) -> None:
    """Raise ConfigError for what is no regular expression, and for one that no parameter of the model matches."""
    names = [placed.key for placed in _placed(arch)] if patterns else []
    for pattern in patterns:
        try:
            matches = re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"--unfrozen_parameters {pattern}: not a regular expression ({error})") from error
        if not any(matches.search(name) for name in names):
            raise ConfigError(
                f"--unfrozen_parameters {pattern}: no parameter has such a name; names are like {names[0]} and {names[-2]}"
            )
