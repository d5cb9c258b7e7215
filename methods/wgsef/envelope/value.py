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

from methods.wgsef.envelope.budget import Budget
from methods.wgsef.envelope.newton import newton


def value(norm_LM: Tensor, weight_LM: Tensor, k_L: Tensor) -> Tensor:
    """Return F_L = 1/2 min over u in [0,1]^M, sum u <= k, of sum_j d_j ||v_j||^2 / u_j.

    The minimiser is u_j = min(1, eta z_j) with z_j = sqrt(d_j) ||v_j|| and sum u = k.
    """
    z_LM = weight_LM.sqrt() * norm_LM
    u_LM = _gates(z_LM, k_L)
    # An empty group has z = u = 0, and its term is 0 by continuity, not 0 / 0.
    return 0.5 * torch.where(z_LM > 0, z_LM.square() / u_LM, 0.0).sum(-1)


def value_in_closed_form(norm_LM: Tensor, weight_LM: Tensor, k: int) -> Tensor:
    """Return F_L as half the squared k-support norm of z (Argyriou, Foygel and Srebro, 2012).

    With z sorted in descending order there is one r in 0..k-1 such that the mean rule z_(k-r-1) > A
    >= z_(k-r), A = sum_{i >= k-r} z_(i) / (r + 1), holds; then F = 1/2 (sum_{i < k-r} z_(i)^2 + (r
    + 1) A^2). The oracle for `value`.
    """
    z_LM = (weight_LM.sqrt() * norm_LM).sort(-1, descending=True).values
    infinite_L1 = torch.full_like(z_LM[:, :1], torch.inf)
    above_LM = torch.cat([infinite_L1, z_LM], -1)
    values_L = torch.full_like(z_LM[:, 0], torch.nan)
    for r in range(k):
        mean_L = z_LM[:, k - r - 1 :].sum(-1) / (r + 1)
        fits_L = (above_LM[:, k - r - 1] > mean_L) & (mean_L >= above_LM[:, k - r])
        head_L = z_LM[:, : k - r - 1].square().sum(-1)
        candidate_L = 0.5 * (head_L + (r + 1) * mean_L.square())
        values_L = torch.where(values_L.isnan() & fits_L, candidate_L, values_L)
    return values_L


def conjugate(norm_LM: Tensor, weight_LM: Tensor, k: int) -> Tensor:
    """Return F*_L(y) = 1/2 times the sum of the k largest ||y_j||^2 / d_j."""
    return 0.5 * (norm_LM.square() / weight_LM).topk(k, -1).values.sum(-1)


def gradient_factor(norm_LM: Tensor, weight_LM: Tensor, k_L: Tensor) -> Tensor:
    """Return the factors d_j / u_j that turn v into the gradient of F; 0 for empty groups.

    At v_j = 0 zero is one of the subgradients, which fill a ball of radius sqrt(d_j) / eta.
    """
    u_LM = _gates(weight_LM.sqrt() * norm_LM, k_L)
    return torch.where(norm_LM > 0, weight_LM / u_LM, 0.0)


def excess(norm_LM: Tensor, weight_LM: Tensor, k_L: Tensor) -> Tensor:
    """Return h_k = F - 1/2 sum_j d_j ||v_j||^2 [L]: zero exactly if at most k groups are alive.

    A continuous measure of how far a row is from having k groups (specification 1.2).
    """
    ridge_L = 0.5 * (weight_LM * norm_LM.square()).sum(-1)
    return value(norm_LM, weight_LM, k_L) - ridge_L


def fenchel_young_gap(v_LMG: Tensor, y_LMG: Tensor, weight_LM: Tensor, k: int) -> Tensor:
    """Return F(v) + F*(y) - <v, y> [L]: never negative, zero iff y is a subgradient of F at v.

    With y = (t - v) / lam it certifies that v is the proximal point of t. G elements per group.
    """
    k_L = torch.full_like(v_LMG[:, 0, 0], k)
    primal_L = value(v_LMG.norm(dim=-1), weight_LM, k_L)
    dual_L = conjugate(y_LMG.norm(dim=-1), weight_LM, k)
    return primal_L + dual_L - (v_LMG * y_LMG).sum((-1, -2))


def _gates(z_LM: Tensor, k_L: Tensor) -> Tensor:
    """Return u_LM = min(1, eta z_j) with sum u = k, or 1 for all live groups if they fit."""
    budget = Budget(z_LM, torch.zeros_like(z_LM[:, :1]), k_L.to(z_LM))
    # No guard: the value divides by the gates, so a small gate set to zero would give infinity.
    return budget.gates(newton(budget), guard=0.0)
