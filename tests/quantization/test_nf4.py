"""NF4 of a matrix: equal to bitsandbytes bit for bit; slices are those of the whole; what does not fit is named."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_ft.errors import CheckpointError
from megatron_ft.quantization import double, nf4
from tests.quantization.made_by_bitsandbytes import DTYPES, FILES, hash_of, matrix, scales

THEIRS = load_file(FILES / "matrix.safetensors")
HASHES = json.loads((FILES / "dequantised.json").read_text())


@pytest.mark.parametrize("name", DTYPES)
def test_equals_bitsandbytes(name):
    found = nf4.quantise(matrix().to(DTYPES[name]))
    assert torch.equal(found.codes, THEIRS[f"{name}.codes"])
    assert torch.equal(found.absmax, THEIRS[f"{name}.absmax"])
    assert hash_of(nf4.dequantise(*found, DTYPES[name])) == HASHES[name]


def test_the_second_level_is_that_of_bitsandbytes_but_for_the_nearest_codes():
    """Its CPU kernel sometimes takes the second nearest; scales and mean are equal, and ours are never further away."""
    found = double.quantise(scales())
    assert torch.equal(found.nested, THEIRS["double.nested"])
    scale, mean = double.spread(found.nested, (90, 30))
    ours, theirs = (double.dequantise(codes, scale, mean) for codes in (found.codes, THEIRS["double.codes"]))
    assert hash_of(theirs) == HASHES["double"]
    assert 0 < int((found.codes != THEIRS["double.codes"]).sum()) < 10
    assert bool(((ours - scales()).abs() <= (theirs - scales()).abs()).all())


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_slices_are_those_of_the_whole(parts):
    weight = torch.randn(64, 64 * 24, generator=torch.Generator().manual_seed(1))
    whole = nf4.quantise(weight)
    for axis in (0, 1):
        slices = [nf4.quantise(part) for part in weight.chunk(parts, axis)]
        assert torch.equal(torch.cat([part.codes for part in slices], axis), whole.codes)
        assert torch.equal(torch.cat([part.absmax for part in slices], axis), whole.absmax)
        values = [nf4.dequantise(*part, torch.bfloat16) for part in slices]
        assert torch.equal(torch.cat(values, axis), nf4.dequantise(*whole, torch.bfloat16))


def test_quantised_piece_by_piece(monkeypatch):
    whole = nf4.quantise(matrix())
    monkeypatch.setattr(nf4, "_AT_ONCE", 7 * 256)
    pieces = nf4.quantise(matrix())
    assert torch.equal(whole.codes, pieces.codes) and torch.equal(whole.absmax, pieces.absmax)


def test_every_level_is_kept():
    """A block of the sixteen levels, four times, is quantised without any loss."""
    weight = torch.tensor(nf4.LEVELS).repeat(2, 4) * 3
    assert torch.equal(nf4.dequantise(*nf4.quantise(weight), torch.float32), weight)


def test_the_mean_does_not_depend_on_threads():
    absmax = torch.rand(1 << 20, generator=torch.Generator().manual_seed(3))
    before, means = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        means.append(double.quantise(absmax).nested[-1].item())
    torch.set_num_threads(before)
    assert means[0] == means[1]


@pytest.mark.parametrize("weight", [torch.ones(4, 96), torch.ones(64)])
def test_a_size_that_does_not_fit(weight):
    with pytest.raises(CheckpointError, match=r"down_proj is \[.*\]: NF4 needs rows of a multiple of 64"):
        nf4.quantise(weight, "down_proj")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none(number):
    weight = torch.ones(4, 64)
    weight[2, 5] = number
    with pytest.raises(CheckpointError, match="down_proj holds numbers that are not finite"):
        nf4.quantise(weight, "down_proj")


def test_the_kernel_of_bitsandbytes():
    """Its own function, where it is installed, also on a CPU."""
    pytest.importorskip("bitsandbytes")
    from megatron_ft.quantization.kernels import by_bitsandbytes

    found = nf4.quantise(matrix())
    for dtype in DTYPES.values():
        assert torch.equal(by_bitsandbytes(*found, dtype), nf4.dequantise(*found, dtype))
