"""README.md of an export: its origin and an example of its use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints_conversion.certificate import NAME
from checkpoints_conversion.compare_nf4 import in_words
from checkpoints_conversion.onto import IN_WORDS, Onto
from megatron_ft.checkpoints.folder import TRAINED_ON, CheckpointConfig
from megatron_ft.errors import CheckpointError
from megatron_ft.files import read_json
from megatron_ft.models.activation_swap import entry_of, swap_of
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.dtypes import HF_NAMES

MODEL_CARD = "README.md"
"""It has no digest, because owners of the model may edit it."""
_CHAT = """\
messages = [{{"role": "user", "content": "What colour is a plum?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""
_PLAIN = """\
inputs = tokenizer("A plum is", return_tensors="pt")"""
_CARD = """\
---
library_name: {library}
pipeline_tag: text-generation{base_entry}
---

# {name}

Exported from a Megatron checkpoint by megatron_ft.

| | |
|---|---|
| base model | {base} |
| iteration | {iteration} |
| architecture | {family}, {layers} layers, hidden size {hidden}, {heads} heads, {groups} key-value groups |{activation}
| vocabulary | {vocab} tokens |
| positions | {positions} |
| chat format | {chat_format} |
| weights | {dtype} |{quantised}
| trained as | TP {tp} x PP {pp}, format {ckpt_format} |
| trained on | {data} |
| parity with transformers | {parity} |
| made with | {versions} |

{example}
"""
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

    def in_short(self) -> str:
        """Return how much was lost, for the report of the command."""
        measured = self.perplexity.split(", on ")[0]
        return self.error if "not measured" in measured else f"{self.error}, perplexity {measured}"


def model_card(
    name: str,
    config: CheckpointConfig,
    dtype: str,
    folder: Path,
    certified: bool,
    onto: Onto | None = None,
    quantised: Quantised | None = None,
    example: str | None = None,
) -> str:
    """Return the text. name: the export's folder. dtype: of the exported weights. folder: the checkpoint's. certified: the checkpoint has
    a valid certificate. onto: see onto.py. quantised: how the linears are, else None. example: of its use;
    default: with transformers."""
    arch = config.architecture
    base = str(arch.hf.get("_name_or_path") or "")
    return _CARD.format(
        name=name,
        library="gguf" if example else "transformers",
        base=base or "not recorded",
        base_entry=f"\nbase_model: {base}" if "/" in base else "",  # the hub accepts only owner/name
        iteration=config.iteration,
        family=arch.family,
        layers=arch.num_layers,
        hidden=arch.hidden_size,
        heads=arch.num_attention_heads,
        groups=arch.num_query_groups,
        activation=_activation(arch),
        vocab=arch.vocab_size,
        positions=arch.max_position_embeddings,
        chat_format=config.chat_format or "none recorded",
        dtype=HF_NAMES[dtype] + _origin(config, onto),
        data=_data(folder),
        quantised=_rows(quantised) if quantised else "",
        parity=_parity(folder) if certified else "not certified; megatron-ft verify compares weights and logits",
        tp=config.tensor_model_parallel_size,
        pp=config.pipeline_model_parallel_size,
        ckpt_format=config.ckpt_format,
        versions=", ".join(f"{library} {version}" for library, version in config.versions.items()) or "not recorded",
        example=example or _with_transformers(name, config, quantised),
    )


def _with_transformers(name: str, config: CheckpointConfig, quantised: Quantised | None) -> str:
    return _TRANSFORMERS.format(
        name=name,
        before=_FALCON if quantised and quantised.falcon else "",
        ask=_CHAT.format() if config.chat_format else _PLAIN,
    )


def _activation(arch: Architecture) -> str:
    """Return a row about a swapped activation, or nothing."""
    swap, entry = swap_of(arch), entry_of(arch)
    if not swap:
        return ""
    return f"\n| activation | {swap.after} in place of {swap.before} (config.json: {entry.key}) |"


def _rows(quantised: Quantised) -> str:
    rows = {"quantised": quantised.how, "perplexity": quantised.perplexity, "error": quantised.error}
    return "".join(f"\n| {name} | {text} |" for name, text in rows.items())


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
    return f"{entry['name']}{sources}: {entry['samples']} samples, {entry['tokens']} tokens, `{entry['digest']}`"


def _parity(folder: Path) -> str:
    """Return the result in the certificate."""
    certificate = read_json(folder / NAME)
    weights, logits = certificate["weights"], certificate["logits"]
    same = in_words(weights["equal"], weights["tensors"])
    if not logits:
        return f"{same}; logits not compared"
    return (
        f"{same}; logits of {logits['prompts']} prompts, up to {max(logits['tokens'])} tokens, "
        f"differ by at most {logits['largest_difference']:.1e} in fp32"
    )
