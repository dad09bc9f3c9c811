"""torchtitan's optimizers, or Muon for the blocks' matrices with AdamW for everything else."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.optimizer import Optimizer


class MuonAdamW(Optimizer):
    """One optimizer over named groups: `kind` "muon" or "adamw".

    Muon (Jordan et al., 2024): the momentum of a matrix is replaced by its nearest orthogonal matrix, found by five
    Newton-Schulz steps, so that all directions move alike; about half the steps of AdamW on small models. A matrix
    [M, N] moves by lr * max(1, M / N)^0.5. AdamW (Loshchilov and Hutter, 2019) with bias correction. Weight decay is decoupled.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8):
        super().__init__(
            groups, {"lr": 1e-3, "kind": "adamw", "weight_decay": 0.0, "betas": betas, "eps": eps, "momentum": 0.95}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the parameters in place from their gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self._muon if group["kind"] == "muon" else self._adamw
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    update(parameter, parameter.grad, self.state[parameter], group)
        return loss

    def _muon(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(grad, 1 - group["momentum"])
        direction = _orthogonal(grad.lerp(state["momentum"], group["momentum"]))
        rows, columns = parameter.shape
        parameter.add_(direction, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    def _adamw(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        step = state["step"].item()
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        scale = state["exp_avg_sq"].sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        parameter.addcdiv_(state["exp_avg"], scale, value=-group["lr"] / (1 - beta1**step))


def _orthogonal(matrix: Tensor) -> Tensor:
    """`orthogonalize`; a sharded matrix is gathered for it, and each rank computes the whole and keeps its shard."""
    if not isinstance(matrix, DTensor):
        return orthogonalize(matrix)
    whole = orthogonalize(matrix.full_tensor())
    return distribute_tensor(whole, matrix.device_mesh, matrix.placements, src_data_rank=None)


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """A matrix [M, N] with the singular vectors of `matrix` and singular values near one (0.7 to 1.2).

    Newton-Schulz with the quintic of Jordan et al. (2024), x -> 3.4445 x - 4.7750 x^3 + 2.0315 x^5.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.mT) / (matrix.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


def parameter_groups(
    model: nn.Module, lr: float, muon_lr: float, embedding_lr: float, weight_decay: float
) -> list[dict]:
    """Matrices of repeated blocks to Muon; embedding, head and the rest to AdamW, norms and biases without decay."""
    whole = getattr(model, "whole", model)  # of a pipeline's stage: what it was cut from
    inside, embeds = set(), set()
    for path, module in whole.named_modules():
        if isinstance(module, nn.ModuleList):
            inside |= {f"{path}.{name}".lstrip(".") for name, parameter in module.named_parameters(remove_duplicate=False) if parameter.ndim == 2}
        if isinstance(module, nn.Embedding):
            embeds.add(f"{path}.weight".lstrip("."))
    every = [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]
    repeated, embedded = ({ident for name, ident in every if name in names} for names in (inside, embeds))
    groups = [
        {"params": [], "kind": "muon", "lr": muon_lr, "weight_decay": weight_decay},
        {"params": [], "kind": "adamw", "lr": embedding_lr or lr, "weight_decay": 0.0},
        {"params": [], "kind": "adamw", "lr": lr, "weight_decay": weight_decay},
        {"params": [], "kind": "adamw", "lr": lr, "weight_decay": 0.0},
    ]
    for parameter in model.parameters():
        if parameter.requires_grad:
            index = (
                1 if id(parameter) in embedded else 0 if id(parameter) in repeated else 2 if parameter.ndim == 2 else 3
            )
            groups[index]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def build_optimizers(model_parts: list[nn.Module], config: Any, parallel_dims: Any) -> Any:
    """torchtitan's container: of its own optimizer, or of `MuonAdamW` where `[ftc] optimizer = "muon"`."""
    from torchtitan.components import optimizer as torchtitan

    section = model_parts[0].section
    if section.optimizer == "torchtitan":
        return torchtitan.build_optimizers(model_parts, config, parallel_dims)

    class MuonContainer(torchtitan.OptimizersContainer):
        def __init__(self):
            self.model_parts = model_parts
            self.optimizers = [
                MuonAdamW(
                    parameter_groups(part, config.lr, section.muon_lr, section.embedding_lr, config.weight_decay),
                    betas=(config.beta1, config.beta2),
                    eps=config.eps,
                )
                for part in model_parts
            ]
            self._validate_length(len(model_parts))
            self._post_init(
                [p for part in model_parts for p in part.parameters() if p.requires_grad], {"lr": config.lr}
            )

    return MuonContainer()
