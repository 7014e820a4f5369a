"""Bit-exact means bit-exact."""

import torch
from safetensors.torch import save_file

from megatron_ft.demo.weights import compare_models


def compare(tmp_path, old: dict, new: dict):
    for name, tensors in (("old", old), ("new", new)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    return compare_models(tmp_path / "old", tmp_path / "new")


def test_added_rows_are_no_difference(tmp_path):
    rows = torch.arange(6.0).view(3, 2)
    result = compare(tmp_path, {"a": rows}, {"a": torch.cat([rows, torch.ones(2, 2)])})
    assert result.identical and result.added_rows == 2 and result.tensors == 1


def test_one_bit_is_a_difference(tmp_path):
    assert not compare(tmp_path, {"a": torch.tensor([0.0])}, {"a": torch.tensor([-0.0])}).identical


def test_a_missing_tensor_is_a_difference(tmp_path):
    result = compare(tmp_path, {"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.ones(1)})
    assert not result.identical and result.first_difference == "b"
