"""The process that quantises a checkpoint with GPTQ, layer by layer, in the engine: one layer's weights are in memory at a time.

    echo FOLDER | python -m checkpoints_conversion.calibrate

FOLDER/request.json has the checkpoint and the grid, FOLDER/rows.npy and FOLDER/held_out.npy the tokens. It writes the weights of the
export to the folder that the request names, and FOLDER/answer.json.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints_conversion.options import CheckpointSource
from checkpoints_conversion.own_process import answer_alone, ask

if TYPE_CHECKING:
    from torch import Tensor

    from checkpoints_conversion.megatron_source import Opened
    from megatron_ft.quantization.gptq import Grid


@dataclass(frozen=True)
class Request:
    """The input of the process."""

    checkpoint: str
    """The release or iter_ folder."""
    stated: dict[str, Any]
    """How it is read, as CheckpointSource."""
    tokens: str
    """Folder of rows.npy, tokens for calibration [rows, length], and held_out.npy, those of which the loss is computed."""
    export: str
    """Folder for the weights."""
    method: str
    grid: dict[str, Any]
    """Grid, without the type of its scales."""
    params_dtype: str | None = None


@dataclass(frozen=True)
class Answer:
    """What was written, and what it cost."""

    files: list[str]
    """One for each layer."""
    perplexity: tuple[float, float]
    """Before and after, on the tokens that were held out."""
    rounded_error: float
    """Mean over the matrices of the relative error of their outputs, if each weight were rounded to the nearest."""
    error: float
    """The same with GPTQ."""
    matrices: int


def calibrate(request: Request) -> Answer:
    """Quantise and write all weights."""
    import torch

    from checkpoints_conversion.layerwise import Calibration
    from checkpoints_conversion.megatron_source import open_megatron
    from megatron_ft.engine.parallel import process_groups

    opened = open_megatron(Path(request.checkpoint), CheckpointSource(**request.stated))
    with process_groups() as layout, torch.no_grad():
        work = Calibration(opened, layout, Path(request.tokens), _grid(request, opened), request.params_dtype)
        writer = _Writer(Path(request.export), opened, request)
        for number in range(opened.config.architecture.num_layers):
            dense, quantised = work.layer(number)
            writer.layer(number, dense, quantised, work.grid)
        before, after = work.losses()
    errors = list(zip(*work.errors, strict=True))
    rounded, gptq = (sum(kind) / len(kind) for kind in errors)
    return Answer(writer.files, (math.exp(before), math.exp(after)), rounded, gptq, len(work.errors))


def _grid(request: Request, opened: Opened) -> Grid:
    """Return the grid. Readers of the GPTQ format expect scales in fp16; others have them in the type of the model."""
    import torch

    from megatron_ft.models.dtypes import torch_dtype
    from megatron_ft.quantization.gptq import Grid

    kind = torch.float16 if request.method == "gptq" else torch_dtype(request.params_dtype or opened.config.dtype)
    return Grid(**request.grid, scale_dtype=kind)


@dataclass
class _Writer:
    """Writes a file for each layer; the first has the embedding too, the last the norm and the output layer."""

    folder: Path
    opened: Opened
    request: Request
    files: list[str] = field(default_factory=list)

    def layer(self, number: int, dense: dict[str, Tensor], quantised: dict[str, Any], grid: Grid) -> None:
        from safetensors.torch import save_file

        from megatron_ft.quantization.packed import compressed_tensors, gptq_tensors

        pack = gptq_tensors if self.request.method == "gptq" else compressed_tensors
        tensors = {name: values.contiguous() for name, values in dense.items()}
        for name, codes in quantised.items():
            stem = name.removesuffix(".weight")
            tensors |= {f"{stem}.{kind}": values.contiguous() for kind, values in pack(codes, grid).items()}
        self.files.append(f"layer-{number + 1:05d}.safetensors")
        save_file(tensors, self.folder / self.files[-1], {"format": "pt"})


def run_calibration(request: Request, folder: Path) -> Answer:
    """Run `calibrate` in a process of its own. Raise CheckpointError for a user's error."""
    return Answer(**ask("checkpoints_conversion.calibrate", request, folder, "the calibration"))


if __name__ == "__main__":
    answer_alone(Path(sys.stdin.read().strip()), Request, calibrate)
