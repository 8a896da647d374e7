"""A linear map given by its product, with the structure it is known to have."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vjp

from difflayers._checks import check_shape, check_tensor

from ._autodiff import check_inference_mode
from ._system import LinearSystem, Params


class Tag(enum.Flag):
    """What is known of a map; a solver that needs a property refuses a map that does not declare it."""

    NONE = 0
    SYMMETRIC = enum.auto()
    POSITIVE_DEFINITE = enum.auto()


@dataclass(frozen=True, eq=False)
class LinearOperator:
    """A square linear map ``v -> matvec(params, v)``.

    Args:
        matvec: ``fn(params, v)`` on ``v`` of shape ``(*batch, n)``: linear in `v`, differentiable in `params`, each
            batch element alone. Tensors that need a gradient belong into `params`, not into a closure.
        params: Tensors the map depends on; gradients flow to them.
        tags: Known structure; ``POSITIVE_DEFINITE`` implies ``SYMMETRIC``.
        param_ndims: Trailing dimensions of each parameter that belong to one batch element. When given, `matvec` must
            broadcast over leading dimensions, and ``vmap`` moves dimensions instead of vmapping the code.

    Example:
        >>> import torch
        >>> from difflayers.linalg import LinearOperator, Tag, linear_solve
        >>> d = torch.tensor([1.0, 2.0, 4.0])
        >>> A = LinearOperator(lambda p, v: p[0] * v, (d,), tags=Tag.POSITIVE_DEFINITE)
        >>> linear_solve(A, torch.ones(3))
        tensor([1.0000, 0.5000, 0.2500])
    """

    matvec: Callable[[Params, Tensor], Tensor]
    params: Params = ()
    tags: Tag = Tag.NONE
    param_ndims: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for i, p in enumerate(self.params):
            if not isinstance(p, Tensor):
                raise ValueError(f"params[{i}]: expected a tensor, got {type(p).__name__}")
        if self.param_ndims is not None and len(self.param_ndims) != len(self.params):
            raise ValueError(f"param_ndims: expected {len(self.params)} numbers, got {len(self.param_ndims)}")

    @property
    def symmetric(self) -> bool:
        """Whether the map is declared equal to its transpose."""
        return bool(self.tags & (Tag.SYMMETRIC | Tag.POSITIVE_DEFINITE))


@dataclass(frozen=True, eq=False)
class OperatorSystem(LinearSystem):
    """The system of a :class:`LinearOperator`."""

    matvec: Callable[[Params, Tensor], Tensor] = None  # type: ignore[assignment]

    def apply(self, params: Params, v: Tensor, transpose: bool) -> Tensor:
        if transpose and not self.symmetric:
            check_inference_mode()
            _, pull = vjp(lambda u: self.matvec(params, u), torch.zeros_like(v))
            return pull(v)[0]
        out = self.matvec(params, v)
        check_shape("A.matvec output", out.shape, v.shape, " as the vector has")
        return out


@dataclass(frozen=True, eq=False)
class MatrixSystem(LinearSystem):
    """The system of a dense matrix ``(*batch, n, n)``, its symmetric part where it is declared symmetric."""

    def _matrix(self, params: Params) -> Tensor:
        (A,) = params
        return (A + A.mT) / 2 if self.symmetric else A

    def apply(self, params: Params, v: Tensor, transpose: bool) -> Tensor:
        A = self._matrix(params)
        return ((A.mT if transpose else A) @ v.unsqueeze(-1)).squeeze(-1)

    def operator(self, params: Params, like: Tensor, transpose: bool) -> Callable[[Tensor], Tensor]:
        A = self._matrix(params)
        A = A.mT if transpose else A
        return lambda v: (A @ v.unsqueeze(-1)).squeeze(-1)

    def matrix(self, params: Params, like: Tensor) -> Tensor:
        return self._matrix(params)


def check_matrix(name: str, A: object) -> Tensor:
    """Refuses anything but a square real matrix, possibly batched."""
    A = check_tensor(name, A, min_ndim=2)
    if A.shape[-1] != A.shape[-2]:
        raise ValueError(
            f"{name}: expected a square matrix (*batch, n, n), got {tuple(A.shape)}; least_squares takes tall ones"
        )
    return A
