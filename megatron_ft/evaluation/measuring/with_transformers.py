"""Loads a Hugging Face model with transformers; in 8 and 4 bits its linears are those of bitsandbytes.

8 bits: LLM.int8() (Dettmers et al. 2022). 4 bits: NF4 in blocks of 64, products in bf16. All else is bf16, also in 8 and 4 bits.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from megatron_ft import device
from megatron_ft.errors import CheckpointError
from megatron_ft.evaluation.measuring.clock import median_ms
from megatron_ft.evaluation.measuring.job import Job, Loaded, Message, Product, check_lengths

KINDS = {32: "fp32", 16: "bf16", 8: "int8, bitsandbytes", 4: "nf4, bitsandbytes"}


def load(job: Job) -> Loaded:
    """Return the model of a job. Raise ConfigError for prompts that are too long, CheckpointError where linears stayed dense."""
    from transformers import AutoConfig, AutoTokenizer

    with opening(job.model):
        config = AutoConfig.from_pretrained(job.model, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(job.model, local_files_only=True)
    prompts = [encode(tokenizer, messages) for messages in job.conversations]
    check_lengths(prompts, job.max_new_tokens, getattr(config, "max_position_embeddings", None) or 1 << 40)
    with opening(job.model):
        model = _model(job, config)
    if job.bits < 16:
        check_quantised(model)

    def generate(ids: list[int], count: int) -> list[int]:
        row = torch.tensor([ids], device=device.current_device())
        lengths = {"max_new_tokens": count, "min_new_tokens": count}
        with torch.inference_mode():
            out = model.generate(row, attention_mask=torch.ones_like(row), do_sample=False, pad_token_id=0, **lengths)
        return out[0, len(ids) :].tolist()

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    return Loaded(KINDS[job.bits], prompts, generate, decode, weight_bytes(model), lambda: time_product(model))


def encode(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Return the ids of a conversation by the tokenizer's chat template; without one those of its last message's text."""
    if not tokenizer.chat_template:
        return list(tokenizer(messages[-1]["content"])["input_ids"])
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@contextlib.contextmanager
def opening(folder: str) -> Iterator[None]:
    """Turn what transformers and safetensors raise at a folder that they cannot read into a CheckpointError of one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        why = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{folder}: transformers cannot open it ({why}); check the folder, or try --backend engine"
        ) from error


def _model(job: Job, config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    if job.bits < 16:
        mend_linears(config.model_type)
        _quiet()
    settings: dict[str, Any] = {"quantization_config": _quantised(job.bits)} if job.bits < 16 and not job.stored else {}
    model = AutoModelForCausalLM.from_pretrained(
        job.model, local_files_only=True, device_map={"": device.current_device()},
        dtype=torch.float32 if job.bits == 32 else torch.bfloat16, **settings,
    )  # fmt: skip
    return model.eval()


def _quantised(bits: int) -> Any:
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def _quiet() -> None:
    """Drop the warning of each 8-bit product that its input is cast to fp16."""
    import logging

    warnings.filterwarnings("ignore", message="MatMul8bitLt")
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def mend_linears(model_type: str) -> None:
    """Make a family's own linear torch's: transformers quantises only modules whose type is exactly nn.Linear.

    Without this a Falcon, whose linears are FalconLinear, silently stays dense. The computation is the same.
    """
    import importlib

    try:
        module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    except ModuleNotFoundError:
        return
    for name, found in inspect.getmembers(module, inspect.isclass):
        if (
            issubclass(found, nn.Linear)
            and found.__module__ == module.__name__
            and found.__init__ is nn.Linear.__init__
        ):
            setattr(module, name, nn.Linear)


def linears(model: Any) -> dict[str, nn.Module]:
    """Return name -> module of the linears, without the output layer, which stays as it is."""
    output = model.get_output_embeddings()
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not output
    }


def is_quantised(module: nn.Module) -> bool:
    return type(module).__module__.split(".")[0] == "bitsandbytes"


def check_quantised(model: Any) -> None:
    """Raise CheckpointError unless every linear is one of bitsandbytes."""
    found = linears(model)
    dense = [name for name, module in found.items() if not is_quantised(module)]
    if dense or not found:
        raise CheckpointError(
            f"{len(dense)} of {len(found)} linears were not quantised, {dense[0] if dense else 'there are none'} for one: transformers "
            f"cannot quantise this kind of model; measure it with --bits 16, or with --backend engine"
        )


def weight_bytes(model: Any) -> int:
    """Return the bytes of all weights, with the scales of quantised ones."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        tensors |= {id(scale): scale for scale in _scales(module)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _scales(module: nn.Module) -> list[torch.Tensor]:
    weight = getattr(module, "weight", None)
    state = getattr(weight, "quant_state", None)
    found = [getattr(weight, "SCB", None), getattr(state, "absmax", None)]
    return [scale for scale in found if isinstance(scale, torch.Tensor)]


@torch.inference_mode()
def time_product(model: Any) -> Product:
    """Time one token through the linear with the most weights, and making its plain weight."""
    name, module = max(linears(model).items(), key=lambda pair: pair[1].in_features * pair[1].out_features)  # type: ignore[operator]
    shape = (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
    row = torch.randn(1, shape[1], device=device.current_device(), dtype=model.dtype)
    return Product(name, shape, median_ms(lambda: module(row)), _dequantise_ms(module))


def _dequantise_ms(module: nn.Module) -> float | None:
    """Return the time to make the plain weight of 4 bits; None for others, and where the codes are packed for a fused product."""
    state: Any = getattr(module.weight, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return None
    from bitsandbytes.functional import dequantize_4bit

    return median_ms(lambda: dequantize_4bit(module.weight.data, state))
