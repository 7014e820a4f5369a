"""A model that is run layer by layer: one layer of the engine is filled with the weights of each layer in turn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoints_conversion.megatron_source import Opened
from checkpoints_conversion.rounding import Rounder
from megatron_ft.engine.parallel import Layout
from megatron_ft.models.build import build_model
from megatron_ft.models.dtypes import cast
from megatron_ft.models.quantised import is_quantised
from megatron_ft.models.weights import Placed, pad_rows, placed_rules
from megatron_ft.quantization.gptq import Codes, Grid, nearest, output_error, quantise


class Layerwise:
    """The layer of the engine, what precedes and follows it, and the held-out tokens.

    tokens: folder with held_out.npy. dtype: that weights are cast to; None: the source's.
    """

    def __init__(self, opened: Opened, layout: Layout, tokens: Path, dtype: str | None):
        self._opened, self._dtype, self._arch = opened, dtype, opened.config.architecture
        self._model = build_model(self._arch.with_layers(1), layout).eval()
        self._layer: Any = self._model.decoder.layers[0]
        self._slots = dict(self._model.named_parameters())
        self._placed = list(placed_rules(self._arch, opened.rules))
        self._outer = {one.key: self._fill(one) for one in self._placed if one.rule.stage != "layer"}
        self._held_ids = torch.from_numpy(np.load(tokens / "held_out.npy"))
        self._options = self._capture(self._held_ids[:1])[1]
        self._before = [self._capture(row[None])[0] for row in self._held_ids]

    def _of_layer(self, number: int) -> list[Placed]:
        return [one for one in self._placed if one.rule.stage == "layer" and one.key == one.rule.key.format(n=number)]

    def _parts(self, one: Placed, whole: Tensor) -> list[tuple[str, Tensor]]:
        return [(name, part.clone()) for name, part in zip(one.hf_keys, one.rule.to_hf(self._arch, whole), strict=True)]

    def _fill(self, one: Placed) -> Tensor:
        """Copy a tensor to its place in the model. Return it whole, as it is exported."""
        whole = cast(self._opened.full(one), self._dtype, one.key)
        self._put(one, whole)
        return whole

    def _put(self, one: Placed, whole: Tensor) -> None:
        if one.rule.cut == "vocab_parallel":
            whole = pad_rows(whole, self._model.vocab_size)
        self._slots[one.rule.key.format(n=0)].copy_(whole)

    def _capture(self, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Return the input of the first layer, and the other arguments that it is called with."""
        seen: list[dict[str, Any]] = []
        hook = self._layer.register_forward_pre_hook(lambda _, args, options: seen.append(options), with_kwargs=True)
        self._model(ids, torch.arange(ids.shape[1])[None], None)
        hook.remove()
        options = dict(seen[0])
        return options.pop("hidden_states").clone(), options

    def _run(self, hidden: Tensor) -> Tensor:
        return self._layer(hidden_states=hidden, **self._options)[0]

    def _loss(self, rows: list[Tensor]) -> float:
        """Return the mean loss of the tokens after the first of each row."""
        weight = self._model.shared_embedding_or_output_weight() if self._arch.tied_embeddings else None
        total = 0.0
        for hidden, ids in zip(rows, self._held_ids, strict=True):
            logits = self._model.output_layer(self._model.decoder.final_layernorm(hidden), weight=weight)[0]
            known = logits[:-1, 0, : self._arch.vocab_size].float()
            total += torch.nn.functional.cross_entropy(known, ids[1:], reduction="sum").item()
        return total / self._held_ids[:, 1:].numel()


class Calibration(Layerwise):
    """Quantises layer after layer: the inputs of a layer are the outputs of the quantised layers before it.

    tokens: folder with rows.npy too. dtype: of the weights that stay as they are.
    """

    def __init__(self, opened: Opened, layout: Layout, tokens: Path, grid: Grid, dtype: str | None):
        super().__init__(opened, layout, tokens, dtype)
        self.grid, self.errors = grid, list[tuple[float, float]]()
        """errors: of the outputs of each matrix, rounded to the nearest and by GPTQ."""
        rows = torch.from_numpy(np.load(tokens / "rows.npy"))
        self._hidden = [self._capture(row[None])[0] for row in rows]
        self._after = list(self._before)

    def layer(self, number: int) -> tuple[dict[str, Tensor], dict[str, Codes]]:
        """Quantise a layer. Return by name in Hugging Face what stays dense, and the quantised matrices."""
        here = self._of_layer(number)
        wholes = {one.key: self._fill(one) for one in here}
        self._before = [self._run(row) for row in self._before]
        matrices = [one for one in here if is_quantised(one.rule)]
        hessians = self._hessians(matrices)
        quantised: dict[str, Codes] = {}
        for one in matrices:
            quantised |= self._quantise(one, wholes.pop(one.key), hessians[one.key])
        self._hidden = [self._run(row) for row in self._hidden]
        self._after = [self._run(row) for row in self._after]
        wholes |= {one.key: self._outer[one.key] for one in self._outer_of(number)}
        dense = [self._parts(one, wholes[one.key]) for one in self._placed if one.key in wholes]
        return dict(pair for parts in dense for pair in parts), quantised

    def losses(self) -> tuple[float, float]:
        """Return the mean loss of the held-out tokens before and after, once all layers are quantised."""
        return self._loss(self._before), self._loss(self._after)

    def _outer_of(self, number: int) -> list[Placed]:
        """Return what is written with a layer: with the first the embedding, with the last what follows it."""
        stages = {"first"} if number == 0 else set()
        stages |= {"last"} if number == self._arch.num_layers - 1 else set()
        return [one for one in self._placed if one.rule.stage in stages]

    def _quantise(self, one: Placed, whole: Tensor, hessian: Tensor) -> dict[str, Codes]:
        """Quantise the matrices of a tensor of the engine, and put the result in its place."""
        found, dense = {}, []
        for name, matrix in self._parts(one, whole.float()):
            codes = quantise(matrix, hessian, self.grid)
            errors = [output_error(matrix, kind.dense(), hessian) for kind in (nearest(matrix, self.grid), codes)]
            self.errors.append((errors[0], errors[1]))
            found[name] = codes
            dense.append(codes.dense())
        self._put(one, one.rule.to_megatron(self._arch, dense))
        return found

    def _hessians(self, matrices: list[Placed]) -> dict[str, Tensor]:
        """Run the layer on all rows. Return 2 X'X of the inputs of each matrix."""
        sums = {one.key: torch.zeros(()) for one in matrices}
        hooks = [self._linear(one).register_forward_pre_hook(_adder(sums, one.key)) for one in matrices]
        for row in self._hidden:
            self._run(row)
        for hook in hooks:
            hook.remove()
        return sums

    def _linear(self, one: Placed) -> Any:
        return self._model.get_submodule(one.rule.key.format(n=0).removesuffix(".weight"))


class Comparison(Layerwise):
    """The held-out tokens in the model with its weights and with rounded ones.

    rounded: see rounding.py.
    """

    def __init__(self, opened: Opened, layout: Layout, tokens: Path, dtype: str | None, rounded: Rounder):
        super().__init__(opened, layout, tokens, dtype)
        self._rounded = rounded
        self._put_outer(rounded=True)
        self._after = [self._capture(row[None])[0] for row in self._held_ids]

    def losses(self) -> tuple[float, float]:
        """Return the mean loss of the held-out tokens before and after."""
        for number in range(self._arch.num_layers):
            here = [(one, self._fill(one)) for one in self._of_layer(number)]
            self._before = [self._run(row) for row in self._before]
            for one, whole in here:
                self._put_rounded(one, whole)
            self._after = [self._run(row) for row in self._after]
        after = self._loss(self._after)
        self._put_outer(rounded=False)
        return self._loss(self._before), after

    def _put_outer(self, rounded: bool) -> None:
        for one in self._placed:
            if one.key in self._outer:
                (self._put_rounded if rounded else self._put)(one, self._outer[one.key])

    def _put_rounded(self, one: Placed, whole: Tensor) -> None:
        parts = [self._rounded(one, name, part) for name, part in self._parts(one, whole)]
        self._put(one, one.rule.to_megatron(self._arch, parts))


def _adder(sums: dict[str, Tensor], key: str) -> Callable[[Any, tuple], None]:
    def add(_: Any, inputs: tuple) -> None:
        rows = inputs[0].flatten(0, -2).float()
        sums[key] = sums[key] + 2 * rows.t() @ rows

    return add
