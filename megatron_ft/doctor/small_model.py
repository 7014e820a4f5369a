"""The tiny Llama that the checks train, with random weights and chats, without files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from megatron_ft.config.sections import Batch, Data, Kernels, Numerics, Optimizer, Parallelism
from megatron_ft.data.loader import ChatDataset, Choices
from megatron_ft.data.roles import loss_weights
from megatron_ft.engine.optimizer import make_optimizer, make_schedule
from megatron_ft.engine.parallel import process_groups
from megatron_ft.models.architecture import Architecture
from megatron_ft.training import setup
from megatron_ft.training.invariance import ROWS, MadeUpChats, make_up_weights
from megatron_ft.training.step import Stepper, StepResult

SEQ_LENGTH = 64
SEED = 1234
LLAMA = Architecture(
    family="llama", num_layers=4, hidden_size=256, ffn_hidden_size=704, num_attention_heads=4, num_query_groups=2,
    head_dim=64, vocab_size=203, max_position_embeddings=256, norm_epsilon=1e-5,
)  # fmt: skip
"""Grouped heads of size 64, as flash kernels require; an odd vocabulary size, so that its padding differs between layouts."""


@contextlib.contextmanager
def training(
    arch: Architecture,
    numerics: Numerics,
    kernels: Kernels | None = None,
    seq_length: int = SEQ_LENGTH,
    rows: int = ROWS,
) -> Iterator[Callable[[int], StepResult]]:
    """Provide a function that takes one optimizer step on one process, over the packed rows after the first `consumed`."""
    with process_groups(seed=SEED) as layout:
        data = Data(seq_length=seq_length)
        chunks = setup.make_model(arch, layout, data, Parallelism(), numerics, kernels)
        section = Optimizer(lr=1e-3, lr_decay_style="constant")
        optimizer = make_optimizer(chunks, section, numerics, distributed=False)
        make_schedule(optimizer, section, Batch(train_iters=1000)).step(increment=1)
        make_up_weights(setup.bare(chunks), arch)
        optimizer.reload_model_params()
        chats = MadeUpChats(arch.vocab_size, seq_length, SEED)
        dataset = ChatDataset([chats], loss_weights(), Choices(seq_length, SEED))
        stepper = Stepper(chunks, layout, 1, rows, dropout_seed=SEED if numerics.hidden_dropout else None)
        yield lambda consumed: stepper.train(dataset, consumed, optimizer)
