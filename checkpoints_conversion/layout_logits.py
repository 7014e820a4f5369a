"""The process that verify starts to compute logits in a layout of several ranks and to compare them with transformers'.

    echo FOLDER | python -m checkpoints_conversion.layout_logits

FOLDER/request.json has the checkpoint and the prompts, FOLDER/N.npy transformers' logits for prompt N. It writes FOLDER/answer.json.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from checkpoints_conversion.own_process import ask
from megatron_ft.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from checkpoints_conversion.megatron_source import Opened
    from checkpoints_conversion.options import CheckpointSource
    from megatron_ft.adapters.stored import Stored
    from megatron_ft.engine.parallel import Layout

SLACK = 10
"""Adapters beside weights add up in another order than their sums; a wrong scale or slice is far above it."""


@dataclass(frozen=True)
class Request:
    """The input of every rank."""

    checkpoint: str
    """The release or iter_ folder."""
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    prompts: list[list[int]]
    theirs: str
    """Folder of transformers' logits: N.npy, [tokens, rows]."""
    true_vocab_size: int
    """Needed for Megatron-LLM's files; other checkpoints record it."""
    stated: dict[str, Any] = field(default_factory=dict)
    """Settings that the user gave for Megatron-LLM's files."""
    base: str | None = None
    """Of a checkpoint of adapters: the checkpoint of their model."""
    dtype: str = "fp32"
    """Of the merged model, with base."""
    onto: Literal["dequantized", "original"] | None = None
    """Which weights of the base, if the adapters were trained on its NF4."""
    tolerance: float = 1e-4
    """Of logits."""


def differences(request: Request) -> list[float]:
    """Return the largest logit difference for each prompt on the reporting rank, [] on others. All ranks call it."""
    import numpy as np
    import torch

    from megatron_ft.engine.parallel import ParallelSizes, process_groups

    sizes = request.tensor_model_parallel_size, request.pipeline_model_parallel_size
    with process_groups(ParallelSizes(*sizes)) as layout, torch.no_grad():
        worst = []
        for number, logits in enumerate(_answers(_load(request, layout), request, layout)):
            theirs = torch.from_numpy(np.load(Path(request.theirs) / f"{number}.npy"))
            worst.append((logits[0, :, : theirs.shape[1]].float() - theirs).abs().max().item())
        _check_sums(request, layout)
        return worst


def _answers(model: Any, request: Request, layout: Layout) -> list[Any]:
    """Return the logits of each prompt on the reporting rank, [] on others."""
    import torch

    found = [_logits(model, layout, torch.tensor([ids])) for ids in request.prompts]
    return found if layout.is_reporter else []


def _load(request: Request, layout: Layout) -> Any:
    """Return the model as training or generate would load it; for files of another layout, loaded with the converters' readers."""
    from checkpoints_conversion.megatron_llm import is_dialect
    from checkpoints_conversion.megatron_source import open_megatron
    from checkpoints_conversion.options import CheckpointSource
    from megatron_ft.checkpoints.fill import fill_from
    from megatron_ft.checkpoints.folder import vocab_rows
    from megatron_ft.checkpoints.load import load_weights
    from megatron_ft.checkpoints.quantised import nf4_of
    from megatron_ft.checkpoints.verify import verify
    from megatron_ft.models.build import BuildOptions, build_model

    folder = Path(request.checkpoint)
    wanted = CheckpointSource(true_vocab_size=request.true_vocab_size, verify_checkpoint=False, **request.stated)
    if request.base is not None:
        return _with_adapters(request, wanted, layout)
    opened = open_megatron(folder, wanted)
    config = opened.config
    own = (config.tensor_model_parallel_size, config.pipeline_model_parallel_size) == (layout.tp_size, layout.pp_size)
    if not is_dialect(folder) and (own or config.ckpt_format == "torch_dist"):
        held = BuildOptions(padded_vocab_size=vocab_rows(config), nf4=nf4_of(config))
        model = build_model(config.architecture, layout, held).eval()
        verify(folder, config, layout, digests=False)  # verify has compared them, unless --no_verify_checkpoint was set
        load_weights(folder, config, model, layout, verified=True)
    else:
        model = build_model(config.architecture, layout, BuildOptions(nf4=nf4_of(config))).eval()
        rules, full = opened.held()
        fill_from(model, config.architecture, rules, full, layout)
    return model


def _with_adapters(request: Request, wanted: CheckpointSource, layout: Layout) -> Any:
    """Return the base with adapters beside its weights; if the model is merged in 16 bits, the rounded sums of both, as it has them."""
    from checkpoints_conversion.merged import merged, open_both

    opened, stored, described = open_both(Path(request.checkpoint), request.base, wanted, request.onto)
    whole = merged(opened, stored, described, request.dtype)
    return _side_by_side(opened, stored, whole, layout) if request.dtype == "fp32" else _filled(whole, layout)


def _check_sums(request: Request, layout: Layout) -> None:
    """Raise CheckpointError unless, for a model merged in 16 bits, the sums before they are rounded have the logits of the adapters beside
    the weights. One model is there at a time.
    """
    from checkpoints_conversion.merged import merged, open_both
    from checkpoints_conversion.options import CheckpointSource
    from megatron_ft.models.dtypes import cast

    if request.base is None or request.dtype == "fp32":
        return
    wanted = CheckpointSource(true_vocab_size=request.true_vocab_size, verify_checkpoint=False, **request.stated)
    opened, stored, described = open_both(Path(request.checkpoint), request.base, wanted, request.onto)
    short = replace(opened, full=lambda placed: cast(opened.full(placed), request.dtype, placed.key))
    sums = merged(short, stored, described, "fp32")
    one = _answers(_filled(sums, layout), request, layout)
    other = _answers(_side_by_side(short, stored, sums, layout), request, layout)
    worst = max([(a - b).abs().max().item() for a, b in zip(one, other, strict=True)], default=0.0)
    if not worst <= SLACK * request.tolerance:
        raise CheckpointError(
            f"{request.checkpoint}: the logits of base and adapters and of their sums differ by {worst:.2e}, above {SLACK} times "
            f"--tolerance {request.tolerance}; please report it"
        )


def _filled(opened: Opened, layout: Layout) -> Any:
    """Return the model with the weights that `opened` reads, in fp32."""
    from megatron_ft.checkpoints.fill import fill_from
    from megatron_ft.models.build import build_model

    arch = opened.config.architecture
    model = build_model(arch, layout).eval()
    fill_from(model, arch, opened.rules, opened.full, layout)
    return model


def _side_by_side(base: Opened, stored: Stored, whole: Opened, layout: Layout) -> Any:
    """Return the base with adapters beside its weights. whole: both as one model, which has the settings of the adapters' run."""
    from megatron_ft.adapters.adapted import add_adapters

    model = _filled(replace(base, config=whole.config), layout)
    # open_both has compared the hashes
    add_adapters(model, whole.config.architecture, replace(stored, recorded=None), layout, base.folder)
    return model.eval()  # the adapters too: their dropout


def _logits(model: Any, layout: Layout, ids: Tensor) -> Any:
    """Return the logits [1, s, rows] on the last stage, None on others."""
    import torch
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    positions = torch.arange(ids.shape[1])[None]
    output = get_forward_backward_func()(
        forward_step_func=lambda _, model: (model(ids, positions, None), lambda output, non_loss_data=False: output),
        data_iterator=iter(()),
        model=[model],
        num_microbatches=1,
        seq_length=ids.shape[1],
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return gather_from_tensor_model_parallel_region(output[0]) if layout.is_last_stage else None


def differences_in_layout(request: Request, folder: Path) -> list[float]:
    """Run `differences` on the ranks of the request's layout, in separate processes. Raise CheckpointError for a user's error."""
    return ask("checkpoints_conversion.layout_logits", request, folder, "the ranks")["differences"]


def main(folder: Path) -> None:
    from megatron_ft.engine.forked import die_with_parent, run_forked

    die_with_parent()
    request = Request(**json.loads((folder / "request.json").read_text()))
    size = request.tensor_model_parallel_size * request.pipeline_model_parallel_size
    try:
        answer = {"differences": next(filter(None, run_forked(size, differences, request)))}
    except UserError as error:
        answer = {"user_error": str(error)}
    (folder / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.stdin.read().strip()))
