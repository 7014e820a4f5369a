"""Train a small Falcon-like model with ReLU, and with a penalty that makes its activations sparse, on real text: Python's own library.

    python benchmarks/sparse_model.py MODEL [--steps 1000] [--zeros 0.94] [--hidden 256] [--layers 4]

MODEL becomes a Hugging Face folder (FalconForCausalLM, activation relu) with a tokenizer and `held-out.txt`, `train.txt`. Training is a
plain torch loop. The penalty is the mean of the activations times a factor that rises while fewer than --zeros of them are zero.
"""

import argparse
import os
import random
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import FalconConfig, FalconForCausalLM, PreTrainedTokenizerFast

VOCABULARY, LENGTH, ROWS = 2048, 256, 8


def texts(limit: int = 12_000_000) -> tuple[str, str]:
    """Return (training, held out): the library's sources in an order by seed; every 40th file is held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)
    random.Random(0).shuffle(files)
    found: tuple[list[str], list[str]] = ([], [])
    for number, path in enumerate(files):
        try:
            found[number % 40 == 0].append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
    return "\n".join(found[0])[:limit], "\n".join(found[1])[:400_000]


def make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    made.train_from_iterator([text[:3_000_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")


def make_model(hidden: int, layers: int) -> FalconForCausalLM:
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 32, num_kv_heads=2,
        ffn_hidden_size=4 * hidden, activation="relu", new_decoder_architecture=True, parallel_attn=True, bias=False, alibi=False,
        max_position_embeddings=2048, hidden_dropout=0.0, attention_dropout=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return FalconForCausalLM(config)


class Activations:
    """Collects the mean and the share of zeros of every layer's activations in a pass."""

    def __init__(self, model: FalconForCausalLM):
        self.means: list[torch.Tensor] = []
        self.zeros: list[float] = []
        for layer in model.transformer.h:
            layer.mlp.act.register_forward_hook(self._take)

    def _take(self, module: object, inputs: object, output: torch.Tensor) -> None:
        self.means.append(output.mean())
        self.zeros.append(float((output == 0).float().mean()))

    def take(self) -> tuple[torch.Tensor, float]:
        """Return (sum of the means, share of zeros) since the last call."""
        means, zeros = sum(self.means), sum(self.zeros) / len(self.zeros)
        self.means, self.zeros = [], []
        return means, zeros


def train(model: FalconForCausalLM, ids: torch.Tensor, steps: int, wanted: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    activations, factor, started = Activations(model), 0.01, time.monotonic()
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        starts = torch.randint(len(ids) - LENGTH, (ROWS,), generator=generator)
        rows = torch.stack([ids[at : at + LENGTH] for at in starts.tolist()])
        loss = model(input_ids=rows, labels=rows).loss
        means, zeros = activations.take()
        (loss + factor * means).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        if step > steps // 10:
            factor *= 1.03 if zeros < wanted else 0.97
        if step % 50 == 0 or step == steps - 1:
            seconds = time.monotonic() - started
            print(f"step {step} loss {loss:.3f} zeros {zeros:.3f} factor {factor:.3f}, {seconds:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--zeros", type=float, default=0.94)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    training, held_out = texts()
    tokenizer = make_tokenizer(training)
    ids = torch.tensor(tokenizer(training)["input_ids"])
    model = make_model(options.hidden, options.layers)
    print(
        f"{model.num_parameters():,} parameters, {len(ids):,} tokens of text, {options.steps * ROWS * LENGTH:,} are used"
    )
    train(model, ids, options.steps, options.zeros)
    model.save_pretrained(options.folder)
    tokenizer.save_pretrained(options.folder)
    (options.folder / "held-out.txt").write_text(held_out, encoding="utf-8")
    (options.folder / "train.txt").write_text(training[:4_000_000], encoding="utf-8")


if __name__ == "__main__":
    main()
