r"""The KKT system of a sparse program on its active set, by SciPy's sparse LU, one element at a time.

.. math:: \begin{pmatrix} P & C^T \\ C & -\delta I \end{pmatrix}

with the active rows C. The small :math:`\delta` keeps dependent rows apart, whose multipliers then have the smallest
norm, and refinement takes its effect away again. Nothing is dense.
"""

from __future__ import annotations

from typing import Any

import numpy as np

DELTA = 1e-8
REFINEMENTS = 6


class SparseKKT:
    """A factorisation, with P scaled to unit size and the rows of C to unit length.

    Args:
        P: ``(n, n)`` symmetric SciPy matrix.
        C: ``(r, n)`` the active rows.
    """

    def __init__(self, P: Any, C: Any) -> None:
        from scipy import sparse
        from scipy.sparse.linalg import norm

        self.n = P.shape[0]
        self.scale = abs(P).max() or 1.0
        lengths = norm(C, axis=1) if C.shape[0] else np.zeros(0)
        self.lengths = np.where(lengths > 0, lengths, 1.0)
        C = sparse.diags_array(1 / self.lengths) @ C
        self.K = sparse.block_array([[P / self.scale, C.T], [C, None]], format="csr")
        shift = sparse.diags_array(np.r_[np.zeros(self.n), np.full(C.shape[0], DELTA)])
        self.lu = _factor((self.K - shift).tocsc())
        self.singular = self.lu is None
        if not self.singular:  # where x is not unique, it does not come back
            probe = np.r_[1.5 + np.cos(1.7 * np.arange(self.n)), np.zeros(C.shape[0])]
            found = self._refined((self.K @ probe)[:, None])[0][: self.n, 0]
            self.singular = not np.abs(found - probe[: self.n]).max(initial=0.0) <= 1e-5

    def solve(self, r1: np.ndarray, r2: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        """Columns ``(u, v)`` with ``P u + C^T v = r1``, ``C u = r2``, and whether they are that."""
        lengths = self.lengths[:, None]
        right = np.concatenate([r1 / self.scale, r2 / lengths])
        if self.singular:
            return np.zeros_like(r1), np.zeros_like(r2), False
        w, miss = self._refined(right)
        good = bool(miss <= 1e-6 * np.abs(right).max(initial=0.0))
        return w[: self.n], self.scale * w[self.n :] / lengths, good

    def _refined(self, right: np.ndarray) -> tuple[np.ndarray, float]:
        w = np.zeros_like(right)
        miss, size = right, np.abs(right).max(initial=0.0)
        for _ in range(REFINEMENTS):
            w = w + self.lu.solve(miss)
            miss = right - self.K @ w
            if not np.abs(miss).max(initial=0.0) > 4 * np.finfo(float).eps * size:
                break
        return w, float(np.abs(miss).max(initial=0.0))


def _factor(K: Any, **options: Any) -> Any:
    """The LU factorisation, None of a matrix that is exactly singular."""
    from scipy.sparse.linalg import splu

    try:
        return splu(K, **options)
    except RuntimeError:
        return None


def is_semidefinite(P: Any) -> bool:
    """Whether elimination on the diagonal, in any order, meets positive pivots alone (Sylvester's law of inertia).

    Args:
        P: ``(n, n)`` symmetric SciPy matrix, to which a trace of the identity is added.
    """
    from scipy import sparse

    noise = np.finfo(float).eps ** 0.75 * P.shape[0] * (abs(P).max() or 1.0)
    shifted = (P + noise * sparse.eye_array(P.shape[0])).tocsc()
    lu = _factor(shifted, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    return lu is not None and bool((lu.perm_r == lu.perm_c).all()) and bool((lu.U.diagonal() > 0).all())
