"""AdamW and Muon over a model's named parameters, and the learning rate's rise and fall.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) replaces the momentum of a
matrix by the nearest orthogonal one.  Here all matrices of one shape are orthogonalised together,
in float32 on CPU: ``torch.optim.Muon`` does it in bfloat16, which CPUs without bfloat16
instructions emulate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastlm.training.config import ResolvedConfig

# Polar Express (Amsel et al., 2025, https://arxiv.org/abs/2505.16932): the odd quintics that,
# applied in turn, bring singular values in [0.01, 1] closest to 1, computed for three of them: all
# values then lie in [0.73, 1.27].
POLYNOMIALS = ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))
MOMENTUM = 0.95
ADAM_BETAS = (0.9, 0.99)


def learning_rate_share(step: int, config: ResolvedConfig) -> float:
    """What part of the peak learning rate ``step``, counted from 0, uses.

    Rises linearly over the warm-up, and falls to 0 at the end of the run.
    """
    rise = min(1.0, (step + 1) / (config.warmup or 1))
    falling = config.decay * config.steps
    left = (config.steps - step) / falling if falling else 1.0
    if left >= 1.0:
        return rise
    return rise * (left if config.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left))


def orthogonalize(matrices: Tensor) -> Tensor:
    """The orthogonal factor of each matrix, roughly: singular values come close to 1.

    Those above a hundredth of the matrix's norm do, that is.

    Args:
        matrices: ``(n, rows, columns)`` with ``rows <= columns``; float32, or bfloat16 on a GPU.
    """
    # the paper's margin: rounding must not carry a singular value beyond 1
    norms = torch.linalg.matrix_norm(matrices, keepdim=True) * 1.01
    x = matrices / norms.clamp(min=1e-12)
    for a, b, c in POLYNOMIALS:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


@dataclass
class _Stack:
    """Matrices of one shape, tall ones lying on their side."""

    names: list[str]
    parameters: list[Tensor]
    momentum: Tensor

    def gradients(self) -> Tensor:
        return torch.stack([_wide(p.grad) for p in self.parameters if p.grad is not None])


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


class Muon:
    """Muon with Nesterov momentum for 2-D parameters.

    The update of a ``(rows, columns)`` matrix has singular values of about
    ``sqrt(max(1, rows / columns))``.

    Args:
        parameters: Name and matrix.
        lr: Peak learning rate.
        weight_decay: Each step shrinks the matrices by ``lr * weight_decay``.
    """

    def __init__(self, parameters: Mapping[str, Tensor], lr: float, weight_decay: float) -> None:
        self.lr, self.weight_decay = lr, weight_decay
        by_shape: dict[tuple[torch.Size, torch.device], list[str]] = {}
        for name, parameter in parameters.items():
            by_shape.setdefault((_wide(parameter).shape, parameter.device), []).append(name)
        self.stacks = [
            _Stack(names, [parameters[n] for n in names], torch.zeros(len(names), *shape, device=d))
            for (shape, d), names in by_shape.items()
        ]

    @torch.no_grad()
    def step(self, share: float, healthy: Tensor) -> None:
        """Apply the gradients at ``share`` of the learning rate; do nothing unless ``healthy``."""
        rate = self.lr * share * healthy
        for stack in self.stacks:
            gradients = torch.where(healthy, stack.gradients().float(), stack.momentum)
            stack.momentum.lerp_(gradients, 1 - MOMENTUM)
            direction = gradients.lerp_(stack.momentum, MOMENTUM)
            if direction.is_cuda:
                direction = direction.bfloat16()
            for parameter, update in zip(
                stack.parameters, orthogonalize(direction).float(), strict=True
            ):
                rows, columns = parameter.shape
                if self.weight_decay:
                    parameter.mul_(1 - rate * self.weight_decay)
                update = update if rows <= columns else update.mT
                parameter.sub_(update * (rate * math.sqrt(max(1, rows / columns))))

    def state(self) -> dict[str, Tensor]:
        return {
            f"muon.{name}.momentum": momentum
            for stack in self.stacks
            for name, momentum in zip(stack.names, stack.momentum, strict=True)
        }


class Optimizer:
    """The update rules of a run: Muon for the matrices of the blocks, if asked for, AdamW else.

    Args:
        model: Its parameters under ``layers`` are the blocks'.
        config: The run.
    """

    def __init__(self, model: nn.Module, config: ResolvedConfig) -> None:
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        blocks = {n: p for n, p in named.items() if ".layers." in f".{n}" and p.dim() == 2}
        rest = {n: p for n, p in named.items() if n not in blocks}
        self.muon = None
        groups = [{"params": list(rest.values()), "lr": config.embedding_lr, "weight_decay": 0.0}]
        if config.optimizer == "muon":
            self.muon = Muon(blocks, config.lr, config.weight_decay)
            self.names = list(rest)
        else:
            groups.append(
                {
                    "params": list(blocks.values()),
                    "lr": config.lr,
                    "weight_decay": config.weight_decay,
                }
            )
            self.names = [*rest, *blocks]
        # fused: one pass over all parameters, and the only one that can skip a step on the device
        self.adamw = torch.optim.AdamW(groups, betas=ADAM_BETAS, fused=True)
        self.peaks: list[float] = [group["lr"] for group in self.adamw.param_groups]

    def step(self, share: float, healthy: Tensor) -> None:
        """One update at ``share`` of the learning rates.

        Args:
            share: From :func:`learning_rate_share`.
            healthy: Scalar bool on the device; if False nothing changes.  The host is not asked.
        """
        for group, peak in zip(self.adamw.param_groups, self.peaks, strict=True):
            group["lr"] = peak * share
        # the protocol by which torch.amp.GradScaler makes a fused optimizer skip
        self.adamw.found_inf = (~healthy).float()  # type: ignore[attr-defined]
        self.adamw.step()
        if self.muon is not None:
            self.muon.step(share, healthy)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the next step depends on, by name; not copies."""
        state = {} if self.muon is None else self.muon.state()
        for name, parameter in zip(self.names, self._adamw_parameters(), strict=True):
            for kind, value in self.adamw.state[parameter].items():
                state[f"adamw.{name}.{kind}"] = value
        return state

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` gave; KeyError or RuntimeError if it is another model's."""
        if self.muon is not None:
            for name, momentum in self.muon.state().items():
                momentum.copy_(state[name])
        for name, parameter in zip(self.names, self._adamw_parameters(), strict=True):
            prefix = f"adamw.{name}."
            self.adamw.state[parameter] = {
                key.removeprefix(prefix): value.to(parameter.device)
                for key, value in state.items()
                if key.startswith(prefix)
            }

    def _adamw_parameters(self) -> list[Tensor]:
        return [parameter for group in self.adamw.param_groups for parameter in group["params"]]
