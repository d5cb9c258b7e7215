"""One budget for several reconstructions at once, such as the experts of a layer.

Shapes: A atoms of one problem with M activations, D outputs, N atoms of all problems together.

Each problem has its own Gram matrix, and atoms of different problems count as uncorrelated: the
joint Gram matrix is block-diagonal (WGSEF specification section 5: few experts fire together). The
problems must share their unit of error, so all Gram matrices are divided by one number of tokens.
All functions return masks of the atoms that stay, [A] per problem; `selection` has the same for one
problem.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from methods.wgsef.envelope.prox import debiased, hard
from methods.wgsef.layerwise.problem import Reconstruction
from methods.wgsef.layerwise.selection import Elimination, descend, largest_eigenvalue
from methods.wgsef.training.schedule import homotopy

Problems = Sequence[Reconstruction]
Selector = Callable[[Problems, int], list[Tensor]]

HOMOTOPY_STEPS = 200


def energy(problems: Problems, k: int) -> list[Tensor]:
    """Keep the k atoms of largest ||v_j||, ignoring what the others could compensate."""
    return _strongest(problems, [problem.readout for problem in problems], k)


def homotopy_path(problems: Problems, k: int) -> list[Tensor]:
    """Follow the debiased operator from ratio 0 to 1: gradient steps per problem, one budget."""
    # One step size for all problems: norms are comparable under one budget only if all atoms moved
    # in the same metric. The largest eigenvalue of a block-diagonal matrix is that of its blocks.
    smooth = max(largest_eigenvalue(problem.gram) for problem in problems)
    readouts = [problem.readout for problem in problems]
    # The last ratio stays below 1, where the operator would divide by 0; `_strongest` is its limit.
    for step in range(1, HOMOTOPY_STEPS):
        moved = [descend(p, v_MD, smooth) for p, v_MD in zip(problems, readouts, strict=True)]
        shrunk = debiased(_norms(problems, moved), k, homotopy(step / HOMOTOPY_STEPS))
        scales = shrunk.scale[0].split([problem.atoms for problem in problems])
        parts = zip(problems, moved, scales, strict=True)
        readouts = [problem.scaled(t_MD, scale_A) for problem, t_MD, scale_A in parts]
    return _strongest(problems, readouts, k)


def elimination(problems: Problems, k: int) -> list[Tensor]:
    """Remove one atom at a time, the cheapest of all problems.

    An elimination in one block leaves all others unchanged, so this is exactly the greedy
    elimination of the joint problem, at the cost of the single ones.
    """
    states = [Elimination(problem) for problem in problems]
    # One entry per problem, renewed only when an atom is removed from it, is always up to date.
    heap = [(*state.cheapest(), place) for place, state in enumerate(states)]
    heapq.heapify(heap)
    for _ in range(sum(problem.atoms for problem in problems) - k):
        _, atom, place = heapq.heappop(heap)
        states[place].drop(atom)
        if not bool(states[place].gone_A.all()):
            heapq.heappush(heap, (*states[place].cheapest(), place))
    return [~state.gone_A for state in states]


def _strongest(problems: Problems, readouts: Sequence[Tensor], k: int) -> list[Tensor]:
    """Return masks of the k atoms of largest norm."""
    kept_N = hard(_norms(problems, readouts), k).gate[0] > 0
    return list(kept_N.split([problem.atoms for problem in problems]))


def _norms(problems: Problems, readouts: Sequence[Tensor]) -> Tensor:
    pairs = zip(problems, readouts, strict=True)
    return torch.cat([problem.norms(v_MD) for problem, v_MD in pairs], -1)
