"""Readers of the published datasets in Open-Assistant's configurations: one function each, from a record to conversations.

readers.READERS has their published names, by which local copies are found. What they leave out is in published.py.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_ft.data.fingerprint import fingerprint
from megatron_ft.errors import DataError, kind_of
from tools.pretokenizer.fields import Conversation, from_json, get, get_list, get_text, keep, pair
from tools.pretokenizer.filled import JOINED, FillOptions
from tools.pretokenizer.published import PublishedOptions, without_citations

LINKS = ("\n", "\n\n", " ")
"""What Open-Assistant puts between an instruction and its input, chosen at random."""
_NO_INPUT = ("no input", "noinput", "n/a")


class Columns(NamedTuple):
    """A published dataset of questions and answers: its repository, the keys of its records, and the file of it that is read."""

    repository: str
    question: str = "INSTRUCTION"
    answer: str = "RESPONSE"
    data_files: str | None = None


INSTRUCTIONS = {
    "megacode": Columns("rombodawg/MegaCodeTraining112k", "prompt", "completion", "RombosCodeTraining112k.json"),
    "megacode2": Columns(
        *("rombodawg/LosslessMegaCodeTrainingV2_1m_Evol_Uncensored", "USER", "ASSISTANT"),
        "DeDuped_LosslessMegaCodeTrainingV2_942k_Evol_Uncensored.json",
    ),
    "megacode3": Columns(
        *("rombodawg/LosslessMegaCodeTrainingV3_2.2m_Evol", "USER", "ASSISTANT"),
        "LosslessMegaCodeTrainingV3_2.2m_Evol.json",
    ),
    "oa_leet10k": Columns("ehartford/oa_leet10k"),
    "evol_instruct_code": Columns("nickrosh/Evol-Instruct-Code-80k-v1", "instruction", "output"),
    "evol-codealpaca-v1": Columns("theblackcat102/evol-codealpaca-v1", "instruction", "output"),
    "wizardlm_70k": Columns("ehartford/WizardLM_alpaca_evol_instruct_70k_unfiltered", "instruction", "output"),
    "minimath": Columns("kentsui/minimath", "question", "answer"),
    "cot_submix_original": Columns("conceptofmind/cot_submix_original", "inputs", "targets"),
}
"""What Open-Assistant reads with one loader, by the names in its configurations."""


@dataclass(frozen=True)
class DollyOptions(PublishedOptions):
    """Languages of the multilingual copy to take, and what is removed from it."""

    lang: str | list[str] = "en,de,es,fr"
    """Splits (files named en-..., de-...) of a folder; records with another language are left out."""
    remove_citations: bool = True
    """Remove [2, 3], [1234], [a] and [citation needed] from contexts."""

    @property
    def languages(self) -> list[str]:
        names = self.lang.split(",") if isinstance(self.lang, str) else self.lang
        return [name.strip() for name in names]


def instruction(name: str) -> Callable[[dict[str, Any], str, FillOptions, Counter[str]], list[Conversation]]:
    """Return the function that reads a dataset of INSTRUCTIONS, records that filled.py has joined too."""
    columns = INSTRUCTIONS[name]

    def read(record: dict[str, Any], where: str, options: FillOptions, left_out: Counter[str]) -> list[Conversation]:
        if options.fill_min_length is not None and JOINED in record:
            return orca_chat(record, where, options, left_out)
        if options.leaves_out(_texts(record, (columns.question, columns.answer), where), left_out):
            return []
        return pair(get_text(record, columns.question, where), get_text(record, columns.answer, where), left_out)

    return read


def orca_chat(record: dict[str, Any], where: str, options: Any, left_out: Counter[str]) -> list[Conversation]:
    """Read {"instruction": the system message, "conversation": [{"input", "output"}]}."""
    turns = _system(record, where)
    for number, turn in enumerate(get_list(record, "conversation", where), 1):
        if not isinstance(turn, dict):
            raise DataError(f"{where}: turn {number} is {kind_of(turn)}, not an object with input and output")
        turns.append({"role": "user", "content": get_text(turn, "input", where)})
        turns.append({"role": "assistant", "content": get_text(turn, "output", where)})
    return keep(turns if turns and turns[-1]["role"] == "assistant" else [], left_out)


def dolly15k(record: dict[str, Any], where: str, options: DollyOptions, left_out: Counter[str]) -> list[Conversation]:
    """Read {"instruction", "context" (may be empty), "response"}. The context is a turn between question and answer."""
    language = record.get("lang") or record.get("language")
    if language and language not in options.languages:
        left_out["other language"] += 1
        return []
    return _dolly(record, ("instruction", "response"), record, "context", where, options, left_out)


def dolly15k_english(
    record: dict[str, Any], where: str, options: DollyOptions, left_out: Counter[str]
) -> list[Conversation]:
    """Read {"INSTRUCTION", "RESPONSE", "METADATA": {"CONTEXT"}}, the English dataset in Open-Assistant's own columns."""
    return _dolly(
        record, ("INSTRUCTION", "RESPONSE"), from_json(record.get("METADATA")), "CONTEXT", where, options, left_out
    )


def _dolly(
    record: dict[str, Any],
    keys: tuple[str, str],
    holder: Any,
    context_key: str,
    where: str,
    options: DollyOptions,
    left_out: Counter[str],
) -> list[Conversation]:
    if options.leaves_out(_texts(record, keys, where), left_out, spaces_are_blank=False):
        return []
    question, answer = (get_text(record, key, where) for key in keys)
    context = get_text(holder, context_key, where) if isinstance(holder, dict) and holder.get(context_key) else ""
    context = without_citations(context) if options.remove_citations else context
    turns = [{"role": "user", "content": question}, {"role": "context", "content": context}]
    return keep([*(turns if context else turns[:1]), {"role": "assistant", "content": answer}], left_out)


def alpaca_gpt4(record: dict[str, Any], where: str, options: Any, left_out: Counter[str]) -> list[Conversation]:
    """Read {"instruction", "input", "output"}. An input that says that there is none, or that the instruction repeats, is left out.

    Instruction and input are joined with one of LINKS, chosen by the record's hash.
    """
    question, given = get_text(record, "instruction", where), record.get("input") or ""
    given = get_text(record, "input", where) if given else ""
    if given and not any(word in given.lower() for word in _NO_INPUT) and given.lower() not in question.lower():
        link = LINKS[int(fingerprint([question, given]).removeprefix("xxh3:"), 16) % len(LINKS)]
        question = f"{question}{link}{given}"
    return pair(question, get_text(record, "output", where), left_out)


def dolphin(record: dict[str, Any], where: str, options: Any, left_out: Counter[str]) -> list[Conversation]:
    """Read {"instruction": the system message, "input", "output"}."""
    turns = _system(record, where)
    turns.append({"role": "user", "content": get_text(record, "input", where)})
    turns.append({"role": "assistant", "content": get_text(record, "output", where)})
    return keep(turns, left_out)


def _texts(record: dict[str, Any], keys: tuple[str, str], where: str) -> tuple[object, object]:
    """Return question and answer, None for the one that a record lacks: tables have no key where a value is null."""
    first, second = keys
    if first not in record and second not in record:
        get(record, first, where)
    return record.get(first), record.get(second)


def _system(record: dict[str, Any], where: str) -> Conversation:
    """Return the system turn, [] without one. One of blanks is kept, as Open-Assistant keeps it."""
    text = get_text(record, "instruction", where) if record.get("instruction") else ""
    return [{"role": "system", "content": text}] if text else []
