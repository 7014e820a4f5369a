"""FusedAdam with the signature of Transformer Engine 2.4 (pytorch/optimizers/fused_adam.py), over torch's AdamW; and the multi-tensor
functions that the engine's norm and copies use."""

import torch
from torch.optim.adamw import adamw


class FusedAdam(torch.optim.Optimizer):
    """State: exp_avg and exp_avg_sq a parameter, step a group."""

    def __init__(
        self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False, *,
        adam_w_mode=True, capturable=False, master_weights=False, master_weight_dtype=torch.float32,
        exp_avg_dtype=torch.float32, exp_avg_sq_dtype=torch.float32, use_decoupled_grad=False,
        store_param_remainders=False, set_grad_none=None,
    ):  # fmt: skip
        if amsgrad:
            raise RuntimeError("FusedAdam does not support the AMSGrad variant.")
        if not adam_w_mode or capturable or master_weights or use_decoupled_grad or store_param_remainders:
            raise NotImplementedError("this stub knows AdamW without master weights only")
        super().__init__(
            params,
            {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay},
        )

    def _initialize_state(self, param, state_name, zero_buffer, store_param_remainders=False):
        self.state[param][state_name] = torch.zeros_like(param)

    def initialize_state(self, param, store_param_remainders=False):
        for name in ("exp_avg", "exp_avg_sq"):
            self._initialize_state(param, name, True)

    @torch.no_grad()
    def step(self, closure=None, grad_scaler=None):
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            for p in (p for p in group["params"] if p.grad is not None):
                if not self.state[p]:
                    self.initialize_state(p)
                done = torch.full((), float(group["step"] - 1), device=p.device)
                moments = ([self.state[p][name]] for name in ("exp_avg", "exp_avg_sq"))
                adamw(
                    [p], [p.grad], *moments, [], [done], amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1],
                    lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False, fused=True,
                )  # fmt: skip


class FusedSGD(torch.optim.Optimizer):
    def __init__(self, *_, **__):
        raise NotImplementedError("a name only")


def multi_tensor_l2norm(_chunk, _overflow, tensors, per_tensor=False):
    return torch.stack([x.float().norm() for x in tensors[0]]).norm()[None], None


def multi_tensor_scale(_chunk, _overflow, tensors, scale):
    for source, target in zip(*tensors, strict=True):
        target.copy_(source * scale)


def multi_tensor_applier(operation, overflow, tensors, *args):
    return operation(2048 * 32, overflow, tensors, *args)
