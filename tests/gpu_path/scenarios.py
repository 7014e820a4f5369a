"""What is walked on the pretended GPU: layouts, numerics, kernels. Each is compared with the CPU backend's own walk of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from megatron_ft.config.sections import Kernels, Numerics, Parallelism
from megatron_ft.models.architecture import Architecture

BF16, FP16 = {"bf16": True}, {"fp16": True, "initial_loss_scale": 1024.0}
LIMA = {"hidden_dropout": 0.3, "lima_dropout": True}
FULL = {"recompute_granularity": "full"}
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
SP, DISTRIBUTED = {"sequence_parallel": True}, {"use_distributed_optimizer": True}
VPP2 = PP2 | {"num_layers_per_virtual_pipeline_stage": 1}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}

LLAMA = Architecture(
    family="llama", num_layers=4, hidden_size=64, ffn_hidden_size=160, num_attention_heads=8, num_query_groups=4,
    head_dim=8, vocab_size=203, max_position_embeddings=256, norm_epsilon=1e-5,
)  # fmt: skip
ARCHITECTURES = {
    "llama": LLAMA,
    "window": dataclasses.replace(LLAMA, sliding_window=9),
    "falcon": dataclasses.replace(
        LLAMA, family="falcon", norm="layernorm", activation="gelu", parallel_block=True, tied_embeddings=True
    ),
    "blocks": dataclasses.replace(LLAMA, hidden_size=128, ffn_hidden_size=256, head_dim=32),
    "relu-falcon": dataclasses.replace(
        LLAMA, family="falcon", norm="layernorm", activation="relu", parallel_block=True, tied_embeddings=True
    ),
    "relu": dataclasses.replace(LLAMA, activation="reglu"),
    "relu2": dataclasses.replace(LLAMA, activation="relu2glu"),
    "qwen": dataclasses.replace(
        LLAMA, family="qwen3", qkv_bias=True, qk_norm=True, tied_embeddings=True, activation="geglu"
    ),
}


@dataclass(frozen=True)
class Scenario:
    """Two optimizer steps of a small model over 8 rows of 64 positions, one row a microbatch."""

    name: str
    processes: int = 1
    numerics: dict = field(default_factory=dict)
    parallel: dict = field(default_factory=dict)
    kernels: dict = field(default_factory=dict)
    architecture: str = "llama"
    packing: bool = True
    flash_attn: bool = False
    """flash-attn is installed"""
    varlen: str | None = None
    """release of torch whose varlen_attn there is; None: the installed one's"""
    thorough: bool = True
    """`make test` leaves it out"""
    broken: bool = False
    """norms under sequence parallelism whose gradients nobody sums"""
    lora: dict = field(default_factory=dict)
    """values of adapters; empty: the model itself is trained"""
    nf4: bool = False
    """the frozen linears hold NF4"""
    bitsandbytes: bool = False
    """bitsandbytes is installed"""

    @property
    def precision(self) -> str:
        return "bf16" if "bf16" in self.numerics else "fp16" if "fp16" in self.numerics else "fp32"

    def sections(self) -> tuple[Numerics, Parallelism, Kernels]:
        return Numerics(**self.numerics), Parallelism(**self.parallel), Kernels(**self.kernels)


_quick = {"thorough": False}
_FLASH = {"kernels": {"use_flash_attn": True}, "flash_attn": True}
SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("fp32", **_quick),
        Scenario("fp32-padded", packing=False),
        Scenario("fp32-lima", 1, LIMA),
        Scenario("bf16", 1, BF16),
        Scenario("bf16-padded", 1, BF16, packing=False),
        Scenario("bf16-window", 1, BF16, architecture="window", **_quick),
        Scenario("bf16-flash", 1, BF16, **_FLASH),
        Scenario("bf16-flash-window", 1, BF16, architecture="window", **_FLASH, **_quick),
        Scenario("bf16-unfused", 1, BF16, kernels={"fused_kernels": False}),
        Scenario("bf16-torch-2.10", 1, BF16, varlen="2.10", **_quick),
        Scenario("bf16-torch-2.10-window", 1, BF16, architecture="window", varlen="2.10"),
        Scenario("bf16-torch-2.11", 1, BF16, varlen="2.11"),
        Scenario("bf16-torch-2.11-window", 1, BF16, architecture="window", varlen="2.11"),
        Scenario("fp16", 1, FP16),
        Scenario("fp16-padded-distributed", 1, FP16, DISTRIBUTED, packing=False, **_quick),
        Scenario("bf16-lima", 1, BF16 | LIMA),
        Scenario("bf16-selective", 1, BF16 | {"recompute_granularity": "selective"}),
        Scenario(
            "bf16-selective-all",
            1,
            BF16 | {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp", "layernorm"]},
        ),
        Scenario("bf16-full", 1, BF16 | FULL),
        Scenario("bf16-full-lima", 1, BF16 | FULL | LIMA, **_quick),
        Scenario("bf16-gradients-bf16", 1, BF16 | {"grad_reduce_in_bf16": True}),
        Scenario("bf16-qwen", 1, BF16, architecture="qwen", **_quick),
        Scenario("bf16-falcon", 1, BF16, architecture="falcon"),
        Scenario("fp32-relu-falcon", architecture="relu-falcon", **_quick),
        Scenario("fp32-relu", architecture="relu"),
        Scenario("fp32-relu2", architecture="relu2"),
        Scenario("fp32-qwen", architecture="qwen", **_quick),
        Scenario("dp2-bf16", 2, BF16),
        Scenario("dp2-distributed-bf16", 2, BF16, DISTRIBUTED),
        Scenario("dp2-distributed-overlap-bf16", 2, BF16, DISTRIBUTED, OVERLAP, **_quick),
        Scenario("tp2-bf16", 2, BF16, TP2),
        Scenario("tp2-sp-bf16", 2, BF16, TP2 | SP),
        Scenario("tp2-sp-bf16-full-lima", 2, BF16 | FULL | LIMA, TP2 | SP),
        Scenario("pp2-bf16", 2, BF16, PP2),
        Scenario("pp2-padded-bf16", 2, BF16, PP2, packing=False),
        Scenario("pp2-vpp2-bf16", 2, BF16, VPP2, **_quick),
        Scenario("pp2-vpp2-overlap-bf16", 2, BF16, VPP2, {"overlap_p2p_communication": True}),
        Scenario("pp2-uneven-bf16", 2, BF16, PP2 | {"decoder_first_pipeline_num_layers": 1}),
        Scenario("pp2-tied-bf16", 2, BF16, PP2, architecture="falcon"),
        Scenario("tp2-pp2-bf16", 4, BF16, TP2 | PP2),
        Scenario(
            "tp2-pp2-sp-distributed-overlap-fp16", 4, FP16, TP2 | PP2 | DISTRIBUTED | SP, OVERLAP, **_quick
        ),
    )
}  # fmt: skip
_LORA = {"lora": {"rank": 4, "alpha": 1.0}}
_DROPPED = {"lora": {"rank": 4, "alpha": 1.0, "dropout": 0.2}}
_NF4 = {"architecture": "blocks", "nf4": True, "bitsandbytes": True}
_ALL = TP2 | PP2 | SP | DISTRIBUTED
SCENARIOS |= {
    scenario.name: scenario
    for scenario in (
        Scenario("lora-fp32", **_LORA),
        Scenario("lora-bf16", 1, BF16, **_LORA),
        Scenario("lora-dropout-bf16", 1, BF16, **_DROPPED, **_quick),
        Scenario("lora-full-dropout-bf16", 1, BF16 | FULL | LIMA, **_DROPPED),
        Scenario("lora-falcon-full-fp32", 1, FULL, architecture="falcon", **_DROPPED),
        Scenario("lora-dp2-distributed-bf16", 2, BF16, DISTRIBUTED, **_DROPPED),
        Scenario("lora-tp2-sp-dropout-fp32", 2, {}, TP2 | SP, **_DROPPED),
        Scenario("lora-tp2-pp2-sp-distributed-bf16", 4, BF16 | FULL, _ALL, OVERLAP, **_DROPPED, **_quick),
        Scenario("qlora-fp32", **_DROPPED, **_NF4),
        Scenario("qlora-without-bitsandbytes-bf16", 1, BF16, **_LORA, **_NF4 | {"bitsandbytes": False}),
        Scenario("qlora-full-bf16", 1, BF16 | FULL, **_DROPPED, **_NF4, **_quick),
        Scenario("qlora-tp2-pp2-sp-distributed-bf16", 4, BF16 | FULL, _ALL, **_DROPPED, **_NF4),
    )
}  # fmt: skip
# As many rows of vocabulary as 8 ranks pad to: a rank that had padding alone would wait for the others' largest logit.
ARCHITECTURES["wide"] = dataclasses.replace(LLAMA, num_query_groups=8, num_layers=8, vocab_size=1024)
WORLDS = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            "tp8-pp4-sp-full", 32, BF16 | FULL | LIMA,
            {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 4} | SP | DISTRIBUTED, architecture="wide",
        ),
        Scenario("tp2-pp2-dp2-overlap", 8, BF16, TP2 | PP2 | SP | DISTRIBUTED, OVERLAP, architecture="wide"),
        Scenario(
            "tp2-pp4-vpp2-overlap", 8, BF16,
            TP2 | {"pipeline_model_parallel_size": 4, "num_layers_per_virtual_pipeline_stage": 1},
            {"overlap_p2p_communication": True}, architecture="wide",
        ),
    )
}  # fmt: skip
"""Of which one rank is walked at a time, without numbers: the others are not there."""
ATTENTION_DROPOUT = Scenario("bf16-attention-dropout", 1, BF16 | {"attention_dropout": 0.1})
"""Drawn by the kernels, so its numbers are no one else's: that it runs, and learns, is what can be said."""
BROKEN = Scenario("tp2-sp-fp32-broken", 2, {}, TP2 | SP, broken=True)
BROKEN_LORA = Scenario("lora-tp2-sp-fp32-broken", 2, {}, TP2 | SP, broken=True, **_LORA)
