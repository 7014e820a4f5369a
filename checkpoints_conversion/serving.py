"""Which servers load an export as it is, and their commands. Nothing is promised that a server's own code does not have.

What they cannot do was read in their sources: vLLM's models/falcon.py, rotary_embedding and config/lora.py, SGLang's and TGI's lists of
models, and `transformers serve --help`.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ft.errors import CheckpointError
from megatron_ft.files import read_json

_ACTIVATIONS = {"llama": "silu", "mistral": "silu", "qwen2": "silu", "qwen3": "silu", "falcon": "gelu"}
_SGLANG = ("llama", "mistral", "qwen2", "qwen3")
_TGI = ("llama", "mistral", "qwen2")
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # those of vLLM's --max-lora-rank
_MARLIN_GROUPS, _MARLIN_COLUMNS = (32, 64, 128), 128  # of vLLM's kernel for 4 bits without zero points
_GPU = 60e9
"""Bytes of weights on one GPU of 80 GB; the rest is for keys and values."""
_MOST = 8
"""GPUs of one machine."""


@dataclass(frozen=True)
class Way:
    """A server, its command, and where it answers."""

    server: str
    command: str
    port: int = 8000


@dataclass(frozen=True)
class Serving:
    """ways: servers that load the export. notes: what to know about the others, and about sizes. model: its name in requests."""

    ways: list[Way]
    notes: list[str]
    model: str
    chats: bool = True
    """Whether the tokenizer has a chat template."""

    def markdown(self) -> str:
        """Return the section of a model card."""
        blocks = [
            f"{way.server}, at `http://localhost:{way.port}/v1`:\n\n```sh\n{way.command}\n```" for way in self.ways
        ]
        return "\n\n".join([*blocks, *self.notes, *self._request()])

    def text(self) -> str:
        """Return the same for a terminal."""
        lines = [f"{way.server}, at http://localhost:{way.port}/v1\n  $ {way.command}\n" for way in self.ways]
        return "\n".join([*lines, *self.notes])

    def _request(self) -> Iterator[str]:
        if not self.ways:
            return
        asked = {"messages": [{"role": "user", "content": "Hello"}]} if self.chats else {"prompt": "Hello"}
        path = "chat/completions" if self.chats else "completions"
        body = shlex.quote(json.dumps({"model": self.model, **asked}))
        url = f"http://localhost:{self.ways[0].port}/v1/{path}"
        yield f"A question to it:\n\n```sh\ncurl {url} -H 'Content-Type: application/json' \\\n  -d {body}\n```"


def serving(folder: Path, place: str) -> Serving:
    """Return how to serve the export in `folder`. place: its folder in the commands. Raise CheckpointError for what is no export."""
    try:
        return _of_folder(folder, place)
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
    ) as error:  # files of others may hold anything
        why = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{folder}: its config.json or adapter_config.json makes no sense ({why}); restore it"
        ) from error


def _of_folder(folder: Path, place: str) -> Serving:
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs:
        return _gguf(ggufs[0], place)
    if (folder / "adapter_config.json").is_file():
        return _adapter(read_json(folder / "adapter_config.json"), place)
    if not (folder / "config.json").is_file() or "model_type" not in (config := read_json(folder / "config.json")):
        raise CheckpointError(f"{folder} is no export: give a folder that megatron-to-hf or merge-adapter has written")
    found = _model(config, sum(path.stat().st_size for path in folder.glob("*.safetensors")), place)
    return replace(found, chats=(folder / "chat_template.jinja").is_file())


def _gguf(file: str, place: str) -> Serving:
    path = shlex.quote(f"{place}/{file}")
    note = ["Of a file in several parts it loads the others by itself."] if "-00001-of-" in file else []
    return Serving([Way("llama.cpp", f"llama-server -m {path} --jinja", 8080)], note, place)


def _adapter(config: dict[str, Any], place: str) -> Serving:
    """Return how to serve a base with an adapter beside it."""
    base = config.get("base_model_name_or_path")
    rank = next((rank for rank in _LORA_RANKS if rank >= int(config.get("r", 0))), None)
    problem = _not_served(config, rank)
    merge = "`megatron-ft merge-adapter` writes base and adapter as one model, which every server loads."
    if problem or not base:
        why = problem or "The name of the base is not recorded; `--base_model_name` of `megatron-to-hf` names it."
        return Serving([], [f"{why} {merge}"], place)
    name = Path(place).name
    pair, model = shlex.quote(f"{name}={place}"), shlex.quote(str(base))
    vllm = f"vllm serve {model} --enable-lora --max-lora-rank {rank} --lora-modules {pair}"
    sglang = (
        f"python -m sglang.launch_server --model-path {model} --enable-lora --max-lora-rank {rank} --lora-paths {pair}"
    )
    note = (
        f"For Llama, Mistral and Qwen whose embedding has the tokens of this tokenizer; vLLM has no adapters for Falcon. In requests "
        f"`{name}` is the model with the adapter. {merge}"
    )
    return Serving([Way("vLLM", vllm), Way("SGLang", f"{sglang} --port 8000")], [note], name)


def _not_served(config: dict[str, Any], rank: int | None) -> str | None:
    """Return why servers do not load an adapter beside its base, or None."""
    if config.get("trainable_token_indices") or config.get("modules_to_save"):
        return "The adapter has trained rows of tokens or whole modules, which vLLM and SGLang do not load."
    if config.get("use_dora") or config.get("bias", "none") != "none" or config.get("rank_pattern"):
        return "The adapter is more than plain LoRA, which vLLM and SGLang do not load."
    if rank is None:
        return f"Its rank {config.get('r')} is above vLLM's largest, {_LORA_RANKS[-1]}."
    return None


def _model(config: dict[str, Any], size: int, place: str) -> Serving:
    """Return how to serve a model, plain or quantised."""
    family, where = str(config["model_type"]), shlex.quote(place)
    quantised = config.get("quantization_config") or {}
    method = str(quantised.get("quant_method", ""))
    own = Way("transformers", f"transformers serve {where}")
    problem = _only_transformers(config, method)
    sizes = [] if problem else _parallel_sizes(config, quantised)
    if not sizes or (method == "compressed-tensors" and _group_size(quantised) not in _MARLIN_GROUPS):
        why = problem or "vLLM's kernel has no groups of this size, or no matrices of these sizes"
        return Serving(*_with_transformers_alone(own, why, family, method), place)
    count = next((n for n in sizes if size / n <= _GPU), sizes[-1])
    ways = [Way("vLLM", f"vllm serve {where}{_gpus(' --tensor-parallel-size', count)}{_half(method)}")]
    if not method and family in _SGLANG:
        gpus = _gpus(" --tp", count)
        ways.append(Way("SGLang", f"python -m sglang.launch_server --model-path {where}{gpus} --port 8000"))
    if not method and family in _TGI and count <= _kv_heads(config):
        gpus = _gpus(" --num-shard", count)
        ways.append(Way("TGI", f"text-generation-launcher --model-id {where}{gpus} --port 8000"))
    if not (method and family == "falcon"):
        ways.append(own)
    return Serving(ways, [_sizes_in_words(size, sizes, config), *_precision(config)], place)


def _only_transformers(config: dict[str, Any], method: str) -> str | None:
    """Return why only transformers computes this model, or None."""
    family = str(config["model_type"])
    native = _ACTIVATIONS.get(family)
    activation = config.get("hidden_act", config.get("activation", native))
    if native is None:
        return f"models of type {family} are not among those that were looked up"
    if activation != native:
        return f"vLLM, SGLang and llama.cpp compute {native} in every {family} model, this one has {activation}"
    if method == "bitsandbytes":
        return "bitsandbytes' format is that of transformers; for the other servers export without --quantize, or with w4a16"
    if family == "falcon" and config.get("ffn_hidden_size", 4 * config["hidden_size"]) != 4 * config["hidden_size"]:
        return "vLLM's Falcon has MLPs of four times the hidden size only"
    if config.get("use_sliding_window") and config.get("max_window_layers", 0) > 0:
        return "vLLM has no models with a sliding window in some of their layers"
    return _unknown_rope(config, family)


def _unknown_rope(config: dict[str, Any], family: str) -> str | None:
    """Return what servers would compute in another way, or None. vLLM knows no attention_factor and, in Falcon, no scaling at all."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    factor = rope.get("attention_factor")
    usual = 0.1 * math.log(max(1.0, float(rope.get("factor") or 1))) + 1
    known = kind in ("default", "linear", "llama3", "dynamic")
    if kind == "yarn":
        known = factor is None or math.isclose(float(factor), usual, rel_tol=1e-6)
    if known and (family != "falcon" or kind == "default"):
        return None
    return f"its rotary embedding ({kind}) is one that vLLM would compute in another way"


def _with_transformers_alone(own: Way, problem: str, family: str, method: str) -> tuple[list[Way], list[str]]:
    if method and family == "falcon":  # see the line in the card's example
        return [], [f"No server loads it: {problem}, and transformers' own needs the line in the example above."]
    return [own], [f"Only transformers: {problem}."]


def _precision(config: dict[str, Any]) -> list[str]:
    if config.get("dtype", config.get("torch_dtype")) != "float32":
        return []
    return [
        "vLLM, SGLang and TGI compute an export in fp32 in 16 bits; `--params_dtype bf16` writes it so, in half the bytes."
    ]


def _half(method: str) -> str:
    """Return vLLM's flags for the GPTQ format with zero points, whose kernel computes in fp16."""
    return " --quantization gptq --dtype float16" if method == "gptq" else ""


def _gpus(flag: str, count: int) -> str:
    return f"{flag} {count}" if count > 1 else ""


def _kv_heads(config: dict[str, Any]) -> int:
    if config["model_type"] == "falcon" and not config.get("new_decoder_architecture"):
        return 1 if config.get("multi_query", True) else int(config["num_attention_heads"])
    found = config.get("num_key_value_heads") or config.get("num_kv_heads") or config["num_attention_heads"]
    return int(found)


def _parallel_sizes(config: dict[str, Any], quantised: dict[str, Any]) -> list[int]:
    """Return the numbers of GPUs that a model can be divided over, at most 8: heads, MLP and groups of quantised rows must divide."""
    heads, groups = int(config["num_attention_heads"]), _kv_heads(config)
    hidden = int(config["hidden_size"])
    ffn = int(config.get("intermediate_size") or config.get("ffn_hidden_size") or 4 * hidden)
    size = int(config.get("head_dim") or hidden // heads)
    group = _unit(quantised)

    def fits(count: int) -> bool:
        shared = groups % count == 0 or count % groups == 0
        whole = not (heads % count or ffn % count)
        return shared and whole and not ((heads * size // count) % group or (ffn // count) % group)

    return [count for count in range(1, _MOST + 1) if fits(count)]


def _unit(quantised: dict[str, Any]) -> int:
    """Return what the columns of a GPU's part of a matrix must be a multiple of."""
    size = _group_size(quantised)
    return math.lcm(size, _MARLIN_COLUMNS) if quantised.get("quant_method") == "compressed-tensors" else size


def _group_size(quantised: dict[str, Any]) -> int:
    if "group_size" in quantised:
        return int(quantised["group_size"])
    groups = quantised.get("config_groups") or {}
    sizes = [int((one.get("weights") or {}).get("group_size") or 1) for one in groups.values()]
    return max(sizes, default=1)


def _sizes_in_words(size: int, sizes: list[int], config: dict[str, Any]) -> str:
    """Return how many bytes the weights are, and over how many GPUs they can be divided."""
    weights = f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
    heads = config["num_attention_heads"]
    if len(sizes) == 1:
        return f"The weights are {weights}. The model, of {heads} heads, cannot be divided over several GPUs."
    counts = f"{', '.join(map(str, sizes[:-1]))} or {sizes[-1]} GPUs"
    return f"The weights are {weights}. The model, of {heads} heads, can be divided over {counts} (`--tensor-parallel-size`, `--tp`)."
