"""The hash of weights: the same however they are cut, another after any change."""

import torch

from megatron_ft.models.fingerprint import digest, sums


def whole() -> torch.Tensor:
    return torch.randn(64, 32, generator=torch.Generator().manual_seed(1))


def added(parts: list[dict[str, int]]) -> dict[str, int]:
    return {kind: sum(part[kind] for part in parts) % 2**64 for kind in parts[0]}


def test_parts_add_up():
    x = whole()
    for rows, columns in ((64, 8), (16, 32), (16, 8), (1, 32)):
        boxes = [(r, c) for r in range(0, 64, rows) for c in range(0, 32, columns)]
        assert added([sums(x[r : r + rows, c : c + columns], r, c) for r, c in boxes]) == added([sums(x)])
    vector = x.flatten()
    assert added([sums(vector[:100]), sums(vector[100:], 100)]) == added([sums(vector)])
    assert added([sums(x[:0]), sums(x)]) == added([sums(x)])


def test_any_change_is_another_hash():
    x, base = whole(), sums(whole())
    changed = x.clone()
    changed.view(torch.int32)[3, 4] ^= 1
    assert sums(changed)["fp32"] != base["fp32"]
    for other in (x.flip(0), x.flip(1), x.roll(1, 0), x.t().contiguous(), -x, torch.zeros_like(x)):
        assert all(sums(other)[kind] != base[kind] for kind in base)
    assert digest({"a": 1, "b": 2}) != digest({"a": 2, "b": 1})
    assert digest({"a": 1 + 2**64}) == digest({"a": 1})


def test_a_rounded_model_is_known():
    """What a run in fp32 records is found again by one in bf16 or fp16."""
    for kind, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        assert sums(whole().to(dtype)) == {kind: sums(whole())[kind]}
