"""Reconstruction of a layer's output from few of its atoms, as a quadratic problem.

Shapes: A atoms of B activations each, M = A B activations, D outputs, T tokens, K kept activations.

A neuron or micro-expert is an atom of one activation, a head one of as many as its width. For atoms
of one activation, a layer outputs Y = sum_j phi_j w_j with activations phi_j (routing weight
included). In units in which every activation has root mean square 1, v_j = s_j w_j and s_j =
RMS(phi_j), the problem is

    min_V  1/(2 T) || sum_j (phi_j / s_j) v_j - Y ||_F^2   with at most k atoms

(WGSEF specification section 5, derived). It needs only the Gram matrix, so calibration text is
streamed once. ||v_j|| = RMS(phi_j) ||w_j|| is an energy in the sense of CAMERA. For wider atoms s_j
is the symmetric root of the atom's own block of the Gram matrix, which whitens its activations, and
||v_j|| is again the root mean square of the output of that atom alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reconstruction:
    """Gram matrix [M, M], its product with the true read-out [M, D], and the scales s [A, B, B].

    `readout` is the true V [M, D], in units of the outputs; all are fp64.
    """

    gram: Tensor
    target: Tensor
    readout: Tensor
    scale: Tensor

    @classmethod
    def of(cls, gram_MM: Tensor, weight_MD: Tensor, width: int = 1) -> Reconstruction:
        """Return the problem of a layer with activation Gram matrix phi^T phi / T and read-out w.

        `width` is the number of activations per atom.
        """
        blocks_ABB = diagonal_blocks(gram_MM.double(), width)
        # The root of a symmetric block from its eigenvalues. Directions in which an atom was never
        # active have eigenvalues of rounding noise, of either sign: they get no energy, and scale 1
        # because the scale is inverted. For an atom of one activation that is simply a neuron that
        # never fired.
        power_AB, basis_ABB = torch.linalg.eigh(blocks_ABB)
        active_AB = power_AB > power_AB.amax(-1, keepdim=True).clamp(min=0) * 1e-12
        root_AB = torch.where(active_AB, power_AB.clamp(min=0).sqrt(), torch.ones_like(power_AB))
        scale_ABB = (basis_ABB * root_AB[:, None]) @ basis_ABB.mT
        seen_ABB = (basis_ABB * active_AB[:, None]) @ basis_ABB.mT
        # Projecting on the active directions keeps noise out of the whitened Gram matrix.
        white_ABB = torch.linalg.inv(scale_ABB) @ seen_ABB
        readout_MD = _by_atom(scale_ABB @ seen_ABB, weight_MD.double())
        scaled_MM = _by_atom(white_ABB, _by_atom(white_ABB, gram_MM.double()).mT)
        return cls(scaled_MM, scaled_MM @ readout_MD, readout_MD, scale_ABB)

    @property
    def atoms(self) -> int:
        """Number of atoms."""
        return len(self.scale)

    @property
    def width(self) -> int:
        """Number of activations per atom."""
        return self.scale.shape[-1]

    def norms(self, v_MD: Tensor) -> Tensor:
        """Return the norms of all atoms as a single row [1, A], as the operators take them."""
        norm_A: Tensor = v_MD.reshape(self.atoms, -1).norm(dim=-1)
        return norm_A[None]

    def scaled(self, v_MD: Tensor, factor_A: Tensor) -> Tensor:
        """Return a read-out with each atom multiplied by its factor."""
        scaled_MD: Tensor = factor_A.repeat_interleave(self.width)[:, None] * v_MD
        return scaled_MD

    def error(self, v_MD: Tensor) -> float:
        """Return || sum_j (phi_j / s_j) v_j - Y ||^2 / || Y ||^2."""
        gap_MD = v_MD - self.readout
        # tr(gap^T G gap): the squared error over all tokens without the tokens.
        wrong = (gap_MD * (self.gram @ gap_MD)).sum()
        return float(wrong / (self.readout * self.target).sum())

    def weights(self, v_MD: Tensor) -> Tensor:
        """Return v in the units of the layer's own weights, w = v / s."""
        return _by_atom(torch.linalg.inv(self.scale), v_MD)

    def refit(self, keep_A: Tensor, damping: float = 1e-8) -> Tensor:
        """Return the V [M, D] of least error that uses only the kept atoms.

        `damping` is relative to the mean diagonal; it decides between atoms that always fire
        together.
        """
        place_K = keep_A.repeat_interleave(self.width).nonzero()[:, 0]
        gram_KK = self.gram[place_K][:, place_K].clone()
        gram_KK.diagonal().add_(damping * gram_KK.diagonal().mean())
        v_MD = torch.zeros_like(self.readout)
        factor_KK: Tensor = torch.linalg.cholesky(gram_KK)
        v_MD[place_K] = torch.cholesky_solve(self.target[place_K], factor_KK)
        return v_MD


def diagonal_blocks(square_MM: Tensor, width: int) -> Tensor:
    """Return the diagonal blocks, one per atom, [A, B, B]."""
    atoms = len(square_MM) // width
    blocks_BBA = square_MM.reshape(atoms, width, atoms, width).diagonal(dim1=0, dim2=2)
    return blocks_BBA.movedim(-1, 0)


def _by_atom(blocks_ABB: Tensor, rows_MD: Tensor) -> Tensor:
    """Multiply the rows of each atom by its block."""
    atoms, width, _ = blocks_ABB.shape
    return (blocks_ABB @ rows_MD.reshape(atoms, width, -1)).reshape(rows_MD.shape)
