"""Load the exported model with transformers alone and ask it what megatron-ft was asked: are the greedy answers the same?

    python compare_answers.py EXPORT_FOLDER ANSWERS.jsonl MAX_NEW_TOKENS

ANSWERS.jsonl is what `megatron-ft generate --prompts FILE --output ANSWERS.jsonl` wrote. Nothing of megatron_ft is
imported: this is what whoever is given the export would run. Compared word by word, since the two print another space
where a control token stands in the middle of an answer. Exit code 1 where an answer differs.
"""

import json
import sys
from pathlib import Path


def main(export: str, answers: str, max_new_tokens: str) -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(export)
    model = AutoModelForCausalLM.from_pretrained(export).eval()
    entries = [json.loads(line) for line in Path(answers).read_text(encoding="utf-8").splitlines()]
    different = 0
    for entry in entries:
        answer = greedy_answer(model, tokenizer, entry["messages"], int(max_new_tokens))
        if answer.split() != entry["answer"].split():
            different += 1
            print(f"{entry['messages']}\n  megatron-ft   {entry['answer']!r}\n  transformers  {answer!r}")
    print(f"loaded by transformers: {len(entries) - different} of {len(entries)} greedy answers are the same")
    return 1 if different else 0


def greedy_answer(model, tokenizer, messages: list[dict[str, str]], max_new_tokens: int) -> str:
    """The assistant's next message. It ends at the stop token that the export's generation_config.json names."""
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
