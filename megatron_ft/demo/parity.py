"""Compare the exported model in transformers with its checkpoint, in one process.

`python -m megatron_ft.demo.parity RUN_DIR` writes RUN_DIR/parity.json. The checkpoint was trained on four processes and is loaded
here on one. transformers loads the export without any code of this project.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ft.config.cli import Command, run_script
from megatron_ft.data.tokenizer import load_tokenizer
from megatron_ft.demo.answers import MAX_NEW_TOKENS, Answer, read_answers
from megatron_ft.files import write_json

RESULT = "parity.json"
_BATCH = 64


@dataclass
class Parity:
    """Comparison"""

    run_dir: str = field(default="runs/demo", metadata={"required": True})
    """folder of the demo"""
    prompts: int = 48
    """number of held-out questions to compare"""


COMMAND = Command(
    name="demo.parity",
    summary="compare the export in transformers with its checkpoint",
    sections=(Parity,),
    positional=("run_dir",),
)


def run(options: Parity) -> None:
    folder = Path(options.run_dir)
    recorded = read_answers(folder / "after.jsonl")
    recorded = recorded[:: max(1, len(recorded) // options.prompts)][: options.prompts]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "hf", padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder / "hf").eval()
    answers = _answers(model, tokenizer, recorded)
    texts = [_conversation(tokenizer, answer) for answer in recorded]
    difference, largest = _logits_difference(model, folder / "tuned", texts)
    write_json(
        folder / RESULT,
        {
            "prompts": len(recorded),
            "same_answers": sum(_same(theirs, ours, folder) for theirs, ours in zip(answers, recorded, strict=True)),
            "hf_logits_max_abs_diff": difference,
            "largest_logit": largest,
            "positions": sum(len(text) for text in texts),
        },
    )


def _answers(model: Any, tokenizer: Any, recorded: list[Answer]) -> list[tuple[str, list[int]]]:
    """Return transformers' greedy answers as text and ids, ended as the export's generation_config.json defines."""
    answers = []
    for start in range(0, len(recorded), _BATCH):
        prompts = [[{"role": "user", "content": answer.question}] for answer in recorded[start : start + _BATCH]]
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        batch = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
        )
        new = output[:, batch["input_ids"].shape[1] :].tolist()
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        answers += [(text.strip(), ids) for text, ids in zip(texts, new, strict=True)]
    return answers


def _same(theirs: tuple[str, list[int]], ours: Answer, folder: Path) -> bool:
    """Return True if both texts are the same; for invalid UTF-8, if our tokenizer decodes their ids to our text.

    An untrained model generates invalid UTF-8. SentencePiece and tokenizers then give different numbers of replacement characters.
    """
    text, ids = theirs
    if text == ours.text or "\ufffd" not in text:
        return text == ours.text
    return load_tokenizer(folder / "hf").decode(ids, skip_special=True).strip() == ours.text


def _conversation(tokenizer: Any, answer: Answer) -> list[int]:
    """Return the ids of the question and the model's answer in the chat template."""
    messages = [{"role": "user", "content": answer.question}, {"role": "assistant", "content": answer.text}]
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]


def _logits_difference(model: Any, checkpoint: Path, texts: list[list[int]]) -> tuple[float, float]:
    """Return (largest absolute difference of any logit at any position, largest absolute logit)."""
    import torch

    from megatron_ft.engine.parallel import process_groups
    from megatron_ft.generation.loading import open_chat_model

    differences, sizes = [], []
    with process_groups() as layout, torch.no_grad():
        ours = open_chat_model(checkpoint, layout).decoder.model
        for text in texts:
            ids = torch.tensor([text])
            theirs = model(ids).logits
            mine = ours(ids, torch.arange(len(text))[None], None)[..., : theirs.shape[-1]]
            differences.append((mine - theirs).abs().max())
            sizes.append(theirs.abs().max())
    # torch's max, not Python's: its result is NaN if a value is NaN.
    return float(torch.stack(differences).max()), float(torch.stack(sizes).max())


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))
