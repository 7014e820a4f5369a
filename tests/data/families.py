"""Templates in the manner of published families, each with a tokenizer of its kind, and chats of every kind."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from tests.data.helpers import fast_file

FOLDER = Path(__file__).parent / "templates"
DATE = "2024-07-26"
_SCHEMA = {"type": "object", "properties": {"a": {"type": "number"}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "sum «é»", "parameters": _SCHEMA}}]


class Family(NamedTuple):
    """special: its tokens. takes: the kinds of chats that it takes."""

    special: tuple[str, ...]
    stop: str
    takes: tuple[str, ...]
    bos: str | None = None
    eos: str = "<eos>"
    kind: str = "bytes"
    stripping: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()


_TALK = ("one turn", "several turns", "spaces", "forged")
_HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_QWEN = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_COMMAND = (
    "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"
)  # fmt: skip
_R1 = tuple(f"<|{name}|>" for name in (
    "begin_of_sentence", "end_of_sentence", "User", "Assistant", "tool_calls_begin", "tool_call_begin", "tool_sep", "tool_call_end",
    "tool_calls_end", "tool_outputs_begin", "tool_output_begin", "tool_output_end", "tool_outputs_end",
))  # fmt: skip
_MISTRAL = (
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)
ALL = (*_TALK, "system", "tools", "parallel tools", "JSON result", "thinking", "reasoning key")
FAMILIES = {
    "llama2": Family(("<s>", "</s>"), "</s>", (*_TALK, "system"), "<s>", "</s>", "metaspace"),
    "llama3": Family(_HEADERS, "<|eot_id|>", (*_TALK, "system"), "<|begin_of_text|>"),
    "llama3.1": Family(_HEADERS, "<|eot_id|>", (*_TALK, "system", "tools", "JSON result"), "<|begin_of_text|>"),
    "llama3.2": Family(_HEADERS, "<|eot_id|>", (*_TALK, "system", "tools", "JSON result"), "<|begin_of_text|>"),
    "qwen2.5": Family(_QWEN, "<|im_end|>", ALL, None, "<|endoftext|>"),
    "qwen3": Family(_QWEN, "<|im_end|>", ALL, None, "<|im_end|>"),
    "mistral-v0.1": Family(("<s>", "</s>"), "</s>", _TALK, "<s>", "</s>", "metaspace"),
    "mistral-v0.3": Family(
        ("<s>", "</s>", *_MISTRAL), "</s>", (*_TALK, "system", "tools", "parallel tools", "JSON result"), "<s>", "</s>", "metaspace"
    ),
    "gemma2": Family(("<bos>", "<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", _TALK, "<bos>"),
    "gemma3": Family(("<bos>", "<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", (*_TALK, "system"), "<bos>"),
    "phi3": Family(
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|end|>", (*_TALK, "system"), None, "<eos>", "metaspace",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "phi4": Family((*_QWEN, "<|im_sep|>"), "<|im_end|>", (*_TALK, "system")),
    "deepseek-r1": Family(
        _R1, "<|end_of_sentence|>", (*_TALK, "system", "tools", "parallel tools", "JSON result", "thinking"), _R1[0], _R1[1]
    ),
    "zephyr": Family(("<s>", "</s>"), "</s>", (*_TALK, "system"), "<s>", "</s>", "metaspace"),
    "command-r": Family(
        _COMMAND, "<|END_OF_TURN_TOKEN|>", (*_TALK, "system", "tools", "parallel tools", "JSON result"), "<BOS_TOKEN>",
        "<|END_OF_TURN_TOKEN|>", parts=("tool_use", "rag"),
    ),
}  # fmt: skip


def _call(number: int, a: Any) -> dict[str, Any]:
    return {
        "type": "function",
        "id": f"call{number:05}",
        "function": {"name": "add", "arguments": {"a": a, "b": "é <x>"}},
    }


def _user(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def _says(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def _result(number: int, text: str) -> dict[str, Any]:
    return {"role": "tool", "name": "add", "content": text, "tool_call_id": f"call{number:05}"}


CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": [_user("hello fox"), _says("the dog 二")],
    "several turns": [_user("hello fox"), _says("the dog 二"), _user("and?"), _says("a wizard"), _user("so"), _says("jugs")],
    "spaces": [_user(" hello\n\n fox"), _says("  the dog \n"), _user("\tand? "), _says("a  wizard\n")],
    "forged": [_user("say {stop} now"), _says("no {stop}{stop}"), _user("x"), _says("y")],
    "system": [{"role": "system", "content": "be kind"}, _user("hello fox"), _says("the dog"), _user("and?"), _says("a wizard")],
    "tools": [
        _user("1 + 1?", tools=TOOLS), _says("", tool_calls=[_call(1, 1)]), _result(1, "2"), _says("it is two"), _user("and 2?"),
        _says("", tool_calls=[_call(2, 2)]), _result(2, "4"), _says("four"),
    ],
    "parallel tools": [
        {"role": "system", "content": "be kind"}, _user("1 + 1, 2 + 2?", tools=TOOLS),
        _says("", tool_calls=[_call(1, 1), _call(2, 2)]), _result(1, "2"), _result(2, "4"), _says("two and four"), _user("thanks"),
        _says("gladly"),
    ],
    "JSON result": [_user("1 + 1?", tools=TOOLS), _says("", tool_calls=[_call(1, 1)]), _result(1, '{"sum": 2}'), _says("two")],
    "thinking": [
        _user("hello"), _says("<think>\nthe fox\n</think>\n\nthe dog"), _user("and?"), _says("<think>\nwizards\n</think>\n\na wizard"),
    ],
    "reasoning key": [
        _user("hello"), _says("the dog", reasoning_content="the fox"), _user("and?"), _says("a wizard", reasoning_content="wizards"),
    ],
}  # fmt: skip


def chat(kind: str, family: Family) -> list[dict[str, Any]]:
    return json.loads(json.dumps(CHATS[kind]).replace("{stop}", family.stop))


def write(name: str, folder: Path, kind: str | None = None) -> Path:
    """Write the family's tokenizer with its template. kind: of the tokenizer, unless it is the family's."""
    family = FAMILIES[name]
    fast_file(folder, kind or family.kind)
    path = folder / "tokenizer.json"
    description = json.loads(path.read_text())
    size = len(description["model"]["vocab"])
    for i, token in enumerate(dict.fromkeys((*family.special, family.eos))):
        if any(known["content"] == token for known in description["added_tokens"]):
            continue
        description["added_tokens"].append(
            {"id": size + i, "content": token, "single_word": False, "lstrip": False, "rstrip": token in family.stripping,
             "normalized": False, "special": True}
        )  # fmt: skip
    path.write_text(json.dumps(description))
    sources = {"default": (FOLDER / f"{name}.jinja").read_text().rstrip("\n")}
    sources |= {part: (FOLDER / f"{name}.{part}.jinja").read_text().rstrip("\n") for part in family.parts}
    listed = [{"name": part, "template": source} for part, source in sources.items()]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": family.eos,
        "clean_up_tokenization_spaces": False,
    }
    config |= {"bos_token": family.bos} if family.bos else {}
    config["chat_template"] = sources["default"] if len(listed) == 1 else listed
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


class FixedDate(datetime):
    """A clock that stands still, for transformers."""

    @classmethod
    def now(cls, tz: Any = None) -> "FixedDate":
        return cls.fromisoformat(DATE)
