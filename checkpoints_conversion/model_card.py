"""README.md of an export: its origin, its training, its prompts, an example of its use, and servers that load it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints_conversion.card_data import front_matter
from checkpoints_conversion.card_prompt import prompt_messages, prompt_section
from checkpoints_conversion.card_training import settings_of, training_rows
from checkpoints_conversion.certificate import NAME
from checkpoints_conversion.compare_nf4 import in_words
from checkpoints_conversion.megatron_source import Opened
from checkpoints_conversion.onto import IN_WORDS, Onto
from checkpoints_conversion.serving import serving
from megatron_ft.checkpoints.folder import TRAINED_ON, CheckpointConfig
from megatron_ft.errors import CheckpointError
from megatron_ft.files import read_json
from megatron_ft.models.activation_swap import entry_of, swap_of
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.dtypes import HF_NAMES
from megatron_ft.wording import counted

MODEL_CARD = "README.md"
"""It has no digest, because owners of the model may edit it."""
_CHAT = """\
messages = {messages}
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""
_PLAIN = """\
inputs = tokenizer("A plum is", return_tensors="pt")"""
_TRANSFORMERS = """\
```python
{before}from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{name}"  # the folder of this file
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
{ask}
answer = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```"""
_FALCON = """\
# transformers skips Falcon's own class of linears when it quantises: without this line the weights are random.
import torch
from transformers.models.falcon import modeling_falcon

modeling_falcon.FalconLinear = torch.nn.Linear

"""


@dataclass(frozen=True)
class Quantised:
    """How an export was quantised, in words."""

    how: str
    perplexity: str
    error: str
    falcon: bool
    kind: str
    """The tag of its format on the Hub."""

    def rows(self) -> dict[str, str]:
        """Return its rows in the card."""
        return {"quantised": self.how, "perplexity": self.perplexity, "error": self.error}

    def in_short(self) -> str:
        """Return how much was lost, for the report of the command."""
        measured = self.perplexity.split(", on ")[0]
        return self.error if "not measured" in measured else f"{self.error}, perplexity {measured}"


def model_card(
    name: str,
    source: Opened,
    dtype: str,
    export: Path,
    certified: bool,
    system: str | None = None,
    quantised: Quantised | None = None,
    example: str | None = None,
) -> str:
    """Return the text. name: the export's folder, which `export` will be. dtype: of the exported weights. certified: the checkpoint has a
    valid certificate. system: the recommended system message. quantised: how the linears are, else None. example: of its use; default: with
    transformers. Raise ConfigError for a system message that the chat template does not take."""
    config, folder = source.config, source.folder
    settings = settings_of(folder)
    base = str(config.architecture.hf.get("_name_or_path") or "")
    kind = quantised.kind if quantised else None
    head = front_matter(config, folder, "gguf" if example else "transformers", base, settings, kind, lora=False)
    rows = _about(config, dtype, folder, certified, base, source.onto, quantised)
    prompt = prompt_section(config, source.tokenizer, system)
    parts = [
        f"{head}\n# {name}",
        "Exported from a Megatron checkpoint by megatron_ft.",
        table(rows),
        training_section(folder, settings),
        prompt,
        f"## Use\n\n{example or _with_transformers(name, bool(prompt), quantised, system)}",
        f"## Serve\n\n{serving(export, name).markdown()}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def training_section(folder: Path, settings: dict[str, Any]) -> str:
    """Return the section about the training of a checkpoint; "" if nothing is recorded."""
    rows = training_rows(folder, settings)
    return f"## Training\n\n{table(rows)}" if rows else ""


def table(rows: dict[str, str]) -> str:
    """Return a table of two columns without a head."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())])


def _about(
    config: CheckpointConfig, dtype: str, folder: Path, certified: bool, base: str, onto: Onto | None,
    quantised: Quantised | None,
) -> dict[str, str]:  # fmt: skip
    arch = config.architecture
    tp, pp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    return {
        "base model": base or "not recorded",
        "iteration": str(config.iteration),
        "architecture": f"{arch.family}, {counted(arch.num_layers, 'layer')}, hidden size {arch.hidden_size}, "
        f"{counted(arch.num_attention_heads, 'head')}, {counted(arch.num_query_groups, 'key-value group')}",
        **_activation(arch),
        "vocabulary": f"{arch.vocab_size} tokens",
        "positions": str(arch.max_position_embeddings),
        "chat format": config.chat_format or "none recorded",
        "weights": HF_NAMES[dtype] + _origin(config, onto),
        **(quantised.rows() if quantised else {}),
        "trained as": f"TP {tp} x PP {pp}, format {config.ckpt_format}",
        "trained on": _data(folder),
        "parity with transformers": _parity(folder)
        if certified
        else "not certified; megatron-ft verify compares weights and logits",
        "made with": ", ".join(f"{library} {version}" for library, version in config.versions.items())
        or "not recorded",
    }


def _with_transformers(name: str, chats: bool, quantised: Quantised | None, system: str | None) -> str:
    messages = json.dumps(prompt_messages(system), ensure_ascii=False)
    return _TRANSFORMERS.format(
        name=name,
        before=_FALCON if quantised and quantised.falcon else "",
        ask=_CHAT.format(messages=messages) if chats else _PLAIN,
    )


def _activation(arch: Architecture) -> dict[str, str]:
    """Return a row about a swapped activation, or nothing."""
    swap, entry = swap_of(arch), entry_of(arch)
    return {"activation": f"{swap.after} in place of {swap.before} (config.json: {entry.key})"} if swap else {}


def _origin(config: CheckpointConfig, onto: Onto | None) -> str:
    if onto:
        return f"; adapters merged onto {IN_WORDS[onto]}"
    return ", dequantised from NF4" if config.quantization else ""


def _data(folder: Path) -> str:
    """Return the shards of the training, with their hashes, from the record beside the weights."""
    if not (folder / TRAINED_ON).is_file():
        return "not recorded"
    try:
        parts = [_shards(entry) for entry in read_json(folder / TRAINED_ON)]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / TRAINED_ON} is damaged ({error!r}): restore it, or remove it") from error
    return "; ".join(parts) or "not recorded"


def _shards(entry: dict[str, Any]) -> str:
    sources = f" from {', '.join(entry['sources'])}" if entry["sources"] else ""
    return f"{entry['name']}{sources}: {counted(entry['samples'], 'sample')}, {counted(entry['tokens'], 'token')}, `{entry['digest']}`"


def _parity(folder: Path) -> str:
    """Return the result in the certificate."""
    certificate = read_json(folder / NAME)
    weights, logits = certificate["weights"], certificate["logits"]
    same = in_words(weights["equal"], weights["tensors"])
    if not logits:
        return f"{same}; logits not compared"
    return (
        f"{same}; logits of {logits['prompts']} prompts, up to {counted(max(logits['tokens']), 'token')}, "
        f"differ by at most {logits['largest_difference']:.1e} in fp32"
    )
