"""The settings in Megatron-LLM's files: a pickled Namespace, of which only plain values are read.

Its sharding tool (tools/checkpoint_util.py) passes on only some of them: rope_theta, layernorm_epsilon and rope_scaling_factor become
the defaults of its command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ft.errors import CheckpointError
from megatron_ft.log import logger
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.torch_file import Inert, TorchFile

Stated = Mapping[str, float]
"""Name in args -> the value that the user gives."""
LOST = {"rope_theta": 10000.0, "layernorm_epsilon": 1e-5, "rope_scaling_factor": 1.0}
"""What the sharding tool drops -> the default that is in its files instead."""
_NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "padded_vocab_size")
# How the sharding tool starts its own argument parser; no training run has all of these.
_SHARDED = {
    "perform_initialization": False,
    "use_cpu_initialization": True,
    "no_save_optim": True,
    "no_save_rng": True,
    "save_interval": 1,
}


def harmless(module: str, name: str) -> bool:
    """Return True for the types of settings and random states, which are read as empty stand-ins.

    getattr: how Python 3.11.0 to 3.11.3 pickle a member of an Enum. As a stand-in it looks nothing up.
    """
    if name == "Namespace" or (module, name) in (("builtins", "getattr"), ("__builtin__", "getattr")):
        return True
    random = ("_reconstruct", "ndarray", "dtype", "scalar")
    return module.startswith("megatron.") or (
        (module.split(".")[0] == "numpy" and name in random) or (module, name) == ("_codecs", "encode")
    )


def plain_args(file: TorchFile) -> dict[str, Any]:
    """Return the settings of a file, {} where it has none."""
    state = file.value if isinstance(file.value, dict) else {}
    args = state.get("args")
    values = dict(vars(args)) if isinstance(args, Inert) else dict(args) if isinstance(args, dict) else {}
    return {key: value for key, value in values.items() if value is not None}


def warn_of_lost(path: Path, args: Mapping[str, Any], stated: Stated) -> None:
    """Warn about a file of the sharding tool, naming the flags of what it may have lost."""
    lost = [f"{name} {value:g}" for name, value in LOST.items() if name not in stated and args.get(name) == value]
    if lost and all(args.get(key) == value for key, value in _SHARDED.items()):
        flags = ", ".join(f"--{text.split()[0]}" for text in lost)
        logger("conversion").warning(
            f"{path} comes from Megatron-LLM's checkpoint_util, which replaces some settings by its defaults ({', '.join(lost)}): "
            f"if the model has other values, set {flags}"
        )


def architecture(args: Mapping[str, Any], vocab_size: int | None, path: Path) -> Architecture:
    """Return the architecture that args describe. Raise CheckpointError for what is missing or not supported."""
    missing = [key for key in _NEEDED if type(args.get(key)) is not int]
    if missing:
        raise CheckpointError(f"{path}: args lacks {', '.join(missing)}; it is not a Megatron-LLM checkpoint")
    heads, padded = args["num_attention_heads"], args["padded_vocab_size"]
    if vocab_size is not None and not 0 < vocab_size <= padded:
        raise CheckpointError(f"{path}: vocabulary of {vocab_size} in {padded} padded rows; check the tokenizer")
    activation = args.get("glu_activation")
    parallel, window = bool(args.get("parallel_attn")), args.get("sliding_window_size")
    if activation not in (None, "swiglu", "geglu", "reglu") or args.get("use_bias"):
        what = "biases" if args.get("use_bias") else f"glu_activation {activation}"
        raise CheckpointError(f"{path}: {what} in the linears is not supported")
    factor = float(args.get("rope_scaling_factor") or 1.0)
    original = args.get("max_position_embeddings") or args.get("seq_length") or 2048
    return Architecture(
        family="falcon" if parallel else "mistral" if window else "llama",
        num_layers=args["num_layers"],
        hidden_size=args["hidden_size"],
        ffn_hidden_size=args["ffn_hidden_size"],
        num_attention_heads=heads,
        num_query_groups=args.get("num_attention_heads_kv") or heads,
        head_dim=args.get("kv_channels") or args["hidden_size"] // heads,
        vocab_size=vocab_size or padded,
        max_position_embeddings=original,
        norm_epsilon=args.get("layernorm_epsilon") or 1e-5,
        norm="rmsnorm" if args.get("use_rms_norm") else "layernorm",
        activation=activation or "gelu",
        tied_embeddings=bool(args.get("tie_embed_logits", True)),
        rope_theta=float(args.get("rope_theta") or 10000.0),
        rope_scaling={"rope_type": "linear", "factor": factor} if factor != 1.0 else None,
        parallel_block=parallel,
        shared_norm=parallel and not args.get("parallel_layernorm"),
        sliding_window=window or None,
    )
