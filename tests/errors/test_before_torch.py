"""Mistakes that are told at once: before torch is imported, and so before any process waits for another."""

import gzip
import json

import pytest

from megatron_ft.digests import write_digests
from megatron_ft.wording import counted
from tests.errors.conftest import copy, cut, finetune, write_chats


@pytest.fixture
def refused(desk, tmp_path):
    """Run a command line: exit code 2, one line on stderr with the message, nothing on stdout, nothing written, no torch."""

    def run(message, *argv, **request):
        before = sorted(tmp_path.rglob("*"))
        done = desk(*argv, **request)
        assert (done.code, done.out) == (2, ""), done
        assert_one_line(done.err, argv[0], message)
        assert sorted(tmp_path.rglob("*")) == before
        assert done.torch is False
        return done.err

    return run


def assert_one_line(stderr: str, command: str, message: str) -> None:
    import re

    assert stderr.count("\n") == 1 and stderr.startswith(f"megatron-ft {command}: error: "), stderr
    assert re.search(message, stderr), f"{message!r} is not in {stderr!r}"


def pretokenize(shop, tmp_path, source) -> list:
    return ["pretokenize", "--input", source, "--tokenizer", shop.tokenizer, "--output_prefix", tmp_path / "out" / "x"]


class TestPretokenize:
    def test_a_place_of_the_system(self, refused, shop):
        words = ["--input", shop.chats, "--tokenizer", shop.tokenizer, "--output_prefix", "/proc/foo/x"]
        refused(
            r"--output_prefix /proc/foo: /proc cannot be written to \(a folder of the system\)", "pretokenize", *words
        )

    def test_missing_chats(self, refused, shop, tmp_path):
        words = pretokenize(shop, tmp_path, tmp_path / "nowhere.jsonl")
        refused(r"nowhere\.jsonl: cannot be read .*check the path", *words)

    def test_missing_tokenizer(self, refused, shop, tmp_path):
        words = ["--input", shop.chats, "--tokenizer", tmp_path / "no.model", "--output_prefix", tmp_path / "out" / "x"]
        refused(r"no\.model: no such tokenizer; give a tokenizer\.model", "pretokenize", *words)

    def test_file_that_is_no_tokenizer(self, refused, shop, tmp_path):
        words = ["--input", shop.chats, "--tokenizer", shop.chats, "--output_prefix", tmp_path / "out" / "x"]
        refused(r"chats\.jsonl: .*SentencePiece", "pretokenize", *words)

    @pytest.mark.parametrize(
        "line, message",
        [
            ('{"messages": [', r"bad\.jsonl, line 41: not valid JSON .*repair or remove"),
            ('["a"]', r"bad\.jsonl, line 41: a list, an object was expected"),
            ('{"messages": [{"role": "cat", "content": "meow"}]}', r"bad\.jsonl, line 41: .*'cat'"),
            ('{"messages": [{"role": "user", "content": 3}]}', r"bad\.jsonl, line 41: .*not text"),
        ],
    )
    def test_bad_line(self, refused, shop, tmp_path, line, message):
        bad = write_chats(tmp_path / "bad.jsonl", 40)
        bad.write_text(bad.read_text() + line + "\n")
        refused(message, *pretokenize(shop, tmp_path, bad))

    def test_bytes_that_are_no_text(self, refused, shop, tmp_path):
        bad = write_chats(tmp_path / "bad.jsonl", 3)
        bad.write_bytes(bad.read_bytes() + b'{"messages": "\xff"}\n')
        refused(r"bad\.jsonl, line 4: byte 15 is not UTF-8", *pretokenize(shop, tmp_path, bad))

    def test_archive_cut_short(self, refused, shop, tmp_path):
        bad = tmp_path / "chats.jsonl.gz"
        bad.write_bytes(gzip.compress(shop.chats.read_bytes()))
        cut(bad)
        refused(r"chats\.jsonl\.gz: damaged archive", *pretokenize(shop, tmp_path, bad))

    def test_empty_file_and_unknown_shape(self, refused, shop, tmp_path):
        (tmp_path / "bad.jsonl").write_text("")
        refused(r"bad\.jsonl: contains no chats", *pretokenize(shop, tmp_path, tmp_path / "bad.jsonl"))
        (tmp_path / "bad.jsonl").write_text('{"weather": "fine"}\n')
        words = pretokenize(shop, tmp_path, tmp_path / "bad.jsonl")
        refused(r"bad\.jsonl, line 1: no known format has the keys weather", *words)

    def test_finished_shards_are_kept(self, refused, shop):
        prefix = shop.shards.removesuffix("-train")
        words = ["--input", shop.chats, "--tokenizer", shop.tokenizer, "--output_prefix", prefix, "--val_split", 0]
        refused(r"c-train-manifest\.json: these shards exist already; add --overwrite", "pretokenize", *words)

    def test_nothing_to_do(self, refused):
        refused("give --input FILE --tokenizer PATH", "pretokenize")


class TestFlags:
    @pytest.mark.parametrize(
        "words, message",
        [
            (["--train_iter", 3], "unknown flag --train_iter; did you mean --train_iters?"),
            (["--seq-lenght", 3], "unknown flag --seq-lenght; did you mean --seq_length?"),
            (["--learning_rate", 3], "unknown flag --learning_rate; here it is --lr"),
            (["--per_device_train_batch_size", 3], "here it is --micro_batch_size"),
            (["--num_train_epochs", 3], "here it is --epochs"),
            (["--lr", "fast"], "--lr.*fast.*number"),
            (["--lr_decay_style", "cosnie"], "--lr_decay_style.*cosnie.*cosine"),
            (["--bf16", "yes"], "yes"),
            (["--seq_length"], "--seq_length"),
        ],
    )
    def test_spelling(self, refused, shop, words, message):
        refused(message, *finetune(shop), *words)

    @pytest.mark.parametrize(
        "words, message",
        [
            (["--lr", "nan"], "--lr nan: must be above 0"),
            (["--min_lr", -1], "--min_lr -1.0: must be 0 or more"),
            (["--weight_decay", -1], "--weight_decay -1.0: must be 0 or more"),
            (["--adam_beta2", 1.5], "--adam_beta2 1.5: must be at least 0 and less than 1"),
            (["--seed", -1], "--seed -1: must be 0 or more"),
            (["--lr_decay_iters", 0], "--lr_decay_iters 0: must be at least 1"),
        ],
    )
    def test_numbers_out_of_range(self, refused, shop, words, message):
        refused(message, *finetune(shop), *words)

    def test_needed_and_not_given(self, refused):
        refused(r"needed and not given: --load, --data_path, --train_iters \(or --epochs\)", "finetune")

    @pytest.mark.parametrize(
        "text, message",
        [
            ("learning_rate: 3\n", r"x\.yaml, line 1: .*learning_rate; here it is lr"),
            ("seq_length: 128\nlr: fast\n", r"x\.yaml, line 2: lr.*fast"),
            ("lr: [1\n", r"x\.yaml, line"),
            ("lr: 1\nlr: 2\n", r"x\.yaml, line 2: .*lr.*(twice|already|again)"),
        ],
    )
    def test_configuration_file(self, refused, shop, tmp_path, text, message):
        (tmp_path / "x.yaml").write_text(text)
        refused(message, *finetune(shop), "--config", tmp_path / "x.yaml")
        refused(r"nowhere\.yaml", *finetune(shop), "--config", tmp_path / "nowhere.yaml")

    @pytest.mark.parametrize(
        "words, message",
        [
            (["--micro_batch_size", 3], "--global_batch_size 2 is not a multiple of --micro_batch_size 3 .*use --global_batch_size 3"),
            (["--micro_batch_size", 0], "--micro_batch_size 0: must be at least 1"),
            (["--train_iters", 0], "--train_iters 0: must be at least 1"),
            (["--lr", 0], r"--lr 0\.0: must be above 0"),
            (["--min_lr", 1], "--min_lr 1.0 is above --lr 0.001: lower --min_lr"),
            (["--lr_warmup_iters", 9], "--lr_warmup_iters 9 leaves nothing of the 2 step.*use at most 1"),
            (["--hidden_dropout", 1], "--hidden_dropout 1.0: must be at least 0 and less than 1"),
            (["--lima_dropout"], "no effect with --hidden_dropout 0"),
            (["--save_interval", 1], "--save_interval 1 without --save"),
            (["--async_save"], "--async_save without --save"),
            (["--save", "/tmp/none", "--save_retain_interval", 5], "--save_retain_interval 5 without --keep_last"),
        ],
    )  # fmt: skip
    def test_values(self, refused, shop, words, message):
        refused(message, *finetune(shop), *words)

    def test_batch_of_several_processes(self, refused, shop):
        launched = {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"}
        refused(
            "--global_batch_size 2 is not a multiple of --micro_batch_size 1 x data-parallel size 4 = 4: use --global_batch_size 4",
            *finetune(shop), env=launched,
        )  # fmt: skip


class TestLayout:
    @pytest.mark.parametrize("processes, tp, pp", [(1, 2, 1), (1, 2, 2), (6, 2, 2), (4, 8, 1)])
    def test_number_of_processes(self, refused, shop, processes, tp, pp):
        refused(
            rf"{counted(processes, 'process')} cannot hold .*{tp} x .*{pp} = {tp * pp}: start .*: --nproc_per_node {tp * pp}",
            *finetune(shop), *layout(tp, pp), env=launched(processes),
        )  # fmt: skip

    @pytest.mark.parametrize(
        "tp, pp, message",
        [
            (3, 1, "--tensor_model_parallel_size 3 does not divide the model's num_attention_heads 4; sizes that do: 1, 2, 4"),
            (4, 1, "--tensor_model_parallel_size 4 does not divide the model's num_query_groups 2"),
            (1, 3, "--pipeline_model_parallel_size 3 does not divide the model's num_layers 4"),
        ],
    )  # fmt: skip
    def test_sizes_of_the_model(self, refused, shop, tp, pp, message):
        refused(message, *finetune(shop, shop.dist), *layout(tp, pp), env=launched(tp * pp))

    def test_classic_checkpoint_of_another_layout(self, refused, shop):
        message = "classic format for TP2 x PP2, this run is TP1 x PP1: .*megatron-ft reshard"
        refused(message, *finetune(shop, shop.split))

    def test_sequence_parallel(self, refused, shop):
        message = "needs --seq_length 127 to be a multiple of --tensor_model_parallel_size 2: use --seq_length 126"
        words = [*layout(2, 1), "--sequence_parallel", "--seq_length", 127]
        refused(message, *finetune(shop, shop.dist), *words, env=launched(2))


def layout(tp: int, pp: int) -> list:
    return ["--tensor_model_parallel_size", tp, "--pipeline_model_parallel_size", pp]


def launched(processes: int) -> dict[str, str]:
    return {"WORLD_SIZE": str(processes), "RANK": "0", "LOCAL_RANK": "0"}


class TestFinetune:
    def test_missing_checkpoint(self, refused, shop, tmp_path):
        refused("nowhere: no such folder; give a checkpoint's root", *finetune(shop, tmp_path / "nowhere"))
        refused(
            r"hf is a Hugging Face model: convert it first, with megatron-ft hf-to-megatron", *finetune(shop, shop.hf)
        )

    @pytest.mark.parametrize(
        "kind, name",
        [
            ("classic", "mp_rank_00/model_optim_rng.pt"),
            ("dist", ".metadata"),
            ("dist", "common.pt"),
            ("dist", "metadata.json"),
        ],
    )
    def test_missing_file_of_a_checkpoint(self, refused, shop, tmp_path, kind, name):
        broken = copy(getattr(shop, kind), tmp_path / "broken")
        (broken / "release" / name).unlink()
        refused(rf"release/{name} is missing .*copy or convert it again", *finetune(shop, broken))

    def test_configuration_of_a_checkpoint(self, refused, shop, tmp_path):
        broken = copy(shop.classic, tmp_path / "broken")
        config = broken / "release" / "config.json"
        cut(config)
        refused(r"release/config\.json has \d+ bytes, \d+ were written: it is cut short", *finetune(shop, broken))
        (broken / "release" / "digests.json").unlink()
        refused(r"release/config\.json, line \d+: not valid JSON", *finetune(shop, broken))
        config.write_text('{"format_version": 9}')
        refused("format_version 9, this version reads 1", *finetune(shop, broken))

    def test_save_that_is_a_checkpoint_or_a_model(self, refused, shop):
        for folder in (shop.dist / "release", shop.trained / "iter_0000002", shop.hf):
            refused("--save .* is itself a checkpoint, or a model: give the folder", *finetune(shop, save=folder))

    @pytest.mark.parametrize("flag", ["save", "run_dir", "log_dir", "tensorboard_dir"])
    def test_places_of_the_system(self, refused, shop, flag):
        message = rf"--{flag} /proc/foo: /proc cannot be written to \(a folder of the system\); choose another place"
        refused(message, *finetune(shop), f"--{flag}", "/proc/foo", "--nproc_per_node", 1)

    def test_missing_shards(self, refused, shop, tmp_path):
        refused(r"c-train-manifest\.json: no such file; give the prefix", *finetune(shop, data=tmp_path / "c-train"))

    @pytest.mark.parametrize("name", ["text.bin", "text.idx", "role.bin", "role.idx", "manifest.json"])
    def test_damaged_shards(self, refused, shop, tmp_path, name):
        folder = copy(shop.root / "shards", tmp_path / "shards")
        cut(folder / f"c-train-{name}")
        refused(rf"shards/c-train-{name}: .*pretokenize", *finetune(shop, data=folder / "c-train"))

    @pytest.mark.parametrize("name", ["train-text.bin", "train-role.bin", "val-text.bin"])
    def test_flipped_bit_in_shards(self, refused, shop, tmp_path, name):
        folder = copy(shop.root / "shards", tmp_path / "shards")
        content = bytearray((folder / f"c-{name}").read_bytes())
        content[len(content) // 2] ^= 1
        (folder / f"c-{name}").write_bytes(content)
        refused(rf"shards/c-{name}: its bytes are not those .*copy", *finetune(shop, data=folder / "c-train"))

    def test_damaged_validation_shards(self, refused, shop, tmp_path):
        folder = copy(shop.root / "shards", tmp_path / "shards")
        cut(folder / "c-val-text.bin")
        refused(r"shards/c-val-text\.bin: .*pretokenize", *finetune(shop, data=folder / "c-train"))

    def test_another_tokenizer(self, refused, shop, tmp_path):
        """Larger than the model's vocabulary, and of a size that fits but other pieces."""
        refused(
            r"foreign/c-train: tokenized for a vocabulary of 312, the model's has 302; convert the model with the same",
            *finetune(shop, data=shop.foreign),
        )  # fmt: skip
        wide = copy(shop.classic, tmp_path / "wide")
        config = wide / "release" / "config.json"
        content = json.loads(config.read_text())
        content["architecture"]["vocab_size"] = 320
        config.write_text(json.dumps(content))
        write_digests(wide / "release")
        refused(
            r"made with another tokenizer \(sentencepiece, 312 tokens.*\) than the model's \(sentencepiece, 302 tokens.*pretokenize again",
            *finetune(shop, wide, shop.foreign),
        )  # fmt: skip

    def test_vocabulary_without_the_added_tokens(self, refused, shop):
        message = "tokenized for a vocabulary of 302, the model's has 300; convert the model with the same extra tokens"
        refused(message, *finetune(shop, shop.bare))

    def test_no_supervised_token(self, refused, shop):
        message = r"q-train: no supervised token, every loss weight is 0 .*--scalar_loss_mask 1"
        refused(message, *finetune(shop, data=shop.questions))

    def test_more_positions_than_the_model_has(self, refused, shop):
        refused("--seq_length 256 is beyond the model's 128 positions", *finetune(shop), "--seq_length", 256)

    def test_training_state_in_weights_alone(self, refused, shop, tmp_path):
        """A conversion renamed as an iteration: there is nothing to resume."""
        kind = renamed_as_iteration(shop.classic, tmp_path / "classic")
        refused(r"iter_0000005.*weights only, no training state to resume: .*--finetune", *finetune(shop, kind))


class TestGenerate:
    def test_what_to_ask(self, refused, shop, tmp_path):
        load = ["generate", "--load", shop.classic]
        refused("give either --prompt .* or --prompts", *load)
        refused(r"nowhere\.jsonl: cannot be read", *load, "--prompts", tmp_path / "nowhere.jsonl")
        bad = tmp_path / "bad.jsonl"
        bad.write_text('{"prompt": "a"}\n\n{"prompt": \n')
        refused(r"bad\.jsonl, line 3: not valid JSON", *load, "--prompts", bad, "--output", tmp_path / "out.jsonl")
        bad.write_text('{"prompt": "a"}\n{"question": "a"}\n')
        refused(r"bad\.jsonl, line 2: needs .*prompt", *load, "--prompts", bad, "--output", tmp_path / "out.jsonl")
        refused("--top_p must be above 0", *load, "--prompt", "a", "--top_p", 0)

    def test_missing_checkpoint(self, refused, tmp_path):
        message = "nowhere: no such folder; give a checkpoint or an exported"
        refused(message, "generate", "--load", tmp_path / "nowhere", "--prompt", "a")
        refused(message, "chat", tmp_path / "nowhere")


def renamed_as_iteration(source, target):
    root = copy(source, target)
    folder = (root / "release").rename(root / "iter_0000005")
    (root / "latest_checkpointed_iteration.txt").write_text("5\n")
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "iteration": 5}))
    write_digests(folder)
    return root
