"""The weighted group sparse envelope function: value, conjugate, gradient, certificate.

Shapes: L rows (layers), M groups in a row. All functions see the groups through their Euclidean
norms ||v_j|| and the weights d_j > 0 (both in units of the weights or dimensionless; F is then in
units of the weights squared).

With C_k the vectors of at most k non-zero groups, the WGSEF (arXiv 2212.12921) is the biconjugate

    F = f_k**,   f_k(v) = 1/2 sum_j d_j ||v_j||^2 on C_k and +inf elsewhere.

Formulas: WGSEF specification section 1, derived there and checked here by certificates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from methods.wgsef.prox.root import BudgetEquation, newton_root


def envelope_value(norm_LM: Tensor, weight_LM: Tensor, k_L: Tensor) -> Tensor:
    """Return F_L = 1/2 min over u in [0,1]^M, sum u <= k, of sum_j d_j ||v_j||^2 / u_j.

    The minimiser is u_j = min(1, eta z_j) with z_j = sqrt(d_j) ||v_j|| and sum u = k.
    """
    z_LM = weight_LM.sqrt() * norm_LM
    u_LM = _gates(z_LM, k_L)
    # An empty group has z = u = 0, and its term is 0 by continuity, not 0 / 0.
    return 0.5 * torch.where(z_LM > 0, z_LM.square() / u_LM, 0.0).sum(-1)


def envelope_conjugate(norm_LM: Tensor, weight_LM: Tensor, k: int) -> Tensor:
    """Return F*_L(y) = 1/2 times the sum of the k largest ||y_j||^2 / d_j."""
    return 0.5 * (norm_LM.square() / weight_LM).topk(k, -1).values.sum(-1)


def gradient_factor(norm_LM: Tensor, weight_LM: Tensor, k_L: Tensor) -> Tensor:
    """Return the factors d_j / u_j that turn v into the gradient of F; 0 for empty groups.

    At v_j = 0 zero is one of the subgradients, which fill a ball of radius sqrt(d_j) / eta.
    """
    u_LM = _gates(weight_LM.sqrt() * norm_LM, k_L)
    return torch.where(norm_LM > 0, weight_LM / u_LM, 0.0)


def _gates(z_LM: Tensor, k_L: Tensor) -> Tensor:
    """Return u_LM = min(1, eta z_j) with sum u = k, or 1 for all live groups if they fit."""
    budget = BudgetEquation(z_LM, torch.zeros_like(z_LM[:, :1]), k_L.to(z_LM))
    # No guard: the value divides by the gates, so a small gate set to zero would give infinity.
    return budget.gates(newton_root(budget), guard=0.0)
