"""Rank pools, one per size and module, and the tiny model and shards that the parallel tests share."""

import numpy as np
import pytest

from megatron_ft.data.roles import ASSISTANT, PROMPTER
from megatron_ft.data.shards import ShardWriter
from tests.parallel.jobs import VOCAB, make_llama, to_checkpoint


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A random four-layer Llama with grouped KV heads and an odd vocabulary, as a Hugging Face folder."""
    return make_llama(tmp_path_factory.mktemp("llama") / "hf")


@pytest.fixture(scope="session")
def checkpoint(llama, tmp_path_factory):
    """The same weights in torch_dist, which loads into any layout."""
    return to_checkpoint(llama, tmp_path_factory.mktemp("checkpoint") / "torch_dist", "torch_dist", 1, 1)


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Prefix of 120 random conversations; the share of supervised tokens differs wildly between them."""
    prefix = tmp_path_factory.mktemp("shards") / "chats-train"
    rng = np.random.default_rng(7)
    with ShardWriter(prefix, VOCAB) as writer:
        for sample in range(120):
            count = int(rng.integers(4, 70))
            roles = np.where(rng.random(count) < (sample % 10) / 10, ASSISTANT, PROMPTER)
            writer.add(rng.integers(0, VOCAB, count), roles.astype(np.uint8))
    return str(prefix)
