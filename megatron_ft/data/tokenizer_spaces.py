"""Where a tokenizer of the SentencePiece kind puts a space before text: before each text, before the first one only, or never.

A tokenizer.json says it, unless tokenizer_config.json names Llama's class, which puts its own rule in the place of the file's
(transformers 5). A tokenizer.model alone puts one before each text.
"""

from typing import Any

SPACE = "▁"
_LLAMA = "LlamaTokenizer"
# Models for which transformers reads tokenizer.json as it stands, whatever class is named.
_AS_IT_STANDS = ("mistral", "mixtral", "mistral3", "phi3", "phimoe", "stablelm", "granite", "olmo2", "internlm2")
_PREPENDED = [{"type": "Prepend", "prepend": SPACE}, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]


def rule_of_class(config: dict[str, Any], description: dict[str, Any] | None, model_type: str | None) -> str | None:
    """Return the rule of the class in tokenizer_config.json: always, first or never; None if the files themselves contain it."""
    named = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if named != _LLAMA or model_type in _AS_IT_STANDS or config.get("auto_map") or _is_byte_level(description or {}):
        return None
    if config.get("add_prefix_space") is False:
        return "never"
    return "always" if config.get("legacy") else "first"


def with_rule(description: dict[str, Any], rule: str) -> dict[str, Any]:
    """Return a tokenizer.json with the rule of Llama's class."""
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if rule != "never" else []
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip
    ]  # fmt: skip
    return {
        **description,
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": rule, "split": False},
        "decoder": {"type": "Sequence", "decoders": decoders},
    }


def are_before_each_text(description: dict[str, Any], normalizer: dict[str, Any]) -> bool:
    """Return whether a tokenizer.json puts its space where a SentencePiece model does. normalizer: of the model, said in that form."""
    own = description.get("normalizer")
    return description.get("pre_tokenizer") is None and (
        own == normalizer or (own or {}).get("normalizers") == _PREPENDED
    )


def _is_byte_level(description: dict[str, Any]) -> bool:
    parts = [description.get("pre_tokenizer") or {}, description.get("decoder") or {}]
    steps = [step for part in parts for step in (part, *part.get("pretokenizers", []), *part.get("decoders", []))]
    return any(step.get("type") == "ByteLevel" for step in steps)
