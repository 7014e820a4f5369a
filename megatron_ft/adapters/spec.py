"""What a LoRA adapter is (Hu et al. 2021), as plain data: rank, scale, dropout and the projections it is added to. Without torch.

There is one adapter for each projection of the Hugging Face model, also where megatron-core has several of them in one matrix. So the
weights are those of PEFT, tensor by tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from megatron_ft.config.sections import Adapters
from megatron_ft.errors import CheckpointError, ConfigError
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.families import family_of
from megatron_ft.models.trainable import Trainable

SUFFIX = "_lora"
"""The adapters of self_attention.linear_qkv are in the module self_attention.linear_qkv_lora."""
TRAINED = Trainable((rf"{SUFFIX}\.",))
"""The parameters of adapters."""
BASE = Trainable((rf"^(?!.*{SUFFIX}\.)",))
"""All others."""
DEFAULT_ALPHA = 16.0
_LINEARS = {
    "qkv": "self_attention.linear_qkv",
    "proj": "self_attention.linear_proj",
    "fc1": "mlp.linear_fc1",
    "fc2": "mlp.linear_fc2",
}
"""Name in --lora_target -> the engine's linear within a layer."""
_LAYER = "decoder.layers.{n}."
EMBEDDING, OUTPUT = "embedding.word_embeddings", "output_layer"
"""The tables with a row for each token."""


def rows_key(table: str) -> str:
    """Return the name in a checkpoint of the trained rows of a table."""
    return f"{table}{SUFFIX}.rows"


def tables(arch: Architecture) -> dict[str, str]:
    """Return the tables of a model, each with the name of its module in Hugging Face: one if they are tied."""
    rules = [rule for rule in family_of(arch).rules(arch) if rule.cut == "vocab_parallel"]
    return {rule.key.removesuffix(".weight"): rule.hf_keys[0].removesuffix(".weight") for rule in rules}


@dataclass(frozen=True)
class Projection:
    """A matrix of the Hugging Face model that an adapter can be added to."""

    linear: str
    """The engine's linear that holds it, within a layer."""
    name: str
    """The module's name in Hugging Face, such as q_proj."""
    path: str
    """With {n} for the layer: model.layers.{n}.self_attn.q_proj."""
    rows: int
    columns: int
    is_row_parallel: bool

    def key(self, layer: int, part: str) -> str:
        """Return the name of a parameter in a checkpoint. layer: from 0. part: A or B."""
        return f"decoder.layers.{layer}.{self.linear}{SUFFIX}.{self.name}.{part}"


def projections(arch: Architecture) -> list[Projection]:
    """Return every projection of a layer, in the order of the engine's rows."""
    found = []
    for rule in family_of(arch).rules(arch):
        linear = rule.key.removeprefix(_LAYER).removesuffix(".weight")
        if linear in _LINEARS.values():
            for hf_key, (rows, columns) in zip(rule.hf_keys, rule.hf_shapes(arch), strict=True):
                path = hf_key.removesuffix(".weight")
                row_parallel = rule.cut == "row_parallel"
                found.append(Projection(linear, path.rpartition(".")[2], path, rows, columns, row_parallel))
    return found


@dataclass(frozen=True)
class Lora:
    """The adapters of a model: W x becomes W x + scale * B (A dropout(x)), with A [rank, columns] and B [rows, rank]."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Names of projections, in the order of `projections`."""
    dropout: float = 0.0
    rs: bool = False
    """The scale is alpha / sqrt(rank) instead of alpha / rank (rsLoRA, Kalajdzievski 2023)."""
    new_tokens: tuple[int, ...] = ()
    """Tokens whose rows of the embedding and the output layer are trained too."""

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rs else self.rank)

    def of(self, arch: Architecture) -> list[Projection]:
        """Return the projections that have an adapter."""
        return [one for one in projections(arch) if one.name in self.targets]

    def parameters(self, arch: Architecture) -> int:
        """Return the number of parameters of all adapters."""
        rows = len(self.new_tokens) * arch.hidden_size * len(tables(arch))
        return arch.num_layers * sum(self.rank * (one.rows + one.columns) for one in self.of(arch)) + rows

    def shapes(self, arch: Architecture) -> dict[str, tuple[int, int]]:
        """Return the shape of every parameter, by name in a checkpoint, in the order of the layers; rows of tokens first."""
        size = (len(self.new_tokens), arch.hidden_size)
        rows = {rows_key(table): size for table in tables(arch)} if self.new_tokens else {}
        return rows | {
            one.key(layer, part): (self.rank, one.columns) if part == "A" else (one.rows, self.rank)
            for layer in range(arch.num_layers)
            for one in self.of(arch)
            for part in "AB"
        }

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "targets": list(self.targets), "new_tokens": list(self.new_tokens)}

    @classmethod
    def from_dict(cls, entry: Any, arch: Architecture) -> Lora:
        """Return the inverse of to_dict. Raise CheckpointError for what no adapter has: what is read from a file may hold anything."""
        names = {one.name for one in fields(cls)}
        known = {key: value for key, value in entry.items() if key in names} if isinstance(entry, dict) else {}
        if set(known) != names:
            raise CheckpointError("the entry adapter of config.json is incomplete; use another checkpoint")
        try:
            tokens = tuple(known["new_tokens"])
            lora = cls(**{**known, "targets": ordered(known["targets"], arch), "new_tokens": tokens})
            check(lora)
            check_tokens(tokens, arch)
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"the entry adapter of config.json: {error}") from error
        return lora


def check(lora: Lora) -> None:
    """Raise ConfigError for values out of range."""
    if type(lora.rank) is not int or lora.rank < 1:
        raise ConfigError(f"--lora_rank {lora.rank}: must be at least 1")
    if not 0 < lora.alpha < math.inf:
        raise ConfigError(f"--lora_alpha {lora.alpha}: must be above 0")
    if not 0 <= lora.dropout < 1:
        raise ConfigError(f"--lora_dropout {lora.dropout}: must be at least 0 and less than 1")


def check_tokens(tokens: Sequence[Any], arch: Architecture) -> None:
    """Raise ConfigError for what are no tokens of the model."""
    for token in tokens:
        if type(token) is not int or not 0 <= token < arch.vocab_size:
            raise ConfigError(
                f"token {token!r} has trained rows, but the model has tokens 0 to {arch.vocab_size - 1}: its tokenizer lacks added tokens"
            )


def ordered(targets: Sequence[str], arch: Architecture) -> tuple[str, ...]:
    """Return the names of the projections that targets mean: all, parts of a layer (qkv, proj, fc1, fc2) or names of modules.

    Raise ConfigError for one that the model does not have.
    """
    known = projections(arch)
    chosen: set[str] = set()
    for target in targets:
        linear = _LINEARS.get(target.removeprefix("linear_"))
        everything = target in ("all", "all-linear")
        named = {one.name for one in known if everything or one.linear == linear or one.name == target}
        if not named:
            parts, modules = ", ".join(_LINEARS), ", ".join(one.name for one in known)
            raise ConfigError(
                f"--lora_target {target}: the model has no such part; use all, or some of {parts}, or of {modules}"
            )
        chosen |= named
    return tuple(one.name for one in known if one.name in chosen)


def from_settings(
    section: Adapters, arch: Architecture, stored: Lora | None = None, added: Sequence[int] = ()
) -> Lora | None:
    """Return the adapters that the flags ask for; None: no adapters.

    stored: those of the checkpoint or PEFT folder that the run continues from. Flags need not repeat them, and must not contradict them;
    only the dropout may change. added: the tokens that were added to the model's vocabulary. Raise ConfigError.
    """
    targets = [name for entry in section.lora_target for name in entry.split(",") if name]
    if section.lora_rank is None and stored is None:
        _refuse_without_rank(section)
        return None
    if stored is None:
        assert section.lora_rank is not None
        if section.train_new_tokens and not added:
            raise ConfigError("--train_new_tokens: no tokens were added to the model's vocabulary: drop it")
        made = Lora(
            section.lora_rank,
            DEFAULT_ALPHA if section.lora_alpha is None else section.lora_alpha,
            ordered(targets or ["all"], arch),
            section.lora_dropout or 0.0,
            section.lora_rs,
            tuple(sorted(added)) if section.train_new_tokens else (),
        )
        check(made)
        return made
    _check_same(section, ordered(targets, arch), stored)
    made = stored if section.lora_dropout is None else replace(stored, dropout=section.lora_dropout)
    check(made)
    return made


def _refuse_without_rank(section: Adapters) -> None:
    given = {
        name: getattr(section, name)
        for name in ("lora_alpha", "lora_dropout", "lora_target", "lora_rs", "base", "train_new_tokens")
    }
    for name, value in given.items():
        if value not in (None, [], False):
            raise ConfigError(f"--{name} is for adapters: add --lora_rank, or drop --{name}")


def _check_same(section: Adapters, targets: tuple[str, ...], stored: Lora) -> None:
    given: Mapping[str, tuple[Any, Any]] = {
        "lora_rank": (section.lora_rank, stored.rank),
        "lora_alpha": (section.lora_alpha, stored.alpha),
        "lora_target": (",".join(targets) or None, ",".join(stored.targets)),
        "lora_rs": (section.lora_rs or None, stored.rs),
    }
    if section.train_new_tokens and not stored.new_tokens:
        raise ConfigError(
            "--train_new_tokens: the adapters that this run continues from train no rows of tokens; drop the flag"
        )
    for name, (asked, there) in given.items():
        if asked is not None and asked != there:
            raise ConfigError(
                f"--{name} {asked}: the adapters that this run continues from have {there}; drop the flag"
            )
