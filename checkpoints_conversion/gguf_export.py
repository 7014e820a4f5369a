"""Exports for llama.cpp: a GGUF file with weights in F16 or Q8_0, tokenizer and chat template."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from checkpoints_conversion.exported_words import write_words
from checkpoints_conversion.gguf_model import (
    KINDS,
    NAMES,
    Stored,
    add_metadata,
    arranged,
    check_architecture,
    decoded,
    encoded,
    extra_tensors,
    tensors_of,
)
from checkpoints_conversion.gguf_vocabulary import add_vocabulary
from checkpoints_conversion.hf_target import parse_size
from checkpoints_conversion.megatron_source import Opened
from checkpoints_conversion.model_card import MODEL_CARD, Quantised, model_card
from checkpoints_conversion.options import QuantisedExport
from checkpoints_conversion.report import Report, count
from checkpoints_conversion.rounded_perplexity import described, held_out_of
from checkpoints_conversion.stream import Progress, check_disk, disk_errors, identity, resumable_folder, seal
from megatron_ft.errors import ConfigError
from megatron_ft.models.families import family_of
from megatron_ft.models.weights import Placed, placed_rules

if TYPE_CHECKING:
    from gguf import GGUFWriter


def file_name(quantize: str) -> str:
    """Return the name of the file, or of all parts of it before their numbers."""
    return f"model-{KINDS[quantize].lower()}.gguf"


def check_installed() -> None:
    if find_spec("gguf") is None:
        raise ConfigError("--quantize gguf-f16 and gguf-q8_0 need the package gguf: pip install 'megatron_ft[gguf]'")


def export_gguf(
    source: Opened, options: QuantisedExport, max_shard_size: str, started: float, certified: bool
) -> Report:
    """Write a folder with the file and its card. Raise ConfigError for a model or a tokenizer that llama.cpp does not have."""
    arch, target = source.config.architecture, Path(options.output_dir)
    check_architecture(arch)
    held_out = held_out_of(source, options)
    key = {"options": asdict(options), "source": identity(source.files())}
    with resumable_folder(target, key, options.overwrite) as export, disk_errors():
        work = _Work(
            source, export / file_name(str(options.quantize)), str(options.quantize), parse_size(max_shard_size)
        )
        work.write(target.name)
        quantised = Quantised(
            work.how(), described(source, options, None, held_out), work.error(), falcon=False, kind="gguf"
        )
        card = model_card(
            target.name, source, source.config.dtype, export, certified, options.system, quantised, work.example()
        )
        (export / MODEL_CARD).write_text(card, encoding="utf-8")
        seal(export, {}, but=[MODEL_CARD])
        files = len(work.files())
    parameters, tensors = count(arch, source.rules)
    return Report(target, parameters, tensors, files, time.monotonic() - started, quantised.in_short())


class _Work:
    """Writes the file tensor by tensor, and measures how much each matrix is changed."""

    def __init__(self, source: Opened, path: Path, quantize: str, max_bytes: int):
        from gguf import GGMLQuantizationType

        self._source, self._path, self._quantize, self._max_bytes = source, path, quantize, max_bytes
        self._arch = source.config.architecture
        self._placed = list(placed_rules(self._arch, source.rules))
        self._tensors = tensors_of(self._arch, self._placed, GGMLQuantizationType[KINDS[quantize]])
        self._errors: list[float] = []

    def write(self, name: str) -> None:
        extra = list(extra_tensors(self._arch))
        total = sum(one.nbytes for one in self._tensors)
        check_disk(self._path, total)
        writer = self._writer(name, total)
        for one in (*(stored for stored, _ in extra), *self._tensors):
            writer.add_tensor_info(one.name, one.byte_shape, one.dtype, one.nbytes, one.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, values in extra:
            writer.write_tensor_data(values)
        with Progress(f"writing {self._path.name}:", total) as progress:
            for stored, weight in self._weights():
                values = encoded(stored, weight)
                self._measure(stored, weight, decoded(stored, values))
                writer.write_tensor_data(values)
                progress.add(stored.nbytes)
        writer.close()

    def files(self) -> list[Path]:
        return sorted(self._path.parent.glob("*.gguf"))

    def how(self) -> str:
        matrices = sum(one.kind.name == KINDS[self._quantize] for one in self._tensors)
        return f"GGUF, {matrices} matrices in {KINDS[self._quantize]}, embedding and output layer among them; norms and biases in fp32"

    def error(self) -> str:
        return f"{sum(self._errors) / len(self._errors):.2g} of the weights' norm, mean over the matrices"

    def example(self) -> str:
        return f"```sh\nllama-cli -m {self.files()[0].name}  # llama.cpp\n```"

    def _writer(self, name: str, total: int) -> GGUFWriter:
        from gguf import GGML_QUANT_VERSION, GGUFType, GGUFWriter, LlamaFileType

        split = self._max_bytes if total > self._max_bytes else 0
        writer = GGUFWriter(self._path, NAMES[self._arch.family], split_max_size=split)
        writer.add_type(GGUFType.MODEL)
        writer.add_name(name)
        add_metadata(writer, self._arch)
        writer.add_file_type(LlamaFileType[f"MOSTLY_{KINDS[self._quantize]}"])
        writer.add_quantization_version(GGML_QUANT_VERSION)
        with tempfile.TemporaryDirectory() as scratch:
            write_words(self._source, Path(scratch), family_of(self._arch).to_hf(self._arch))
            add_vocabulary(writer, self._source.tokenizer, Path(scratch), self._arch.vocab_size)
        return writer

    def _weights(self) -> Iterator[tuple[Stored, Tensor]]:
        stored = iter(self._tensors)
        for placed in self._placed:
            for part in self._parts(placed):
                one = next(stored)
                yield one, arranged(self._arch, one, part)

    def _parts(self, placed: Placed) -> Any:
        return placed.rule.to_hf(self._arch, self._source.full(placed))

    def _measure(self, stored: Stored, weight: Tensor, found: Tensor) -> None:
        if stored.kind.name != "F32":
            norm = weight.float().norm().item()
            self._errors.append((found - weight.float()).norm().item() / norm if norm else 0.0)
