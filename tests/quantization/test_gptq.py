"""GPTQ: its numbers against a plain form of the algorithm, by hand, and how codes are packed."""

import importlib.util
import sys

import pytest
import torch

from benchmarks import gptq as beside
from megatron_ft.quantization.gptq import Codes, Grid, nearest, output_error, quantise, scales_of
from megatron_ft.quantization.packed import compressed_tensors, gptq_tensors, unpacked, words


def inputs(columns: int, rows: int = 1024) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    size = torch.rand(columns, generator=generator) * 2
    return torch.randn(rows, columns, generator=generator) @ mix * size


def matrix(rows: int = 24, columns: int = 192) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(2)) * 0.02


def optimal_brain(weight, hessian, grid):
    """Optimal brain quantisation in the order of the columns, without Cholesky factors: the inverse is updated after each column."""
    weight, hessian = weight.double().clone(), hessian.double().clone()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    inverse, codes = torch.linalg.inv(hessian), torch.zeros_like(weight)
    for column in range(weight.shape[1]):
        if column % grid.group_size == 0:
            scale, zero = scales_of(weight[:, column : column + grid.group_size], grid)
        codes[:, column] = (torch.round(weight[:, column] / scale.double()) + zero).clamp(0, grid.largest)
        error = weight[:, column] - scale.double() * (codes[:, column] - zero)
        weight[:, column:] -= torch.outer(error, inverse[column, column:]) / inverse[column, column]
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes.int()


@pytest.mark.parametrize("group_size", [32, 96])
def test_equals_optimal_brain_quantisation(group_size):
    x, grid = inputs(192), Grid(group_size=group_size)
    ours = quantise(matrix(), 2 * x.t() @ x, grid).codes
    assert (ours != optimal_brain(matrix(), 2 * x.t() @ x, grid)).float().mean() < 0.001


@pytest.mark.parametrize(
    "grid", [Grid(), Grid(static_groups=True), Grid(symmetric=True, static_groups=True), Grid(bits=8), Grid(bits=2)]
)
def test_errors_fall_with_gptq_and_again_with_the_order(grid):
    x = inputs(192)
    hessian = 2 * x.t() @ x
    plain = nearest(matrix(), grid)
    ordered = Grid(**{**grid.__dict__, "desc_act": True})
    errors = [
        output_error(matrix(), codes.dense(), hessian)
        for codes in (plain, quantise(matrix(), hessian, grid), quantise(matrix(), hessian, ordered))
    ]
    assert errors[0] > errors[1] > errors[2]
    wanted = ((x @ (matrix() - plain.dense()).t()).norm() / (x @ matrix().t()).norm()).item()
    assert errors[0] == pytest.approx(wanted, rel=1e-4)


def test_by_hand():
    """15 steps of 0.1 from -0.5 to 1; the zero point is code 5."""
    weight = torch.tensor([[-0.5, 1.0, 0.0, 0.3]])
    found = nearest(weight, Grid(group_size=4, scale_dtype=torch.float32))
    assert found.codes.tolist() == [[0, 15, 5, 8]] and found.zeros.tolist() == [[5]]
    torch.testing.assert_close(found.dense(), weight)


def test_rows_without_negative_weights_keep_their_range():
    weight = torch.tensor([[0.1, 1.4, 0.7, 0.0], [0.0, 0.0, 0.0, 0.0]])
    found = nearest(weight, Grid(group_size=4, scale_dtype=torch.float32))
    assert found.zeros.tolist() == [[1], [1]]
    torch.testing.assert_close(found.dense(), weight)


def test_inputs_that_are_always_zero():
    x = inputs(64)
    x[:, 5] = 0
    found = quantise(matrix(8, 64), 2 * x.t() @ x, Grid(desc_act=True))
    assert (found.dense()[:, 5] == 0).all() and found.dense().isfinite().all()


def test_rows_do_not_depend_on_each_other():
    x = inputs(192)
    whole = quantise(matrix(), 2 * x.t() @ x, Grid(desc_act=True))
    parts = [quantise(part, 2 * x.t() @ x, Grid(desc_act=True)) for part in matrix().chunk(2)]
    assert torch.equal(torch.cat([part.codes for part in parts]), whole.codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words(bits):
    values = torch.randint(0, 2**bits, (3, 64), generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpacked(words(values, bits), bits, 64), values.int())


def test_words_by_hand():
    assert words(torch.tensor([1, 2, 3, 4, 5, 6, 7, 8]), 4).tolist() == [0x87654321 - 2**32]
    assert words(torch.tensor([15]), 4).tolist() == [15]


def test_both_formats_by_hand():
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]] * 8).int()
    zeros = torch.tensor([[1], [2], [3], [4], [5], [6], [7], [8]]).int()
    found = Codes(codes, torch.ones(8, 1), zeros, torch.zeros(8).int())
    gptq = gptq_tensors(found, Grid())
    assert gptq["qweight"].tolist() == [[0x87654321 - 2**32] * 8]  # [in / 8, out]
    assert gptq["qzeros"].tolist() == [[0x76543210]]  # [groups, out / 8], less 1
    packed = compressed_tensors(found, Grid())
    assert packed["weight_packed"].tolist() == [[0x87654321 - 2**32]] * 8  # [out, in / 8]
    assert packed["weight_shape"].tolist() == [8, 8]


@pytest.mark.parametrize("grid", beside.grids(4, [32, 128]), ids=beside.described)
def test_errors_are_at_most_those_of_the_reference_implementation(grid):
    if importlib.util.find_spec("gptqmodel") is None:
        pytest.skip("gptqmodel is not installed")
    matrices = [beside.drawn(rows=192, columns=256, tokens=1024, seed=seed) for seed in range(1, 5)]
    mine, theirs = (beside.measured(method, matrices, grid).error for method in (beside.ours, beside.reference))
    assert 0 < mine <= theirs * beside.AT_MOST


def test_the_benchmark_says_what_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gptqmodel", None)
    monkeypatch.setattr(sys, "argv", ["gptq.py"])
    assert beside.main() == 2 and "pip install" in capsys.readouterr().err
