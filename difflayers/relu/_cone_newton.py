r"""The Newton systems of the interior-point method: 2P blocks of size d x d and a coupling of rank n.

Every system reads :math:`A \Delta p + F^T n = b, n = W (F \Delta p - c)` with :math:`A` block diagonal, since
:math:`K_i^T D K_i = X^T D X` for every pattern, and weights W of samples. Both signs of a pattern see the same data.
With few points their inverses add up to one d x d factor :math:`C_i C_i^T = A_{v,i}^{-1} + A_{w,i}^{-1}`, and the
n x Pd matrix :math:`R = W^{1/2} [Z_i C_i]` leaves the system :math:`I + R R^T`; with many points the differences of
both neurons have a system of size Pd, :math:`\mathrm{blkdiag}((A_{v,i}^{-1} + A_{w,i}^{-1})^{-1}) + Z^T W Z`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._cone_problem import ConeProblem

# of a solve: residual relative to beta, which bounds the dual's pairs; what rounding leaves anyway; refinements
_RESIDUAL, _ROUNDING, _REFINEMENTS = 1e-9, 1e-13, 6
_REUSED = 1.5  # d P over n up to which a Gram matrix that is kept is worth it
_MANY = 2  # gates for a sample beyond which inactive neurons are told from others
_SHALLOW = 0.02  # what a direction has to leave of its block to be part of it: the rest costs too many digits


class SecondOrderScaling:
    r"""Nesterov-Todd scaling of the pairs ``(t, p)`` and ``(beta, z)`` of second-order cones, ``t >= ||p||``.

    ``W = eta [[w0, w1'], [w1, I + w1 w1' / (1 + w0)]]`` is symmetric and maps the second into what its inverse makes
    of the first. Y. Nesterov, M. Todd, 1997; L. Vandenberghe, The CVXOPT linear and quadratic cone program solvers,
    2010, section 4.
    """

    def __init__(self, t: Tensor, p: Tensor, beta: Tensor, z: Tensor) -> None:
        lower, upper = _hyperbolic(t, p), _hyperbolic(beta, z)
        t, p, beta, z = t / lower, p / lower[..., None], beta / upper, z / upper[..., None]
        twice = (2 * (1 + t * beta + (p * z).sum(-1))).sqrt()
        self.eta = (lower / upper).sqrt()
        self.w1 = (p - z) / twice[..., None]
        self.w0 = (1 + (self.w1 * self.w1).sum(-1)).sqrt()

    def apply(self, a: Tensor, b: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """W, or its inverse, times ``(a, b)``."""
        w1 = -self.w1 if inverse else self.w1
        eta = 1 / self.eta if inverse else self.eta
        inner = (w1 * b).sum(-1)
        tail = b + w1 * (a + inner / (1 + self.w0))[..., None]
        return eta * (self.w0 * a + inner), eta[..., None] * tail

    def curvature(self) -> tuple[Tensor, Tensor]:
        """W^-2 with the bound t eliminated, as ``c I - u u'``: ``c (*B, Q)`` and ``u (*B, Q, d)``."""
        c = 1 / (self.eta * self.eta)
        return c, self.w1 * (2 * c / (2 * self.w0 * self.w0 - 1)).sqrt()[..., None]

    def eliminate(self, a: Tensor, b: Tensor) -> Tensor:
        """The right-hand side ``b`` of p, once the row ``a`` of t is eliminated."""
        return b + self.w1 * (a * 2 * self.w0 / (2 * self.w0 * self.w0 - 1))[..., None]

    def bound_step(self, a: Tensor, step: Tensor) -> Tensor:
        """The step of t that belongs to that of p: what keeps the first entry of the dual pair at beta."""
        w0 = self.w0
        return (self.eta * self.eta * a + 2 * w0 * (self.w1 * step).sum(-1)) / (2 * w0 * w0 - 1)


def _hyperbolic(a: Tensor, b: Tensor) -> Tensor:
    """The square root of ``a^2 - ||b||^2``, without loss of digits."""
    norm = torch.linalg.vector_norm(b, dim=-1)
    return ((a - norm).clamp(min=1e-300) * (a + norm)).sqrt()


def gram_of(problem: ConeProblem, weight: Tensor, *, once: bool = False) -> Tensor | None:
    """``Z' W Z``, ``(*B, P d, P d)``; None where a system of size n takes fewer operations.

    That is where n is less than d P, or, where weights stay and this is needed `once`, less than two thirds of it: a
    step then costs (d P)^3 / 3 against n^2 d P + n^3 / 3, by the count of operations and as measured.
    """
    n, d = problem.X.shape[-2:]
    if d * problem.M.shape[-1] >= (_REUSED if once else 1) * n:
        return None
    Z = ((problem.M * weight.sqrt()[..., None])[..., None] * problem.X[..., None, :]).flatten(-2)
    return Z.mT @ Z


class NewtonSystem:
    """One factorisation of ``A - blockdiag(u_i u_i') + F' W F``, for any number of right-hand sides.

    The matrix is nearly singular along the neurons, where ``A`` alone is not: there the directions ``u`` would cost all
    digits if they were part of the blocks that are inverted. They get a system of their own, of the size of how many
    neurons that matters for.

    Args:
        problem: The data.
        weight: W, at least 0, ``(*B, n)``.
        gram: :func:`gram_of` the problem with these weights.
        A: Symmetric positive definite blocks, ``(*B, 2P, d, d)``.
        u: ``(*B, 2P, d)``
    """

    def __init__(self, problem: ConeProblem, weight: Tensor, gram: Tensor | None, A: Tensor, u: Tensor) -> None:
        self.inverse = _inverse(A)
        self.deep = torch.arange(u.shape[-2], device=u.device).expand(u.shape[:-1])
        if _MANY * problem.X.shape[-2] < problem.M.shape[-1]:
            A, u = self._put_inactive(A, u)
        self.problem, self.weight, self.A, self.u, self.wide = problem, weight, A, u, gram is None
        self.half, d = problem.M.shape[-1], A.shape[-1]
        self.root = weight.sqrt()
        first = self._blocks(u)
        small = torch.diag_embed((1 - (u * first).sum(-1)).gather(-1, self.deep))
        if gram is None:
            C = factor(self.inverse[..., : self.half, :, :] + self.inverse[..., self.half :, :, :])
            R = (problem.gate * self.root[..., None, :])[..., None] * (problem.X[..., None, :, :] @ C)
            R = R.movedim(-3, -2).flatten(-2)  # (*B, n, P d)
            kernel = R @ R.mT
            kernel.diagonal(dim1=-2, dim2=-1).add_(1)
            self.L = torch.linalg.cholesky_ex(kernel).L
            columns = self.root[..., None, :] * problem.signed_gate * (first @ problem.X.mT)
            columns = torch.take_along_dim(columns, self.deep[..., None], -2)
            Y = torch.linalg.solve_triangular(self.L, columns.mT, upper=False)
            small = small + Y.mT @ Y
        else:
            v, w = A[..., : self.half, :, :], A[..., self.half :, :, :]
            self.total = factor(v + w)
            parallel = v @ torch.cholesky_solve(w, self.total)  # (v^-1 + w^-1)^-1
            matrix = gram.unflatten(-1, (self.half, d)).unflatten(-3, (self.half, d)).clone()
            matrix.diagonal(dim1=-4, dim2=-2).add_(((parallel + parallel.mT) / 2).movedim(-3, -1))
            self.L = factor(matrix.flatten(-2).flatten(-3, -2))
            plus, minus = self._differences(u)
            eye = torch.eye(self.half, dtype=A.dtype, device=A.device)[:, None, :]
            E, D = (
                torch.cat([eye * x[..., None], eye * y[..., None]], -1).flatten(-3, -2)
                for x, y in ((plus, minus), (first[..., : self.half, :], -first[..., self.half :, :]))
            )
            E, D = (torch.take_along_dim(t, self.deep[..., None, :], -1) for t in (E, D))
            Y = torch.linalg.solve_triangular(self.L, E, upper=False)
            small = small + D.mT @ E - Y.mT @ Y
        self.small = factor((small + small.mT) / 2)

    def _put_inactive(self, A: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks and directions once the directions of inactive neurons, the most of many, are part of the blocks."""
        left = 1 - (u * self._blocks(u)).sum(-1, keepdim=True)
        shallow = ~(left <= _SHALLOW)
        A = A - torch.where(shallow[..., None], u[..., :, None] * u[..., None, :], 0)
        self.inverse = torch.where(shallow[..., None], _inverse(A), self.inverse)
        most = max(int((~shallow).sum((-2, -1)).max()), 1) if shallow.numel() else 0
        self.deep = shallow.squeeze(-1).to(torch.int8).argsort(-1)[..., :most]
        return A, torch.where(shallow, 0, u)

    def _differences(self, b: Tensor) -> tuple[Tensor, Tensor]:
        """What ``b`` of either sign adds to the system of the difference of both neurons of a pattern."""
        v, w = self.A[..., : self.half, :, :], self.A[..., self.half :, :, :]
        plus, minus = (
            torch.cholesky_solve(part[..., None], self.total)
            for part in (b[..., : self.half, :], b[..., self.half :, :])
        )
        return (w @ plus).squeeze(-1), -(v @ minus).squeeze(-1)

    def _blocks(self, b: Tensor) -> Tensor:
        """``A^-1 b``."""
        return (self.inverse @ b[..., None]).squeeze(-1)

    def _without(self, b: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """The solution without the directions ``u``."""
        problem, first = self.problem, self._blocks(b)
        if self.wide:
            fit = problem.fit(first)
            fit = fit if c is None else fit - c
            n = self.root * solve_factor(self.L, self.root * fit)
        else:
            plus, minus = self._differences(b if c is None else b + problem.fit_adjoint(self.weight * c))
            step = solve_factor(self.L, (plus + minus).flatten(-2)).unflatten(-1, (self.half, -1))
            fit = (problem.gate * (step @ problem.X.mT)).sum(-2)
            n = self.weight * (fit if c is None else fit - c)
        return first - self._blocks(problem.fit_adjoint(n)), n

    def _once(self, b: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        p, n = self._without(b, c)
        along = (self.u * p).sum(-1)
        weight = solve_factor(self.small, along.gather(-1, self.deep))
        weight = torch.zeros_like(along).scatter(-1, self.deep, weight)
        more_p, more_n = self._without(self.u * weight[..., None], None)
        return p + more_p, n + more_n

    def _blocks_times(self, p: Tensor) -> Tensor:
        """``(A - blockdiag(u_i u_i')) p``."""
        return (self.A @ p[..., None]).squeeze(-1) - self.u * (self.u * p).sum(-1, keepdim=True)

    def solve(self, b: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``p (*B, 2P, d)`` and ``n (*B, n)``, of right-hand sides b and, if not zero, c.

        Refined until no digit is missing; late in the method the factors alone give few.
        """
        problem, W = self.problem, self.weight
        p, n = self._once(b, c)
        small = torch.maximum(_ROUNDING * torch.linalg.vector_norm(b, dim=(-2, -1)), _RESIDUAL * problem.beta)
        for _ in range(_REFINEMENTS):
            # n as it follows from p; of samples with large weights, where that has few digits, only a part of the way
            fit, apart = problem.fit(p), None
            if c is None:
                n = W * fit
            else:
                apart = torch.where(W > 0, n / torch.where(W > 0, W, 1), 0) - torch.where(W > 0, fit - c, 0)
                n = n - W.clamp(max=1) * apart
                apart = apart * (1 - 1 / W.clamp(min=1))
            rest = b - self._blocks_times(p) - problem.fit_adjoint(n)
            more = torch.linalg.vector_norm(rest, dim=(-2, -1)) > small
            if not bool(more.any()):
                break
            more_p, more_n = self._once(rest, apart)
            p, n = torch.where(more[..., None, None], p + more_p, p), torch.where(more[..., None], n + more_n, n)
        return p, n


def factor(A: Tensor) -> Tensor:
    """The Cholesky factor, of a matrix brought to ones on its diagonal."""
    scale = A.diagonal(dim1=-2, dim2=-1).clamp(min=1e-300).sqrt()
    unit = A / scale[..., :, None] / scale[..., None, :]
    unit.diagonal(dim1=-2, dim2=-1).add_(1e-15)
    return torch.linalg.cholesky_ex(unit).L * scale[..., :, None]


def _inverse(A: Tensor) -> Tensor:
    return torch.cholesky_inverse(factor(A))


def solve_factor(L: Tensor, b: Tensor) -> Tensor:
    """The system of a Cholesky factor, for one right-hand side.

    Two triangular solves read the factor; ``torch.cholesky_solve`` copies it first, which takes ten times as long for a
    large one.
    """
    half = torch.linalg.solve_triangular(L, b[..., None], upper=False)
    return torch.linalg.solve_triangular(L.mT, half, upper=True).squeeze(-1)
