"""Compares flags about the model with the checkpoint. Without torch.

A Megatron command line describes its model; here the checkpoint does. Such flags are therefore checked. A difference is an error, or with
--use_checkpoint_args a warning, and the checkpoint's value is used.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from megatron_ft.checkpoints.folder import CheckpointConfig
from megatron_ft.config.sections import Model
from megatron_ft.data.tokenizer import extra_tokens, load_tokenizer
from megatron_ft.errors import ConfigError
from megatron_ft.log import logger
from megatron_ft.models.architecture import Architecture

log = logger("finetune")

SIZES = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_attention_heads_kv": "num_query_groups",
    "max_position_embeddings": "max_position_embeddings",
    "layernorm_epsilon": "norm_epsilon",
    "glu_activation": "activation",
}
"""Flag -> field of Architecture that must equal it."""


def check_model_flags(flags: Model, checkpoint: CheckpointConfig) -> CheckpointConfig:
    """Return the checkpoint's description, with RoPE scaling by flags.

    Raise ConfigError for flags that contradict the checkpoint, all of them in one line.
    """
    wrong = [*_differences(flags, checkpoint.architecture), *_tokenizer_difference(flags, checkpoint)]
    if wrong and not flags.use_checkpoint_args:
        raise ConfigError(
            f"the flags describe another model than the checkpoint: {'; '.join(wrong)}: "
            f"correct the flags, or use the checkpoint's values with --use_checkpoint_args"
        )
    for difference in wrong:
        log.warning(f"{difference}; the checkpoint's value is used (--use_checkpoint_args)")
    return dataclasses.replace(checkpoint, architecture=_scaled(flags, checkpoint.architecture))


def _differences(flags: Model, arch: Architecture) -> Iterator[str]:
    for flag, field in SIZES.items():
        given, is_ = getattr(flags, flag), getattr(arch, field)
        if given is not None and given != is_:
            yield f"--{flag} {given}, checkpoint {is_}"
    if flags.model_name and _family(flags.model_name) != _family(arch.family):
        yield f"--model_name {flags.model_name}, checkpoint {arch.family}"
    if flags.use_rms_norm and arch.norm != "rmsnorm":
        yield f"--use_rms_norm, checkpoint {arch.norm}"
    if flags.no_tie_embed_logits and arch.tied_embeddings:
        yield "--no_tie_embed_logits, checkpoint tied"


def _family(name: str) -> str:
    """Return the family of a name: llama2, Llama-2 and llama are one family; qwen2 and qwen3 are two."""
    plain = name.lower().replace("-", "").replace("_", "")
    return re.sub(r"^(llama|codellama|falcon|mistral).*", r"\1", plain).replace("codellama", "llama")


def _tokenizer_difference(flags: Model, checkpoint: CheckpointConfig) -> Iterator[str]:
    if flags.vocab_file is None:
        return
    extra = extra_tokens(flags.tokenizer_type, flags.vocab_extra_ids_list)
    ours = load_tokenizer(flags.vocab_file, extra)
    theirs = checkpoint.tokenizer
    if theirs and ours.info()["model_fingerprint"] != theirs.get("model_fingerprint"):
        yield f"--vocab_file {flags.vocab_file} is another tokenizer than the checkpoint's"
    elif theirs and ours.added_tokens != theirs.get("added_tokens"):
        yield (
            f"--vocab_file with the extra tokens has added tokens {ours.added_tokens}, "
            f"the checkpoint {theirs.get('added_tokens')}"
        )


def _scaled(flags: Model, arch: Architecture) -> Architecture:
    """Return the model with RoPE scaling by flags. For a model that is already scaled, the flags must state the same scaling."""
    factor = flags.rope_scaling_factor
    if factor is None and flags.rope_scaling_type is None:
        return arch
    if factor is None or factor < 1:
        raise ConfigError(f"--rope_scaling_factor {factor}: give a number of 1 or more with --rope_scaling_type")
    method = flags.rope_scaling_type or "linear"
    if arch.rope_scaling is None:
        return arch if factor == 1 else _extended(arch, method, factor)
    known = (arch.rope_scaling.get("rope_type"), arch.rope_scaling.get("factor"))
    if (method, factor) != known and not flags.use_checkpoint_args:
        raise ConfigError(
            f"the checkpoint's rope is scaled already ({known[0]}, factor {known[1]}), the flags request "
            f"{'none' if factor == 1 else f'{method}, factor {factor}'}: drop --rope_scaling_type and --rope_scaling_factor"
        )
    return arch


def _extended(arch: Architecture, method: str, factor: float) -> Architecture:
    from megatron_ft.models.rope import extend  # imports torch, only if RoPE is scaled

    longer = extend(arch, method, factor)
    positions = f"{arch.max_position_embeddings} -> {longer.max_position_embeddings} positions"
    log.info(f"rope scaled by {factor:g} ({method}): {positions}")
    return longer
