"""Division of a dense feed-forward's neurons into a shared expert, routed experts and a router.

The recipe is CMoE's (arXiv 2502.04416, its code at 42dfc94), after MoEfication (arXiv 2110.01786)
and LLaMA-MoE (arXiv 2406.16554). Neurons that are active for most tokens become the shared expert.
The others are clustered by the tokens for which they are active, in groups of equal size. A token's
experts are selected by scores that are computed instead of trained, and the output of a selected
expert is added with weight 1.

Three points differ. A neuron is active for a token if |h_i| ‖w_i‖, the size of its contribution to
the output, is among the largest, where CMoE ranks |h_i| of a normalised input and normalised rows.
The clustering takes up to five steps, where CMoE's code takes one. And the scores are linear in the
input, as in every published mixture, where CMoE uses the hidden state of one neuron per expert,
silu(g x) · (u x), which no router of transformers computes.

Shapes: T tokens, D d_model, F neurons, N routed neurons, E routed experts, W an expert's width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.models.structure.expert_view import ExpertView

ROUNDS = 5


@dataclass(frozen=True)
class ExpertLayout:
    """`experts` routed experts, and a shared one as wide as `shared` of them.

    For each token, the share `active` of neurons with the largest contributions counts as active.
    """

    experts: int
    shared: int
    active: float = 0.25

    def width(self, neurons: int) -> int:
        """Return the width of a routed expert."""
        return neurons // (self.experts + self.shared)


@dataclass(frozen=True)
class CarvedFeedForward:
    """Neurons of the shared expert [S] and of each routed one [E, W], and the router.

    The score of expert e for an input x is rows_e · x + offset_e: rows [E, D], offsets [E]. Over
    the calibration text, all scores together have mean 0 and standard deviation 1.
    """

    shared: Tensor
    experts: Tensor
    rows: Tensor
    offsets: Tensor


def carve_feed_forward(
    view: ExpertView, x_TD: Tensor, hidden_TF: Tensor, layout: ExpertLayout
) -> CarvedFeedForward:
    """Divide the neurons of a feed-forward by its hidden states on calibration text."""
    size_TF = hidden_TF.float().abs() * view.down.float().norm(dim=0)
    active_TF = most_active(size_TF, layout.active)
    width = layout.width(view.width)
    order_F = active_TF.mean(0).argsort(descending=True, stable=True)
    split = layout.shared * width
    shared, routed_N = order_F[:split].sort().values, order_F[split:].sort().values
    group_N = balanced_groups(active_TF[:, routed_N], layout.experts)
    experts_EW = torch.stack([routed_N[group_N == e] for e in range(layout.experts)])
    added = [
        view.down[:, own].float() @ hidden_TF[:, own].float().T for own in experts_EW
    ]  # [D, T] each
    size_TE = torch.stack([added_DT.norm(dim=0) for added_DT in added], dim=1)
    return CarvedFeedForward(shared, experts_EW, *linear_scores(x_TD, size_TE))


def most_active(size_TF: Tensor, share: float) -> Tensor:
    """Return 1 where a neuron is among the `share` largest of its token, else 0, [T, F]."""
    count = max(1, round(share * size_TF.shape[1]))
    largest = size_TF.topk(count, dim=1).indices
    return torch.zeros_like(size_TF).scatter_(1, largest, 1.0)


def balanced_groups(active_TN: Tensor, groups: int, rounds: int = ROUNDS) -> Tensor:
    """Return the group of each neuron, [N]: equal groups of neurons that are active together.

    Balanced k-means on the columns, up to `rounds` times: compute the means of the groups, then the
    equal groups with the least Σ_i ‖a_i - mean(group of i)‖², exactly as an assignment problem. The
    first centres are the neurons active most often, as in CMoE.
    """
    from scipy.optimize import linear_sum_assignment

    count = active_TN.shape[1]
    start = active_TN.sum(0).argsort(descending=True, stable=True)[:groups]
    centre_TG = active_TN[:, start]
    group_N = torch.zeros(count, dtype=torch.int64)
    for _ in range(rounds):
        # ‖a_i‖² is the same for all groups and left out.
        cost_NG = centre_TG.square().sum(0) - 2 * (active_TN.T @ centre_TG)
        places = cost_NG.repeat_interleave(count // groups, dim=1)
        _, place_N = linear_sum_assignment(places.double().cpu().numpy())
        found_N = torch.from_numpy(place_N) // (count // groups)
        if torch.equal(found_N, group_N):
            break
        group_N = found_N
        centre_TG = torch.stack(
            [active_TN[:, group_N == group].mean(1) for group in range(groups)], dim=1
        )
    return group_N


def linear_scores(x_TD: Tensor, size_TE: Tensor, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """Return rows [E, D] and offsets [E] of scores that predict the size of an expert's output.

    Ridge regression on the inputs: `damping` times the mean diagonal is added to the Gram matrix of
    the centred inputs. The mean over all experts of a token does not affect the selection and is
    subtracted. The scores are scaled to a standard deviation of 1.
    """
    mean_D, mean_E = x_TD.double().mean(0), size_TE.double().mean(0)
    centred_TD = x_TD.double() - mean_D
    gram_DD = centred_TD.T @ centred_TD
    gram_DD.diagonal().add_(damping * gram_DD.diagonal().mean().clamp(min=1e-30))
    rows_DE = torch.linalg.solve(gram_DD, centred_TD.T @ (size_TE.double() - mean_E))
    offset_E = mean_E - mean_D @ rows_DE
    rows_DE = rows_DE - rows_DE.mean(1, keepdim=True)
    offset_E = offset_E - offset_E.mean()
    deviation = (x_TD.double() @ rows_DE + offset_E).std().clamp(min=1e-30)
    return (rows_DE / deviation).T.float(), (offset_E / deviation).float()
