"""Steps of Muon for weights that are matrices or kernels, of Adam for all else: an optimizer that needs few steps. Knows no model.

Muon moves a matrix along the nearest orthogonal matrix to its averaged gradient, so that weak directions are learned as fast as strong
ones. The Newton-Schulz iteration runs on the small Gram matrix in float32. Source: K. Jordan and others, Muon (2024); size of a step
as in J. Liu and others, Muon is scalable for LLM training (2025), so that one learning rate serves both kinds. `torch.optim.Muon` takes
parameters of two axes alone; these are kernels.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

MOMENTUM = 0.95
BETAS = (0.9, 0.98)
STEP_RMS = 0.2
"""Root mean square of a matrix's step, per unit of learning rate: about that of Adam."""
_ITERATIONS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_SMALLEST_SIDE = 8
"""Thinner matrices go by Adam."""


class Muon(torch.optim.Optimizer):
    """`state_dict` holds all that a resumed training needs."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], learning_rate: float) -> None:
        kept = list(parameters)
        matrices = [parameter for parameter in kept if _is_matrix(parameter)]
        others = [parameter for parameter in kept if not _is_matrix(parameter)]
        groups = [{"params": matrices, "matrices": True}, {"params": others, "matrices": False}]
        super().__init__(groups, {"lr": learning_rate})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Nothing; every parameter that has a gradient is moved. Takes no closure."""
        assert closure is None
        for group in self.param_groups:
            move = self._move_matrix if group["matrices"] else self._move_by_adam
            for parameter in group["params"]:
                if parameter.grad is not None:
                    move(parameter, parameter.grad, self.state[parameter], group["lr"])

    @staticmethod
    def _move_matrix(parameter: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], rate: float) -> None:
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        ahead = gradient.lerp(state["momentum"], MOMENTUM)
        parameter.add_(nearest_orthogonal(ahead.flatten(1)).view_as(parameter), alpha=-rate)

    @staticmethod
    def _move_by_adam(parameter: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], rate: float) -> None:
        if not state:
            state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        state["step"] += 1
        state["mean"].lerp_(gradient, 1 - BETAS[0])
        state["square"].lerp_(gradient.square(), 1 - BETAS[1])
        mean = state["mean"] / (1 - BETAS[0] ** state["step"])
        square = state["square"] / (1 - BETAS[1] ** state["step"])
        parameter.addcdiv_(mean, square.sqrt().add_(1e-8), value=-rate)


def _is_matrix(parameter: torch.Tensor) -> bool:
    return parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) >= _SMALLEST_SIDE


def nearest_orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """[m n] with the singular vectors of `matrix` [m n], singular values near one another; its nonzero columns and rows have RMS 0.2.

    Columns that are zero stay zero: slices of a kernel that took no part are not moved.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    live = (wide != 0).any(0)
    wide = wide[:, live]
    gram = wide @ wide.T
    gram /= gram.norm() + 1e-20
    whitener = torch.eye(len(gram))
    first, second, third = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        factor = second * gram + third * gram @ gram
        factor.diagonal().add_(first)
        whitener = factor @ whitener
        gram = factor @ gram @ factor
    moved = whitener @ wide
    moved *= STEP_RMS * moved.numel() ** 0.5 / (moved.norm() + 1e-20)
    answer = torch.zeros(len(moved), len(live)).masked_scatter_(live.expand(len(moved), -1), moved)
    return answer.T if tall else answer
