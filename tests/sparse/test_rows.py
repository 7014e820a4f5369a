"""The kernel and torch's sums: the same bits, whatever the precision, the threads and the rows that are left out."""

import os
import subprocess
import sys

import pytest
import torch

from megatron_ft.sparse import build, reference
from megatron_ft.sparse import rows as rows_module
from megatron_ft.sparse.rows import TYPES, Rows

ROWS, COLUMNS = 1030, 200  # neither a multiple of anything that the kernel takes at once


@pytest.fixture(params=list(TYPES))
def one(request):
    torch.manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS)
    activations = torch.relu(torch.randn(ROWS) - 1.5)
    return weight, Rows.of(weight, request.param), torch.randn(COLUMNS), activations


@pytest.fixture(params=["kernel", "torch"])
def computed_by(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(rows_module, "kernel", lambda: None)
    elif rows_module.kernel() is None:
        pytest.skip("there is no C compiler here")
    return request.param


def alive(activations):
    return activations.nonzero()[:, 0].int()


def test_leaving_zeros_out_changes_no_bit(one, computed_by):
    _, matrix, x, activations = one
    rows = alive(activations)
    assert 0 < len(rows) < ROWS / 8
    assert torch.equal(matrix.sums(activations), matrix.sums(activations, rows))
    whole, some = matrix.products(x), matrix.products(x, rows)
    assert torch.equal(whole[rows], some[rows])
    assert not some[activations == 0].any() and whole[activations == 0].all()


def test_kernel_and_torch_have_the_same_bits(one, monkeypatch):
    if rows_module.kernel() is None:
        pytest.skip("there is no C compiler here")
    _, matrix, x, activations = one
    calls = (
        lambda: matrix.products(x),
        lambda: matrix.sums(activations),
        lambda: matrix.products(x, alive(activations)),
    )
    compiled = [call() for call in calls]
    for count in (1, 2, 5):
        monkeypatch.setattr(rows_module, "threads", lambda count=count: count)
        assert all(torch.equal(call(), known) for call, known in zip(calls, compiled, strict=True))
    monkeypatch.setattr(rows_module, "kernel", lambda: None)
    assert all(torch.equal(call(), known) for call, known in zip(calls, compiled, strict=True))


def test_numbers_are_those_of_a_matrix_product(one, computed_by):
    weight, matrix, x, activations = one
    # What rounding a weight may cost: half a step of its precision.
    steps = {
        torch.float32: 0.0,
        torch.bfloat16: float(weight.abs().max()) * 2**-8,
        torch.int8: float(weight.abs().max()) / 254,
    }
    step = steps[matrix.data.dtype] + 1e-6
    wanted = weight.double() @ x.double()
    assert (matrix.products(x) - wanted).abs().max() <= step * x.abs().sum()
    assert (
        matrix.sums(activations) - weight.t().double() @ activations.double()
    ).abs().max() <= step * activations.sum()
    assert torch.allclose(matrix.many(x[None])[0], matrix.products(x), rtol=1e-4, atol=1e-4)
    assert torch.allclose(matrix.many_sums(activations[None])[0], matrix.sums(activations), rtol=1e-4, atol=1e-4)


def test_no_row_and_all_rows(one, computed_by):
    _, matrix, x, _ = one
    none = torch.zeros(0, dtype=torch.int32)
    assert not matrix.products(x, none).any() and not matrix.sums(torch.ones(ROWS), none).any()
    every = torch.arange(ROWS, dtype=torch.int32)
    assert torch.equal(matrix.products(x, every), matrix.products(x))


def test_memory_is_shared_where_nothing_changes():
    weight = torch.randn(8, 128)
    assert Rows.of(weight, "fp32").data.data_ptr() == weight.data_ptr()
    assert Rows.of(weight.t(), "fp32").columns == 8  # not contiguous: a copy
    assert torch.equal(Rows.of(weight.t(), "fp32").data[:, :8], weight.t())


class TestBuild:
    def test_is_compiled_once(self, tmp_path, monkeypatch):
        if build.library() is None:
            pytest.skip("there is no C compiler here")
        compiler = build.find_compiler()
        build.open_library(tmp_path, compiler)
        (path,) = tmp_path.iterdir()
        monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("it is there"))
        build.open_library(tmp_path, compiler)
        monkeypatch.undo()
        monkeypatch.setattr(build, "_cpu", lambda: "another machine")
        build.open_library(tmp_path, compiler)
        assert path in (there := list(tmp_path.iterdir())) and len(there) == 2

    def test_failed_compiler_leaves_nothing(self, tmp_path):
        compiler = tmp_path / "cc"
        compiler.write_text(
            '#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho half > "$2"\necho "cc: no memory" >&2\nexit 1\n'
        )
        compiler.chmod(0o755)
        with pytest.raises(build.NotBuilt, match="cc: no memory"):
            build.open_library(tmp_path / "cache", str(compiler))
        assert not list((tmp_path / "cache").iterdir())

    def test_without_a_compiler_torch_computes(self, tmp_path):
        code = (
            "import torch; from megatron_ft.sparse.rows import Rows, kernel; assert kernel() is None; "
            "m = Rows.of(torch.eye(70), 'fp32'); assert torch.equal(m.products(torch.arange(70.)), torch.arange(70.))"
        )
        env = {**os.environ, "CC": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "computes with torch, which is slower: there is no C compiler" in done.stderr
        assert not list(tmp_path.iterdir())

    def test_kernel_that_rounds_differently_is_not_used(self, monkeypatch):
        if (native := build.library()) is None:
            pytest.skip("there is no C compiler here")

        class Other:
            def row_products(self, *arguments):
                native.row_products(*arguments)

            def row_sums(self, *arguments):
                native.row_sums(*arguments[:-2], arguments[-2], 1)
                import ctypes

                ctypes.cast(arguments[-2], ctypes.POINTER(ctypes.c_float))[0] *= 1 + 2**-20

        assert rows_module._agrees(native) and not rows_module._agrees(Other())


def test_reference_halves_lanes():
    """The order that kernel.c states, on numbers where another order gives another sum."""
    row = torch.zeros(1, 64)
    row[0, :3] = torch.tensor([1e8, 1.0, -1e8])
    out = torch.zeros(1)
    reference.row_products(row, None, torch.ones(64), None, out)
    assert out.item() == 1.0
