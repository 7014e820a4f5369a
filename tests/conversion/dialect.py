"""A small writer of Megatron-LLM's checkpoints, made from its description alone and sharing nothing with our reader."""

import argparse
from pathlib import Path

import torch


class Settings(argparse.Namespace):
    """Pickled as argparse.Namespace, as the real args are."""

    def __reduce__(self):
        return argparse.Namespace, (), dict(vars(self))


def lace(head: torch.Tensor) -> torch.Tensor:
    """[D, h]: row 2j is row j, row 2j + 1 is row j + D/2."""
    laced = torch.empty_like(head)
    half = len(head) // 2
    for j in range(half):
        laced[2 * j], laced[2 * j + 1] = head[j], head[j + half]
    return laced


def qkv_llama(state, layer, heads, groups, dim):
    """Per group: its queries, its key, its value."""
    q, k, v = (state[f"model.layers.{layer}.self_attn.{n}_proj.weight"].split(dim) for n in "qkv")
    each = heads // groups
    return [torch.cat([*map(lace, q[g * each : (g + 1) * each]), lace(k[g]), v[g]]) for g in range(groups)]


def qkv_falcon(state, layer, heads, groups, dim):
    fused = state[f"transformer.h.{layer}.self_attention.query_key_value.weight"].split(dim)
    each = heads // groups + 2
    found = []
    for g in range(groups):
        rows = fused[g * each : (g + 1) * each]
        found.append(torch.cat([*map(lace, rows[:-1]), rows[-1]]))
    return found


def write_dialect(model, root: Path, tp: int, pp: int, trained: bool, flat: bool, padded: int) -> None:
    """trained: iter_0000042 with optimizer, random state and the names of training; else release, with the converter's names."""
    config, state = model.config, {k: v.detach() for k, v in model.state_dict().items()}
    falcon = config.model_type == "falcon"
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    groups = (config.num_kv_heads if config.new_decoder_architecture else 1) if falcon else config.num_key_value_heads
    dim, tied = config.hidden_size // heads, config.tie_word_embeddings
    names = ("encoder", "self_attention") if trained else ("transformer", "attention")
    folder = root / ("iter_0000042" if trained else "release")

    def padded_rows(key):
        full = torch.zeros(padded, config.hidden_size)
        full[: len(state[key])] = state[key]
        return full.chunk(tp)

    for p in range(pp):
        for t in range(tp):
            body = {}
            for local, layer in enumerate(range(p * layers // pp, (p + 1) * layers // pp)):
                at = f"layers.{local}."
                qkv = (qkv_falcon if falcon else qkv_llama)(state, layer, heads, groups, dim)
                body[f"{at}{names[1]}.query_key_value.weight"] = torch.cat(
                    qkv[t * groups // tp : (t + 1) * groups // tp]
                )
                if falcon:
                    hf = f"transformer.h.{layer}."
                    two = f"{hf}ln_attn.weight" in state
                    for kind in ("weight", "bias"):
                        body[f"{at}input_layernorm.{kind}"] = state[
                            f"{hf}{'ln_attn' if two else 'input_layernorm'}.{kind}"
                        ]
                        if two:
                            body[f"{at}mlp_layernorm.{kind}"] = state[f"{hf}ln_mlp.{kind}"]
                    dense, down = state[f"{hf}self_attention.dense.weight"], state[f"{hf}mlp.dense_4h_to_h.weight"]
                    up = state[f"{hf}mlp.dense_h_to_4h.weight"].chunk(tp)[t]
                else:
                    hf = f"model.layers.{layer}."
                    body[f"{at}input_layernorm.weight"] = state[f"{hf}input_layernorm.weight"]
                    body[f"{at}post_attention_layernorm.weight"] = state[f"{hf}post_attention_layernorm.weight"]
                    dense, down = state[f"{hf}self_attn.o_proj.weight"], state[f"{hf}mlp.down_proj.weight"]
                    both = (state[f"{hf}mlp.{n}_proj.weight"].chunk(tp)[t] for n in ("up", "gate"))
                    up = torch.cat(list(both))
                body[f"{at}{names[1]}.dense.weight"] = dense.chunk(tp, dim=1)[t].clone()
                body[f"{at}mlp.dense_h_to_4h.weight"] = up.clone()
                body[f"{at}mlp.dense_4h_to_h.weight"] = down.chunk(tp, dim=1)[t].clone()
            language, others = {names[0]: body}, {}
            embed = padded_rows("transformer.word_embeddings.weight" if falcon else "model.embed_tokens.weight")[t]
            if p == 0:
                language["embedding"] = (
                    {"word_embeddings.weight": embed} if flat else {"word_embeddings": {"weight": embed}}
                )
            if p == pp - 1:
                last = "transformer.ln_f" if falcon else "model.norm"
                for kind in ("weight", "bias") if falcon else ("weight",):
                    body[f"final_layernorm.{kind}"] = state[f"{last}.{kind}"]
                if not tied:
                    language["lm_head"] = padded_rows("lm_head.weight")[t].clone()
                elif pp > 1:
                    others["word_embeddings_for_head"] = {"weight": embed}
            args = Settings(
                num_layers=layers, hidden_size=config.hidden_size, num_attention_heads=heads,
                num_attention_heads_kv=groups, padded_vocab_size=padded, tie_embed_logits=tied,
                ffn_hidden_size=config.ffn_hidden_size if falcon else config.intermediate_size,
                use_rms_norm=not falcon, glu_activation=None if falcon else "swiglu", use_bias=False,
                parallel_attn=falcon, parallel_layernorm=falcon and config.new_decoder_architecture,
                max_position_embeddings=config.max_position_embeddings, params_dtype=torch.float32,
                layernorm_epsilon=config.layer_norm_epsilon if falcon else config.rms_norm_eps,
                rope_scaling_factor=1.0, rope_theta=10000.0,
            )  # fmt: skip
            saved = {"checkpoint_version": 3.0, "iteration": 42 if trained else "release", "args": args}
            saved["model"] = {"language_model": language, **others}
            if trained:
                import random

                import numpy

                saved["optimizer"] = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-5}]}
                saved["rng_state"] = [{"random": random.getstate(), "numpy": numpy.random.get_state()}]
            name = f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "")
            (folder / name).mkdir(parents=True)
            torch.save(saved, folder / name / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("42" if trained else "release")
