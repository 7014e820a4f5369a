"""What bitsandbytes 0.50.2 and transformers 5.23 made of numbers that anyone can compute, and how it was made.

    python -m tests.quantization.made_by_bitsandbytes      # needs bitsandbytes and accelerate; writes the folder FILES

`numbers` gives the original weights, so the tests need neither package.
"""

from pathlib import Path

import torch
import xxhash

FILES = Path(__file__).parent / "bitsandbytes"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def numbers(shape: tuple[int, ...], start: int = 0) -> torch.Tensor:
    """Weights of all sizes, by integer arithmetic."""
    count = torch.Size(shape).numel()
    index = torch.arange(start, start + count, dtype=torch.float64)
    return ((index * 7919 % 10007) / 10007 - 0.5).mul(1 + index % 61 / 61).float().reshape(shape)


def matrix() -> torch.Tensor:
    """Numbers with one row of zeros."""
    weight = numbers((20, 256))
    weight[3] = 0
    return weight


def scales() -> torch.Tensor:
    """Scales for several blocks of the second level."""
    return numbers((90, 30)) + 2


def hash_of(tensor: torch.Tensor) -> str:
    return xxhash.xxh3_64_hexdigest(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def plain_llama(folder: Path) -> Path:
    """Write the original of the two small models, as transformers does."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 48, "max_position_embeddings": 128,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16)
    with torch.no_grad():
        for place, (_, weight) in enumerate(sorted(model.named_parameters())):
            weight.copy_(numbers(weight.shape, 1000 * place) + (weight.dim() == 1))
    model.save_pretrained(folder)
    return folder


def _make(work: Path) -> None:
    import json

    import bitsandbytes.functional as bnb
    from bitsandbytes.nn import Linear4bit
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.set_num_threads(1)
    tensors, hashes = {}, {}
    for name, dtype in DTYPES.items():
        codes, state = bnb.quantize_4bit(matrix().to(dtype), quant_type="nf4", blocksize=64)
        tensors |= {f"{name}.codes": codes.reshape(20, -1), f"{name}.absmax": state.absmax.reshape(20, -1)}
        hashes[name] = hash_of(bnb.dequantize_4bit(codes, state))
    mean = scales().mean()
    codes, state = bnb.quantize_blockwise((scales() - mean).reshape(-1), blocksize=256)
    tensors["double.nested"] = torch.cat([state.absmax, mean.reshape(1)])
    tensors["double.codes"] = codes.reshape(90, -1)
    hashes["double"] = hash_of(bnb.dequantize_blockwise(codes, state) + mean)
    FILES.mkdir(exist_ok=True)
    save_file(tensors, FILES / "matrix.safetensors")
    plain = plain_llama(work / "plain")
    for kind in ("single", "double"):
        wanted = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=kind == "double"
        )
        model = AutoModelForCausalLM.from_pretrained(
            plain, dtype=torch.bfloat16, device_map="cpu", quantization_config=wanted
        )
        model.save_pretrained(FILES / kind)
        for name, module in model.named_modules():
            if isinstance(module, Linear4bit):
                whole = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
                hashes[f"{kind} {name}.weight"] = hash_of(whole)
    (FILES / "dequantised.json").write_text(json.dumps(hashes, indent=1))


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as work:
        _make(Path(work))
