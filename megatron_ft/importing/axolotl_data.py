"""The datasets of axolotl's YAML: their types, the names of their fields, and the chat template."""

from __future__ import annotations

from typing import Any

from megatron_ft.importing.job import Dataset, Job, is_local, is_off

TYPES: dict[str, tuple[str, ...]] = {
    "chat_template": (),
    "sharegpt": (),
    "alpaca": (),
    "gpteacher": (),
    "jeopardy": (),
    "alpaca_chat.load_qa": ("question=question", "answer=answer"),
    "alpaca_chat.load_concise": (),
    "alpaca_w_system.load": (),
    "alpaca_w_system.load_open_orca": (),
    "alpaca_w_system.load_open_orca_chatml": (),
    "completion": ("text=text",),
    "pretrain": ("text=text",),
}
"""Type -> meanings of keys for pretokenize --keys; (): the shape is recognised from the file."""
INSTRUCTIONS = ("alpaca", "gpteacher", "jeopardy")
"""Types that write a prompt of their own around the records."""
TEMPLATES = {"chatml": "chatml", "llama3": "llama3", "vicuna": "vicuna", "llama2": "llama2"}
FIELDS = {
    "field_instruction": "question", "field_input": "input", "field_output": "answer", "field_system": "system", "field_tools": "tools",
}  # fmt: skip
FATES = {
    "path": "", "type": "", "data_files": "", "field": "", "field_messages": "", "message_property_mappings": "", "message_field_role": "",
    "message_field_content": "", "chat_template": "", "roles_to_train": "", "train_on_eos": "", "train_on_eot": "", "conversation": "",
    "ds_type": "the type of a file is recognised from its bytes", "name": "", "revision": "it is for a "
    "download",
    "split": "", "trust_remote_code": "no code of a dataset is run", "roles": "the usual names of "
    "roles are known",
    "drop_system_message": "", "shards": "", "shards_idx": "", "split_thinking": "reasoning has a role of its own",
    "field_thinking": "reasoning_content, reasoning and thinking are read", "template_thinking_key": "the template's own is used",
    "preprocess_shards": "shards are made at once", "input_format": "", "format": "", "no_input_format": "", "system_prompt": "",
    "system_format": "",
    "message_field_training": "", "message_field_training_detail": "", "field_human": "", "field_model": "", "chat_template_jinja": "",
    "input_transform": "", "logprobs_field": "", "temperature": "",
}  # fmt: skip
"""Key of a dataset -> why it has no effect; "": it is read, or refused, below."""
REFUSED = {
    "name": "choose the files of this part with --input",
    "shards": "to read a part of a dataset use pretokenize --max_count",
    "shards_idx": "to read a part of a dataset use pretokenize --max_count",
    "input_format": "the text of a prompt is the chat format's",
    "format": "the text of a prompt is the chat format's",
    "no_input_format": "the text of a prompt is the chat format's",
    "system_prompt": "put the system message into the records",
    "system_format": "the text of a prompt is the chat format's",
    "drop_system_message": "take the system messages out of the records",
    "message_field_training_detail": "marks within a message are not read; `train` and `weight` of a message are",
    "field_human": "name the list of messages with field_messages",
    "field_model": "name the list of messages with field_messages",
    "chat_template_jinja": "put the template into the tokenizer's folder as chat_template.jinja, for --chat_format tokenizer",
    "input_transform": "the records are read as they are",
    "logprobs_field": "a teacher's log-probabilities are made by megatron-ft score",
    "temperature": "the temperature of distillation is --kd_temperature",
}


def datasets(job: Job, key: str, value: Any) -> None:
    """Take the list of datasets."""
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, str):
            entry = {"path": entry}
        if isinstance(entry, dict) and entry.get("path"):
            _dataset(job, key, entry)


def _dataset(job: Job, key: str, entry: dict[str, Any]) -> None:
    files = entry.get("data_files")
    name = str(entry["path"])
    if files and (isinstance(files, str) or len(files) == 1) and not is_local(name):
        job.before.append(
            f"of {name} only {files if isinstance(files, str) else files[0]} is used: give that file to --input"
        )
    if name in ("json", "csv", "parquet", "arrow") and files:
        name = str(files if isinstance(files, str) else files[0])
    dataset = Dataset(name, is_local(name))
    job.datasets.append(dataset)
    meanings = {**_of_type(job, key, entry, dataset), **_of_fields(entry)}
    if meanings:
        dataset.pretokenize["keys"] = [f"{meaning}={column}" for meaning, column in meanings.items()]
    _template(job, entry.get("chat_template"))
    _roles(job, entry)
    for name, why in FATES.items():
        if why and not is_off(entry.get(name)):
            job.ignore(f"{key} {name}", entry[name], why)
    for name, given in entry.items():
        if name == "split" and given == "train":
            job.ignore(f"{key} split", given, "a folder is read as its train split")
        elif name == "split" and not is_off(given):
            job.refuse(
                f"{key} split", given, "give the files of this split to --input; to read a part, use --max_count"
            )
        elif not is_off(given) and (name in REFUSED or name not in FATES):
            job.refuse(
                f"{key} {name}", given, REFUSED.get(name, "a dataset has no key of this name that is known here")
            )


def _of_type(job: Job, key: str, entry: dict[str, Any], dataset: Dataset) -> dict[str, str]:
    kind = entry.get("type")
    if isinstance(kind, dict):
        job.take(f"{key} type", "...", f"pretokenize --input {dataset.name} --keys")
        for name, given in kind.items():
            if name in REFUSED and not is_off(given):
                job.refuse(f"{key} type {name}", given, REFUSED[name])
        return {FIELDS[name]: str(column) for name, column in kind.items() if name in FIELDS and not is_off(column)}
    name = str(kind or "chat_template").partition(":")[0]
    if name not in TYPES:
        job.refuse(
            f"{key} type",
            kind,
            "no reader has this name: the shape of the records is recognised, or said with pretokenize --keys",
        )
        return {}
    job.take(f"{key} path", dataset.name, f"pretokenize --input (type {name})")
    if name.startswith(INSTRUCTIONS):
        job.refuse(
            f"{key} type",
            kind,
            "its own text around each record (such as `### Instruction:`) is not written; the chat format's is",
        )
        if "chat_format" not in job.pretokenize:
            job.pretokenize["chat_format"] = "chatml"
            job.before.append(
                "chatml is written as the chat format of instructions; if the model has a template, use --chat_format tokenizer"
            )
    found = dict(meaning.split("=") for meaning in TYPES[name])
    return {**found, "text": str(entry["field"])} if entry.get("field") and "text" in found else found


def _of_fields(entry: dict[str, Any]) -> dict[str, str]:
    mappings = entry.get("message_property_mappings")
    mappings = mappings if isinstance(mappings, dict) else {}
    found = {
        "messages": entry.get("field_messages"),
        "role": mappings.get("role") or entry.get("message_field_role"),
        "content": mappings.get("content") or entry.get("message_field_content"),
        "tools": entry.get("field_tools"),
        "system": entry.get("field_system"),
    }
    if not any(found[name] for name in ("messages", "role", "content")):
        return {}
    found |= {name: found[name] or name for name in ("messages", "role", "content")}
    return {meaning: str(column) for meaning, column in found.items() if column}


def _template(job: Job, name: Any) -> None:
    if not is_off(name):
        ours = TEMPLATES.get(str(name), "tokenizer")
        job.pretokenize["chat_format"] = ours


def _roles(job: Job, entry: dict[str, Any]) -> None:
    roles = entry.get("roles_to_train")
    if isinstance(roles, list) and set(roles) - {"assistant", "gpt"}:
        weights = [f"{ {'human': 'user', 'gpt': 'assistant'}.get(role, role) }=1" for role in map(str, roles)]
        job.set("roles_to_train", roles, "role_loss_weights", weights)
    if entry.get("train_on_eos") not in (None, "turn") or entry.get("train_on_eot") not in (None, "turn"):
        job.refuse(
            "train_on_eos",
            entry.get("train_on_eos") or entry.get("train_on_eot"),
            "the end of each answer is always trained on",
        )


def template(job: Job, key: str, value: Any) -> None:
    _template(job, value)
    ours = job.pretokenize.get("chat_format", "tokenizer")
    job.take(key, value, f"pretokenize --chat_format {ours}")
    if ours == "tokenizer" and str(value) not in ("tokenizer_default", "tokenizer_default_fallback_chatml"):
        job.before.append(
            f"{key} {value} is not a chat format here: the tokenizer's own template is used; megatron-ft inspect shows the text"
        )


def pretraining(job: Job, key: str, value: Any) -> None:
    """Take texts, which are trained on as a whole."""
    for entry in value if isinstance(value, list) else [value]:
        given = entry if isinstance(entry, dict) else {"path": entry}
        if not given.get("path"):
            continue
        dataset = Dataset(str(given["path"]), is_local(str(given["path"])))
        dataset.pretokenize["keys"] = [f"text={given.get('text_column') or 'text'}"]
        job.datasets.append(dataset)
    job.take(key, "...", "pretokenize --keys text=...; every token is trained on")
