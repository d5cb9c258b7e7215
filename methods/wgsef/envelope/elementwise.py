"""The prox of the WGSEF in a metric that varies inside a group, as Adam's does.

Shapes: M groups, G elements in a group; the metric H and t are [M, G].

For a fixed gate u the minimiser is v_i = H_i u / (H_i u + s_j) t_i with s_j = lam d_j. The gates
solve u_j(eta) = clip(root of q_j(u) = eta, 0, 1) and sum_j u_j = k, where

    q_j(u) = (sum_{i in j} H_i^2 t_i^2 s_j / (H_i u + s_j)^2)^(-1/2)

(WGSEF specification 1.3, derived; eta = mu^(-1/2)). q_j is a power mean of linear functions, hence
concave and increasing: Newton from u = 0 approaches its root from below and never passes it. If the
metric is constant in each group, q_j is linear and this is `prox.envelope`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_INNER_PASSES = 8
_OUTER_PASSES = 80


def envelope_elementwise(
    t_MG: Tensor, metric_MG: Tensor, k: int, lam: float, weight_M: Tensor
) -> Tensor:
    """Return the proximal point v [M, G] of t in the diagonal metric; k groups, lam > 0.

    Costs tens of passes over the weights; a metric that is constant in each group costs one. Meant
    for small layers and as the reference for that approximation.
    """
    strength_M1 = (lam * weight_M)[:, None]
    live_M = t_MG.abs().amax(-1) > 0
    if int(live_M.sum()) <= k:
        gate_M = live_M.to(t_MG)
    else:
        gate_M = _search(t_MG, metric_MG, strength_M1, live_M, k)
    raised_MG = metric_MG * gate_M[:, None]
    return raised_MG / (raised_MG + strength_M1) * t_MG


def inverse_root(
    t_MG: Tensor, metric_MG: Tensor, strength_M1: Tensor, gate_M: Tensor
) -> tuple[Tensor, Tensor]:
    """Return q(u) and dq/du, both [M], at the gates u."""
    total_MG = metric_MG * gate_M[:, None] + strength_M1
    power_MG = (metric_MG * t_MG).square() * strength_M1 / total_MG.square()
    power_M = power_MG.sum(-1)
    q_M = power_M.rsqrt()
    return q_M, q_M / power_M * (power_MG * metric_MG / total_MG).sum(-1)


def gates_at(t_MG: Tensor, metric_MG: Tensor, strength_M1: Tensor, eta: Tensor) -> Tensor:
    """Return u_M = clip(q^-1(eta), 0, 1) by Newton from below."""
    gate_M = torch.zeros_like(strength_M1[:, 0])
    for _ in range(_INNER_PASSES):
        q_M, rate_M = inverse_root(t_MG, metric_MG, strength_M1, gate_M)
        # The iterate never passes the root in exact arithmetic; clamping keeps rounding from moving
        # it back.
        gate_M = (gate_M + (eta - q_M).clamp(min=0) / rate_M).clamp(max=1)
    return gate_M


def _search(t_MG: Tensor, metric_MG: Tensor, strength_M1: Tensor, live_M: Tensor, k: int) -> Tensor:
    """Return the gates whose sum is k, by Newton on eta inside a bracket."""
    args = (t_MG[live_M], metric_MG[live_M], strength_M1[live_M])
    low = torch.zeros((), dtype=t_MG.dtype, device=t_MG.device)
    # q increases in u, so at the largest q(1) every live group is whole: an upper end of the
    # bracket.
    high = inverse_root(*args, torch.ones_like(args[2][:, 0]))[0].max()
    eta = 0.5 * high
    gate_M = torch.zeros_like(t_MG[:, 0])
    for _ in range(_OUTER_PASSES):
        found_M = gates_at(*args, eta)
        missing = k - found_M.sum()
        if abs(float(missing)) <= 1e-13 * k:
            break
        low, high = (eta, high) if missing > 0 else (low, eta)
        rate_M = inverse_root(*args, found_M)[1]
        # By the inverse function theorem du/deta = 1 / q'(u) for fractional groups, 0 for all
        # others.
        slope = ((found_M > 0) & (found_M < 1)).div(rate_M).sum()
        target = eta + missing / slope
        eta = target if bool((target > low) & (target < high)) else 0.5 * (low + high)
    gate_M[live_M] = torch.where(found_M < 1e-9, 0.0, found_M)
    return gate_M
