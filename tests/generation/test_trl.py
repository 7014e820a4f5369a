"""TRL's SFTTrainer with assistant_only_loss loads an export and masks the tokens that our shards train on."""

import json

import pytest

from examples.oasst.make_tiny_llama import TinyLlama, llama_config
from megatron_ft.data.chat_format import CHATML
from megatron_ft.data.chat_template import TemplateOptions, own_template
from megatron_ft.data.roles import are_spoken
from megatron_ft.data.tokenizer import load_tokenizer
from megatron_ft.data.tokenizer_export import export_tokenizer
from tests.data.families import CHATS, DATE, write
from tests.data.helpers import fast_file

pytest.importorskip("trl")
datasets, transformers = pytest.importorskip("datasets"), pytest.importorskip("transformers")
SAID = [CHATS[name] for name in ("one turn", "several turns", "system")]


@pytest.mark.parametrize("family", ["chatml", "qwen2.5", "zephyr", "llama3.1"])
def test_sft_trainer_masks_the_same_tokens(family, tmp_path):
    from trl import SFTConfig, SFTTrainer

    tokenizer, chat_format = _chatml(tmp_path) if family == "chatml" else _own(family, tmp_path)
    folder = tmp_path / "exported"
    export_tokenizer(tokenizer, folder, chat_format.exported, chat_format.stop_token, 512)
    config = llama_config(TinyLlama(str(folder), str(folder), 32, 1, 64), tokenizer.vocab_size, None, 0)
    (folder / "config.json").write_text(json.dumps(config))
    settings = SFTConfig(
        output_dir=str(tmp_path / "out"),
        assistant_only_loss=True,
        max_length=512,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    trainer = SFTTrainer(
        model=transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(folder)),
        args=settings,
        train_dataset=datasets.Dataset.from_list([{"messages": chat} for chat in SAID]),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    )
    rows = list(trainer.train_dataset)
    labels = trainer.data_collator(rows)["labels"]
    for row, masked, chat in zip(rows, labels, SAID, strict=True):
        ids, role_bytes = chat_format.encode(tokenizer, chat)
        spoken = are_spoken(role_bytes)
        assert row["input_ids"] == ids.tolist() and spoken.any() and not spoken.all()
        assert (masked[: len(ids)] != -100).tolist() == spoken.tolist() and (masked[len(ids) :] == -100).all()


def _chatml(folder):
    return load_tokenizer(fast_file(folder), CHATML.added_tokens), CHATML


def _own(family, folder):
    write(family, folder)
    tokenizer = load_tokenizer(folder)
    return tokenizer, own_template(tokenizer, TemplateOptions(DATE))
