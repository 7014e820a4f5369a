"""What is compiled on a GPU, traced by Dynamo in a whole step: each function is one graph, however many layers and steps call it."""

from __future__ import annotations

import pytest

from tests.gpu_path.scenarios import SCENARIOS

SWIGLU, GEGLU = "megatron.core.fusions.fused_bias_swiglu.swiglu", "megatron.core.fusions.fused_bias_geglu.geglu"
CROSS_ENTROPY = "megatron_ft.models.cross_entropy."
DROPOUT = "megatron_ft.models.dropout."


@pytest.fixture(scope="module")
def traced(gpus):
    """A scenario's compiled functions whose names begin so: {name: (calls, graphs, what Dynamo had against it)}; walked once."""
    walked = {}

    def of(scenario: str, prefix: str, backend: str = "aot_eager") -> dict[str, tuple[int, int, str | None]]:
        if (scenario, backend) not in walked:
            walked[scenario, backend] = gpus.walk(SCENARIOS[scenario], trace_with=backend)[0]
        rank = walked[scenario, backend]
        names = [name for name in rank.compiled_calls if name.startswith(prefix)]
        return {name: (rank.compiled_calls[name], rank.graphs[name], rank.not_compiled.get(name)) for name in names}

    return of


def _check(found: dict, at_least: int, graphs: int = 1) -> None:
    assert found, "nothing of it was compiled"
    for name, (calls, made, failure) in found.items():
        assert failure is None, f"{name}: {failure}"
        assert calls >= at_least, f"{name} was called {calls} times only"
        assert made <= graphs, f"{name}: {made} graphs"


STEPS, MICROBATCHES, LAYERS = 2, 8, 4


def test_the_activation_is_one_graph_forward_and_backward(traced):
    found = traced("bf16-lima", SWIGLU)
    assert set(found) == {SWIGLU, SWIGLU + "_back"}
    _check(found, STEPS * MICROBATCHES * LAYERS)


def test_geglu_is_not_the_engine_s_which_is_an_approximation(traced):
    assert not traced("bf16-qwen", GEGLU) and traced("bf16-qwen", CROSS_ENTROPY)


def test_the_loss_is_one_graph_a_part(traced):
    found = traced("bf16-lima", CROSS_ENTROPY)
    assert len(found) == 3  # peak, sums, gradient
    _check(found, STEPS * MICROBATCHES)


def test_residual_dropout_is_one_graph_over_layers_with_rates_of_their_own(traced):
    found = traced("bf16-lima", DROPOUT)
    assert set(found) == {DROPOUT + "_dropped_add", DROPOUT + "_dropped"}  # forward, backward
    _check(found, STEPS * MICROBATCHES * (LAYERS - 1))


@pytest.mark.thorough
def test_recomputed_layers_add_no_graph_of_residual_dropout(traced):
    _check(traced("bf16-full-lima", DROPOUT), STEPS * MICROBATCHES * (LAYERS - 1))


@pytest.mark.thorough
def test_a_recomputed_activation_adds_one_graph_for_no_gradients(traced):
    _check(traced("bf16-full-lima", SWIGLU), STEPS * MICROBATCHES * LAYERS, graphs=2)


@pytest.mark.thorough
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_fp16(traced, backend):
    _check(traced("fp16", SWIGLU, backend), STEPS * MICROBATCHES * LAYERS)
