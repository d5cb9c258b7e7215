"""The reconstruction of one layer's output from few of its atoms, as a quadratic problem.

Shapes: M atoms (FFN neurons, micro-experts or heads), D outputs, T tokens, K kept atoms.

A layer reads out Y = sum_j phi_j w_j with activations phi_j (routing weight included). In units
where every activation has root mean square 1, v_j = s_j w_j and s_j = RMS(phi_j), the problem is

    min_V  1/(2 T) || sum_j (phi_j / s_j) v_j - Y ||_F^2   with at most k atoms

(WGSEF specification section 5, derived). It needs the Gram matrix only, so calibration text is
streamed once. ||v_j|| = RMS(phi_j) ||w_j|| is an energy in the sense of CAMERA.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reconstruction:
    """Gram matrix [M, M], its product with the true read-out [M, D], and the scales s [M].

    `readout` is the true V [M, D], in units of the outputs; all are fp64.
    """

    gram: Tensor
    target: Tensor
    readout: Tensor
    scale: Tensor

    @classmethod
    def of(cls, gram_MM: Tensor, weight_MD: Tensor) -> Reconstruction:
        """Return the problem of a layer with activations of Gram phi^T phi / T and read-out w.

        Atoms that were never active have no energy; their scale is 1, for it is divided by.
        """
        size_M = gram_MM.diagonal().double().sqrt()
        readout_MD = weight_MD.double() * size_M[:, None]
        scale_M = torch.where(size_M > 0, size_M, torch.ones_like(size_M))
        scaled_MM = gram_MM.double() / (scale_M[:, None] * scale_M)
        return cls(scaled_MM, scaled_MM @ readout_MD, readout_MD, scale_M)

    def error(self, v_MD: Tensor) -> float:
        """Return || sum_j (phi_j / s_j) v_j - Y ||^2 / || Y ||^2."""
        gap_MD = v_MD - self.readout
        wrong = (gap_MD * (self.gram @ gap_MD)).sum()
        return float(wrong / (self.readout * self.target).sum())

    def weights(self, v_MD: Tensor) -> Tensor:
        """Return v in the units of the layer's own weights, w = v / s."""
        return v_MD / self.scale[:, None]

    def refit(self, keep_M: Tensor, damping: float = 1e-8) -> Tensor:
        """Return the V [M, D] of least error that uses the kept atoms only.

        `damping` is relative to the mean diagonal; it decides between atoms that always fire alike.
        """
        place_K = keep_M.nonzero()[:, 0]
        gram_KK = self.gram[place_K][:, place_K].clone()
        gram_KK.diagonal().add_(damping * gram_KK.diagonal().mean())
        v_MD = torch.zeros_like(self.readout)
        factor_KK: Tensor = torch.linalg.cholesky(gram_KK)
        v_MD[place_K] = torch.cholesky_solve(self.target[place_K], factor_KK)
        return v_MD
