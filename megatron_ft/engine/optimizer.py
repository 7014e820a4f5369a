"""AdamW and its schedule, for the engine.

megatron-core shards the state of an optimizer with the interface of apex's FusedAdam (one `step` per parameter group). torch's AdamW has
`step` per parameter, and its sharded state fails to load. So if neither Transformer Engine nor apex is installed, the engine uses
`FusedAdam` below: torch's fused AdamW kernel with apex's interface.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import optimizer as engine
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.optimizer import optimizer as base_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import local_multi_tensor_l2_norm
from torch.optim.adamw import adamw

from megatron_ft.config.sections import Batch, Numerics, Optimizer
from megatron_ft.engine.versions import patch


class FusedAdam(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), fused on CPU and GPU, with apex's state layout.

    Per parameter: exp_avg and exp_avg_sq, fp32, of its shape. Per group: step (int).
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, adam_w_mode: bool = True, bias_correction: bool = True, capturable: bool = False,
    ):  # fmt: skip
        """capturable: whether a step can be part of a CUDA graph; passed as False by megatron-core 0.19."""
        if not (adam_w_mode and bias_correction) or capturable:
            raise ValueError("FusedAdam decouples weight decay and corrects the bias; nothing else is implemented")
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": True, "step": 0},
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient. The group's step is counted even if this rank holds none of its parameters."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            adamw(
                params, [p.grad for p in params], [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params], [], _steps(group["step"], params),
                fused=bool(params), amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
                weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            )  # fmt: skip
            group["step"] += 1


def _steps(step: int, params: list) -> list[torch.Tensor]:
    """Return the step for each parameter, as the fused kernel wants it: on its device, filled there and not copied from the host."""
    return list(torch.full((len(params),), float(step), device=params[0].device).unbind()) if params else []


def norm_of_all(
    _chunk: int, _overflow: Any, tensors: list[list[torch.Tensor]], _each: bool
) -> tuple[torch.Tensor, None]:
    """Compute apex's multi_tensor_l2norm with torch's foreach operations: ([1] fp32 norm of all tensors, on their device; None)."""
    return torch.stack(torch._foreach_norm(tensors[0])).norm().float()[None], None


def scale_all(_chunk: int, _overflow: Any, tensors: list[list[torch.Tensor]], scale: float) -> None:
    """Compute apex's multi_tensor_scale: tensors[1] = tensors[0] * scale, in the types of tensors[1]. In place if both are the same."""
    source, target = tensors
    same = all(one is other for one, other in zip(source, target, strict=True))
    if same and source:
        torch._foreach_mul_(target, scale)
    elif source:
        torch._foreach_copy_(target, source if scale == 1.0 else torch._foreach_mul(source, scale))


def copy_all(this: list[torch.Tensor], that: list[torch.Tensor], overflow_buf: Any = None) -> None:
    """Copy each tensor of `this` into `that`."""
    scale_all(0, overflow_buf, [this, that], 1.0)


@patch(
    "0.16 to 0.19",
    "megatron.core.optimizer:Adam",
    "megatron.core.optimizer:USING_PYTORCH_OPTIMIZER",
    "megatron.core.optimizer.distrib_optimizer:Adam",
    "megatron.core.optimizer.distrib_optimizer:HAVE_APEX_OR_TE",
    "megatron.core.optimizer.clip_grads:l2_norm_impl",
    "megatron.core.optimizer.clip_grads:multi_tensor_scale_impl",
    "megatron.core.optimizer.optimizer:multi_tensor_scale_impl",
    "megatron.core.optimizer.optimizer:_multi_tensor_copy_this_to_that",
)
def offer_to_engine() -> None:
    """Give the engine what it takes from Transformer Engine or apex, where there is neither. Idempotent.

    Its own stand-ins go through the tensors one by one, and the norm's makes the host wait for each.
    """
    if engine.USING_PYTORCH_OPTIMIZER:
        engine.Adam, engine.USING_PYTORCH_OPTIMIZER = FusedAdam, False
        distrib_optimizer.Adam, distrib_optimizer.HAVE_APEX_OR_TE = FusedAdam, True
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = norm_of_all
        clip_grads.multi_tensor_scale_impl = base_optimizer.multi_tensor_scale_impl = scale_all
        base_optimizer._multi_tensor_copy_this_to_that = copy_all


def make_optimizer(model_chunks: list, section: Optimizer, numerics: Numerics, distributed: bool) -> Any:
    """Return the engine's optimizer for DDP-wrapped model chunks, with weight decay on matrices only."""
    offer_to_engine()
    config = engine.OptimizerConfig(
        optimizer="adam",
        lr=section.lr,
        min_lr=section.min_lr,
        weight_decay=section.weight_decay,
        adam_beta1=section.adam_beta1,
        adam_beta2=section.adam_beta2,
        adam_eps=section.adam_eps,
        clip_grad=section.clip_grad,
        bf16=numerics.bf16,
        fp16=numerics.fp16,
        params_dtype=model_chunks[0].config.params_dtype,
        loss_scale=numerics.loss_scale,
        initial_loss_scale=numerics.initial_loss_scale,
        min_loss_scale=numerics.min_loss_scale,
        loss_scale_window=numerics.loss_scale_window,
        hysteresis=numerics.hysteresis,
        use_distributed_optimizer=distributed,
        overlap_param_gather=model_chunks[0].ddp_config.overlap_param_gather,
    )
    made = engine.get_megatron_optimizer(config, model_chunks)
    _make_state(made)
    return made


def _make_state(optimizer: Any) -> None:
    """Make the moments now, not at the first update: a checkpoint may be saved before it, as while an fp16 loss scale still falls."""
    for part in optimizer.chained_optimizers:
        if part.optimizer is not None and part.init_state_fn is not None:
            part.init_state_fn(part.optimizer, part.config)


def make_schedule(optimizer: Any, section: Optimizer, batch: Batch) -> OptimizerParamScheduler:
    """Return a schedule with linear warm-up, then decay, counted in optimizer steps."""
    rises = section.weight_decay_incr_style != "constant"
    return OptimizerParamScheduler(
        optimizer,
        init_lr=section.lr_warmup_init,
        max_lr=section.lr,
        min_lr=section.min_lr,
        lr_warmup_steps=section.lr_warmup_iters,
        lr_decay_steps=section.lr_decay_iters or batch.train_iters,
        lr_decay_style=section.lr_decay_style,
        lr_wsd_decay_style=section.lr_wsd_decay_style,
        wsd_decay_steps=section.lr_wsd_decay_iters,
        start_wd=section.start_weight_decay if rises else section.weight_decay,
        end_wd=section.end_weight_decay if rises else section.weight_decay,
        wd_incr_steps=batch.train_iters,
        wd_incr_style=section.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
