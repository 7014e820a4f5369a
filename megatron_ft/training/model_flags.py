"""Compares flags about the model with the checkpoint. Without torch.

A Megatron command line describes its model; here the checkpoint does. Such flags are therefore checked. A difference is an error, or with
--use_checkpoint_args a warning, and the checkpoint's value is used.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from megatron_ft.checkpoints.folder import CheckpointConfig
from megatron_ft.config.expected import Model
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
    "kv_channels": "head_dim",
    "rotary_base": "rope_theta",
    "rotary_percent": "rotary_share",
    "sliding_window_size": "sliding_window",
    "vocab_size": "vocab_size",
}
"""Flag -> field of Architecture that must equal it."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Megatron-LM's --use_rope_scaling fixes."""


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
    yield from _window_difference(flags, arch)
    yield from _llama3_difference(flags, arch)
    if flags.normalization and flags.normalization.lower() != arch.norm:
        yield f"--normalization {flags.normalization}, checkpoint {arch.norm}"
    for flag, contradicts, is_ in _contradictions(flags, arch):
        if getattr(flags, flag) and contradicts:
            yield f"--{flag}, checkpoint {is_}"


def _window_difference(flags: Model, arch: Architecture) -> Iterator[str]:
    """Compare Megatron-LM's window: a token sees `left` keys before it and itself. left -1 is no window."""
    if flags.window_size is None:
        return
    match = re.fullmatch(r"[(\[\s]*(-?\d+)[,\s]+(-?\d+)[)\]\s]*", flags.window_size)
    if not match or int(match[1]) < -1:
        raise ConfigError(
            f"--window_size {flags.window_size}: write the keys to the left and to the right, as in 4095,0"
        )
    left = int(match[1])
    keys = None if left == -1 else left + 1
    if keys != arch.sliding_window:
        given = "no window" if keys is None else f"{keys} keys, the token's own included"
        is_ = "no window" if arch.sliding_window is None else arch.sliding_window
        yield f"--window_size {flags.window_size} ({given}), checkpoint {is_}"


def _llama3_difference(flags: Model, arch: Architecture) -> Iterator[str]:
    """Compare --use_rope_scaling: in Megatron-LM only its factor can be chosen."""
    if not flags.use_rope_scaling:
        return
    wanted = {"rope_type": "llama3", "factor": flags.rope_scaling_factor or 8.0, **LLAMA3}
    has = arch.rope_scaling or {}
    different = [name for name, value in wanted.items() if has.get(name) != value]
    if different:
        shown = ", ".join(f"{name} {has[name]}" for name in different if name in has) or "no RoPE scaling"
        expected = ", ".join(f"{name} {wanted[name]}" for name in different)
        yield f"--use_rope_scaling (Llama 3's: {expected}), checkpoint {shown}"


def _contradictions(flags: Model, arch: Architecture) -> Iterator[tuple[str, bool, str]]:
    """Yield (switch, whether the model contradicts it, what the model is)."""
    yield "use_rms_norm", arch.norm != "rmsnorm", arch.norm
    yield "no_tie_embed_logits", arch.tied_embeddings, "tied"
    many = arch.num_query_groups == arch.num_attention_heads and flags.num_attention_heads_kv is None
    yield "group_query_attention", many, f"as many key-value heads as query heads, {arch.num_attention_heads}"
    yield "add_qkv_bias", not arch.qkv_bias, "no biases on query, key and value"
    without = arch.qkv_bias and not flags.add_qkv_bias
    yield "disable_bias_linear", without, "biases on query, key and value (--add_qkv_bias)"
    yield "qk_layernorm", not arch.qk_norm, "no norms of query and key"
    yield "parallel_attn", not arch.parallel_block, "attention before MLP"
    yield "parallel_layernorm", not arch.parallel_block or arch.shared_norm, "one norm"


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
    if flags.use_rope_scaling or (factor is None and flags.rope_scaling_type is None):
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
