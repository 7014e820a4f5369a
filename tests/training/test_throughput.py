"""Operations counted against the published figures and by hand; peaks by the name that a driver reports."""

import dataclasses

import numpy as np
import pytest
import torch

from megatron_ft.data.loader import ChatDataset, Choices
from megatron_ft.models.architecture import Architecture
from megatron_ft.training.throughput import matrix_weights, pairs, peak_tflops, step_flops
from tests.training.test_packing import Memory

LLAMA_7B = Architecture(
    family="llama", num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32, num_query_groups=32,
    head_dim=128, vocab_size=32000, max_position_embeddings=4096, norm_epsilon=1e-5,
)  # fmt: skip


def test_weights_are_those_of_the_model():
    """6.738 B parameters less the embedding (131 M) and the norms (65 x 4096)."""
    assert matrix_weights(LLAMA_7B) == 6_738_415_616 - 32000 * 4096 - 65 * 4096


@pytest.mark.parametrize("window", [None, 3])
def test_pairs_by_counting(window):
    lengths = [1, 2, 7, 5]
    counted = sum(min(position + 1, window or position + 1) for n in lengths for position in range(n))
    assert pairs(np.array(lengths), window) == counted


def test_operations_against_torchs_own_counter():
    """A tiny Llama forward and backward under torch's counter, which takes attention for full: pairs = n^2."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=203, attn_implementation="eager",
    )  # fmt: skip
    arch = dataclasses.replace(
        LLAMA_7B, num_layers=3, hidden_size=64, ffn_hidden_size=160, num_attention_heads=8, num_query_groups=4, head_dim=8,
        vocab_size=203,
    )  # fmt: skip
    model, ids = LlamaForCausalLM(config), torch.randint(0, 203, (2, 32))
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    assert step_flops(arch, 64, 2 * 32 * 32) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("packed", [True, False])
def test_lengths_of_a_microbatch_leave_padding_out(packed):
    data = ChatDataset([Memory([5, 4, 9])], np.array([0, 0, 1, 0]), Choices(16, packed=packed, shuffle=False))
    batch = data.microbatch(range(len(data.epoch_rows(0))))
    assert sorted(batch.sample_lengths.tolist()) == [3, 4, 8] and batch.real_tokens == 15


PEAKS = [
    ("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA L40S", 362), ("NVIDIA B200", 2250), ("AMD Instinct MI300X", 1307), ("Tesla T4", 65),
    ("NVIDIA A10G", 70), ("NVIDIA A10", 125), ("NVIDIA L4", 121), ("NVIDIA Unheard-of", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "peak"), PEAKS)
def test_peaks(name, peak):
    assert peak_tflops(name) == peak


def test_metrics_on_a_gpu(one_rank):
    """What the loop would log on an H200: the device's name is a stand-in, the arithmetic is not."""
    assert one_rank.run(logged)[0] == pytest.approx({"train/tflops": 2.0, "train/mfu": 2 / 989})


def logged():
    from types import SimpleNamespace

    from megatron_ft import device
    from megatron_ft.training import loop
    from megatron_ft.training.step import StepResult

    original, device.gpu_name = device.gpu_name, lambda: "NVIDIA H200"
    try:
        run = SimpleNamespace(architecture=LLAMA_7B, stepper=SimpleNamespace(layout=SimpleNamespace(world_size=4)))
        result = StepResult(1.0, tokens=1000, supervised_tokens=10, seen=5e5)
        seconds = step_flops(LLAMA_7B, 1000, 5e5) / (4 * 2e12)
        return loop._throughput(run, result, seconds)
    finally:
        device.gpu_name = original
