"""Flags about the model against the checkpoint: what agrees passes, contradiction is refused or, by choice, warned about."""

import dataclasses
import logging
import re

import pytest

from megatron_ft.checkpoints.folder import CheckpointConfig
from megatron_ft.config.expected import Model
from megatron_ft.config.sections import Data, Kernels, Numerics, Optimizer
from megatron_ft.config.settings import TrainingSettings
from megatron_ft.errors import ConfigError
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.kernels import Machine, choose
from megatron_ft.models.rope import extend
from megatron_ft.training.kernel_report import report_kernels
from megatron_ft.training.model_flags import check_model_flags
from megatron_ft.training.resumed import log_changes

ARCH = Architecture(
    family="llama", num_layers=4, hidden_size=64, ffn_hidden_size=160, num_attention_heads=8, num_query_groups=4,
    head_dim=8, vocab_size=203, max_position_embeddings=256, norm_epsilon=1e-5,
)  # fmt: skip


def checkpoint(**changes):
    arch = dataclasses.replace(ARCH, **changes)
    return CheckpointConfig(arch, "torch_dist", 1, 1, 256, "release", "fp32")


def test_flags_that_agree_change_nothing():
    flags = Model(
        model_name="llama2", use_rms_norm=True, glu_activation="swiglu", no_tie_embed_logits=True, num_layers=4,
        layernorm_epsilon=1e-5, max_position_embeddings=256, position_embedding_type="rotary",
        rope_scaling_factor=1.0, num_attention_heads_kv=4,
    )  # fmt: skip
    assert check_model_flags(flags, checkpoint()) == checkpoint()


def test_other_kinds_of_models_agree_too():
    qwen = Model(
        disable_bias_linear=True, add_qkv_bias=True, qk_layernorm=True, normalization="RMSNorm", rotary_base=1e6, kv_channels=16,
        group_query_attention=True, vocab_size=203,
    )  # fmt: skip
    made = {"qkv_bias": True, "qk_norm": True, "rope_theta": 1e6, "head_dim": 16}
    assert check_model_flags(qwen, checkpoint(**made)) == checkpoint(**made)
    falcon = Model(parallel_attn=True, parallel_layernorm=True, normalization="LayerNorm", disable_bias_linear=True)
    made = {"parallel_block": True, "norm": "layernorm", "activation": "gelu"}
    assert check_model_flags(falcon, checkpoint(**made)) == checkpoint(**made)
    llama = Model(group_query_attention=True, num_attention_heads_kv=8)
    assert check_model_flags(llama, checkpoint(num_query_groups=8)) == checkpoint(num_query_groups=8)


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


def test_megatron_lms_window_and_rope_scaling_that_agree():
    """A token sees `left` keys before it and itself; Llama 3's scaling is compared, and never added."""
    windowed, scaled = checkpoint(sliding_window=64), checkpoint(rope_scaling=LLAMA3)
    for text in ("(63, 0)", "63,0", "[63,0]", "63 0"):
        assert check_model_flags(Model(window_size=text), windowed) == windowed
    assert check_model_flags(Model(window_size="(-1, 0)"), checkpoint()) == checkpoint()
    for factor in (None, 8.0):
        assert check_model_flags(Model(use_rope_scaling=True, rope_scaling_factor=factor), scaled) == scaled
    with pytest.raises(
        ConfigError, match=r"--window_size wide: write the keys to the left and to the right, as in 4095,0"
    ):
        check_model_flags(Model(window_size="wide"), windowed)


CONTRADICTIONS = [
    (Model(num_layers=80), {}, "--num_layers 80, checkpoint 4"),
    (Model(layernorm_epsilon=1e-6), {}, "--layernorm_epsilon 1e-06, checkpoint 1e-05"),
    (Model(no_tie_embed_logits=True), {"tied_embeddings": True}, "--no_tie_embed_logits, checkpoint tied"),
    (Model(use_rms_norm=True), {"norm": "layernorm"}, "--use_rms_norm, checkpoint layernorm"),
    (Model(model_name="falcon"), {}, "--model_name falcon, checkpoint llama"),
    (Model(normalization="LayerNorm"), {}, "--normalization LayerNorm, checkpoint rmsnorm"),
    (Model(rotary_base=1e6), {}, "--rotary_base 1000000.0, checkpoint 10000.0"),
    (Model(kv_channels=16), {}, "--kv_channels 16, checkpoint 8"),
    (Model(rotary_percent=0.5), {}, "--rotary_percent 0.5, checkpoint 1.0"),
    (Model(sliding_window_size=64), {}, "--sliding_window_size 64, checkpoint None"),
    (Model(window_size="(64, 0)"), {}, r"--window_size \(64, 0\) \(65 keys.* checkpoint no window"),
    (Model(window_size="64,0"), {"sliding_window": 64}, "--window_size 64,0 .65 keys, .* checkpoint 64"),
    (Model(window_size="(-1, 0)"), {"sliding_window": 64}, "no window.*, checkpoint 64"),
    (
        Model(use_rope_scaling=True),
        {},
        "--use_rope_scaling .Llama 3's: rope_type llama3, factor 8.*, checkpoint no RoPE scaling",
    ),
    (
        Model(use_rope_scaling=True, rope_scaling_factor=32),
        {"rope_scaling": LLAMA3},
        "factor 32.*, checkpoint factor 8",
    ),
    (Model(vocab_size=256), {}, "--vocab_size 256, checkpoint 203"),
    (Model(glu_activation="geglu"), {}, "--glu_activation geglu, checkpoint swiglu"),
    (Model(group_query_attention=True), {"num_query_groups": 8}, "--group_query_attention, checkpoint as many .* 8"),
    (Model(disable_bias_linear=True), {"qkv_bias": True}, "--disable_bias_linear, checkpoint biases"),
    (Model(add_qkv_bias=True), {}, "--add_qkv_bias, checkpoint no biases"),
    (Model(qk_layernorm=True), {}, "--qk_layernorm, checkpoint no norms"),
    (Model(parallel_attn=True), {}, "--parallel_attn, checkpoint attention before MLP"),
    (
        Model(parallel_layernorm=True),
        {"parallel_block": True, "shared_norm": True},
        "--parallel_layernorm, .* one norm",
    ),
]


@pytest.mark.parametrize(("flags", "changes", "message"), CONTRADICTIONS)
def test_a_contradiction_is_refused_or_warned_about(flags, changes, message, caplog):
    with pytest.raises(ConfigError, match=message):
        check_model_flags(flags, checkpoint(**changes))
    with caplog.at_level(logging.WARNING):
        agreed = check_model_flags(dataclasses.replace(flags, use_checkpoint_args=True), checkpoint(**changes))
    assert agreed == checkpoint(**changes) and re.search(message, caplog.text)


@pytest.mark.parametrize("name", ["llama", "llama2", "Llama-2", "codellama", "llama3"])
def test_names_of_the_llama_family(name):
    assert check_model_flags(Model(model_name=name), checkpoint()) == checkpoint()


def test_rope_is_scaled_once():
    """An unscaled checkpoint takes the flags' scaling and remembers it; told otherwise later, it refuses."""
    scaled = check_model_flags(Model(rope_scaling_factor=4.0), checkpoint())
    assert scaled.architecture == extend(ARCH, "linear", 4.0)
    assert scaled.architecture.max_position_embeddings == 1024
    assert check_model_flags(Model(rope_scaling_factor=4.0), scaled) == scaled
    assert check_model_flags(Model(), scaled) == scaled
    for flags in (Model(rope_scaling_factor=2.0), Model(rope_scaling_factor=1.0)):
        with pytest.raises(ConfigError, match="scaled already"):
            check_model_flags(flags, scaled)


@pytest.mark.parametrize("method", ["linear", "ntk", "ntk-margin", "ntk-yarn", "ntk-by-parts", "yarn", "dynamic"])
def test_every_method_can_be_asked_for(method):
    flags = Model(rope_scaling_type=method, rope_scaling_factor=4.0)
    scaled = check_model_flags(flags, checkpoint())
    assert scaled.architecture == extend(ARCH, method, 4.0) != ARCH
    assert check_model_flags(flags, scaled) == scaled


def test_resuming_with_other_rows_is_said(tmp_path, caplog):
    from megatron_ft.config.cli import write_sections

    saved = Data(data_path=["a"], seq_length=64)
    (tmp_path / "training.yaml").write_text(write_sections([saved]))
    with caplog.at_level(logging.WARNING):
        log_changes(tmp_path / "training.yaml", TrainingSettings(data=saved))
        log_changes(tmp_path / "nothing.yaml", TrainingSettings(data=saved))
    assert not caplog.messages
    with caplog.at_level(logging.WARNING):
        log_changes(tmp_path / "training.yaml", TrainingSettings.of(data_path=["a"], seq_length=32, seed=7))
    assert len(caplog.messages) == 2 and "--seq_length 32, saved with 64" in caplog.text


def test_resuming_with_other_settings_is_said(tmp_path, caplog):
    from megatron_ft.config.cli import write_sections

    saved = tmp_path / "training.yaml"
    saved.write_text(write_sections([Data(), Optimizer(lr=1e-3), Numerics(hidden_dropout=0.1)]))
    with caplog.at_level(logging.INFO):
        log_changes(saved, TrainingSettings.of(lr=1e-3, hidden_dropout=0.1))
        assert not caplog.messages
        log_changes(saved, TrainingSettings.of(lr=1e-5))
    assert caplog.messages == ["changed since the checkpoint: --lr 0.001 -> 1e-05, --hidden_dropout 0.1 -> 0.0"]
    saved.write_text("a: [1")
    log_changes(saved, TrainingSettings())


def test_kernels_are_logged_once_and_flags_without_effect_named(caplog):
    flags = Kernels(use_flash_attn=True, no_bias_gelu_fusion=True, overlap_grad_reduce=True, tp_comm_overlap=True)
    choice = choose(flags, Numerics(bf16=True), Machine())
    with caplog.at_level(logging.INFO):
        report_kernels(flags, choice, has_gpu=False)
    said, *ignored = caplog.messages
    assert said.startswith("kernels: attention by torch") and "packed attention by" in said
    assert [line.split(":")[0] for line in ignored] == [
        "--use_flash_attn",
        "--overlap_grad_reduce",
        "--tp_comm_overlap",
    ]
