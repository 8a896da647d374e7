"""Proximal operators and projections, forward and backward: ours against deepinv, pyproximal and plain torch.

Every contender computes the result at 1024 vectors of 256 entries (1024 matrices of 16 x 16), or as many as the case's
name says, in float32, and the cotangent of `x` for a given cotangent of the result. pyproximal knows no gradient: it is
compared forward only, with ours under `no_grad`. Errors are those of the first rows, result and cotangent, against the
oracles of `proximal_oracles.py` in float64; a contender that misses `TARGET` is wrong or has not converged, and cannot
win.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks import proximal_oracles as oracles
from benchmarks import proximal_peers as peers
from benchmarks.harness import Case, Contender, Options, Result, run
from benchmarks.proximal_entries import BATCH, ROWS, SIDE, N, Problem, T, normal, on_entries
from benchmarks.proximal_oracles import by_differences, by_rows, on_eigenvalues, on_singular_values
from benchmarks.proximal_peers import Map, numpy_entries, numpy_rows
from difflayers import proximal

TARGET = 1e-4


def rows_of_all_sizes() -> Tensor:
    return 2 * normal(BATCH, N) * torch.logspace(-1.5, 0.5, ROWS).repeat(BATCH // ROWS)[:, None]


def on_vectors() -> Iterator[Problem]:
    """Operators that couple the entries of a vector."""
    from pyproximal import L21, Euclidean, EuclideanBall, HalfSpace, L1Ball, Simplex

    deepinv = peers.deepinv_optim()
    c = normal(N, seed=3)
    A, b = normal(32, N, seed=4), normal(32, seed=5)
    Q = (lambda R: R @ R.mT / N)(normal(N, N, seed=6))
    q = normal(N, seed=7)
    weights = torch.linspace(2, 0.1, N)
    c_, A_, b_, Q_, q_, weights_ = (a.double().cpu().numpy() for a in (c, A, b, Q, q, weights))
    X, scaled = 2 * normal(BATCH, N), rows_of_all_sizes()
    groups = 8
    yield Problem(
        "prox_l2",
        lambda x: proximal.prox_l2(x, 5.0),
        scaled,
        by_rows(lambda x: oracles.l2(x, 5.0)),
        {
            "torch": partial(peers.shrink_norm, t=5.0),
            "deepinv": lambda x: deepinv.L12Prior(l2_axis=-1).prox(x, gamma=5.0),
        },
        {"pyproximal": numpy_rows(lambda x: Euclidean().prox(x, 5.0))},
    )
    yield Problem(
        "prox_group_l2",
        lambda x: proximal.prox_group_l2(x, 2.0, groups),
        scaled,
        by_rows(lambda x: np.concatenate([oracles.l2(part, 2.0) for part in x.reshape(-1, groups)])),
        {
            "torch": lambda x: peers.shrink_norm(x.unflatten(-1, (-1, groups)), 2.0).flatten(-2),
            "deepinv": lambda x: (
                deepinv.L12Prior(l2_axis=-1).prox(x.unflatten(-1, (-1, groups)), gamma=2.0).flatten(-2)
            ),
        },
        {
            "pyproximal": numpy_rows(
                lambda x: L21(groups).prox(x.reshape(-1, groups).T.ravel(), 2.0).reshape(groups, -1).T.ravel()
            )
        },
    )
    yield Problem(
        "prox_linf",
        lambda x: proximal.prox_linf(x, 20.0),
        scaled,
        by_rows(lambda x: oracles.linf(x, 20.0)),
        {"torch, sort": partial(peers.linf, t=20.0)},
    )
    yield Problem(
        "conjugate_prox",
        lambda x: proximal.conjugate_prox(proximal.prox_l1, x, T),
        X,
        by_differences(partial(np.clip, a_min=-1, a_max=1)),
        {
            "torch": lambda x: x - T * peers.shrink(x / T, 1 / T),
            "deepinv": lambda x: deepinv.L1Prior().prox_conjugate(x, gamma=T),
        },
    )
    yield Problem(
        "prox_slope",
        lambda x: proximal.prox_slope(x, T, weights),
        X,
        by_rows(lambda x: oracles.slope(x, T, weights_)),
        {
            "torch, scikit-learn": partial(peers.slope, t=T, weights=weights, increasing=peers.isotonic_by_rows),
        },
    )
    yield Problem(
        "prox_quadratic",
        lambda x: proximal.prox_quadratic(x, T, Q, q),
        X,
        by_rows(lambda x: np.linalg.solve(np.eye(N) + T * Q_, x - T * q_)),
        {"torch": partial(peers.quadratic, t=T, Q=Q, q=q)},
    )
    yield Problem(
        "project_simplex",
        lambda x: proximal.project_simplex(x),
        scaled,
        by_rows(lambda x: oracles.simplex(x, 1.0)),
        {"torch, sort": partial(peers.simplex, radius=1.0)},
        {"pyproximal": numpy_entries(lambda x: all_rows.prox(x, 1.0))},
    )
    all_rows = Simplex(n=BATCH * N, radius=1.0, dims=(BATCH, N), axis=-1)
    yield Problem(
        "project_capped_simplex",
        lambda x: proximal.project_capped_simplex(x, 32.0),
        X,
        by_rows(lambda x: oracles.box_section(x, 32.0)),
        {"torch, bisection": partial(peers.box_section, lower=0.0, upper=1.0, total=32.0)},
    )
    yield Problem(
        "soft_topk",
        lambda x: proximal.soft_topk(x, 32),
        X,
        by_rows(lambda x: oracles.box_section(x, 32.0)),
        {"torch, bisection": partial(peers.box_section, lower=0.0, upper=1.0, total=32.0)},
    )
    yield Problem(
        "project_l1_ball",
        lambda x: proximal.project_l1_ball(x, 20.0),
        scaled,
        by_rows(lambda x: oracles.l1_ball(x, 20.0)),
        {"torch, sort": partial(peers.l1_ball, radius=20.0)},
        {"pyproximal": numpy_rows(lambda x: L1Ball(N, 20.0, xtol=1e-8).prox(x, 1.0))},
    )
    yield Problem(
        "project_l2_ball",
        lambda x: proximal.project_l2_ball(x, 5.0),
        scaled,
        by_rows(lambda x: oracles.l2_ball(x, 5.0)),
        {
            "torch": lambda x: x * (5.0 / x.norm(dim=-1, keepdim=True)).clamp_max(1),
            "deepinv": lambda x: deepinv.IndicatorL2(radius=5.0).d.prox(x, torch.zeros(()), gamma=1.0),
        },
        {"pyproximal": numpy_rows(lambda x: EuclideanBall(0.0, 5.0).prox(x, 1.0))},
    )
    yield Problem(
        "project_halfspace",
        lambda x: proximal.project_halfspace(x, c, 1.0),
        X,
        by_rows(lambda x: oracles.halfspace(x, c_, 1.0)),
        {"torch": lambda x: x - torch.relu(x @ c - 1.0)[..., None] / (c @ c) * c},
        {"pyproximal": numpy_rows(lambda x: HalfSpace(c.cpu().numpy(), 1.0).prox(x, 1.0))},
    )
    yield Problem(
        "project_hyperplane",
        lambda x: proximal.project_hyperplane(x, c, 1.0),
        X,
        by_rows(lambda x: x - (c_ @ x - 1) / (c_ @ c_) * c_),
        {"torch": lambda x: x - (x @ c - 1.0)[..., None] / (c @ c) * c},
    )
    yield Problem(
        "project_affine",
        lambda x: proximal.project_affine(x, A, b),
        X,
        by_rows(oracles.affine(A_, b_)),
        {"torch": partial(peers.affine, A=A, b=b)},
    )
    yield Problem(
        "project_isotonic",
        lambda x: proximal.project_isotonic(x),
        X,
        by_rows(oracles.isotonic),
        {"torch, mean formula": peers.isotonic, "torch, scikit-learn": peers.isotonic_by_rows},
    )


def on_matrices() -> Iterator[Problem]:
    """Operators on matrices, and on signals with differences."""
    from pyproximal import TV, Nuclear, NuclearBall

    deepinv = peers.deepinv_optim()
    X, matrices = 2 * normal(BATCH, N), 2 * normal(BATCH, SIDE, SIDE)
    few = matrices[:64]
    symmetric = (matrices + matrices.mT) / 2
    yield Problem(
        "prox_nuclear",
        lambda x: proximal.prox_nuclear(x, 3.0),
        matrices,
        by_rows(on_singular_values(lambda s: np.maximum(s - 3, 0))),
        {"torch, autograd through SVD": lambda x: peers.on_singular_values(x, lambda s: torch.relu(s - 3.0))},
        {"pyproximal": numpy_rows(lambda x: Nuclear((SIDE, SIDE)).prox(x, 3.0))},
    )
    yield Problem(
        "prox_spectral_l2",
        lambda x: proximal.prox_spectral_l2(x, 5.0),
        matrices,
        by_rows(on_singular_values(lambda s: oracles.linf(s, 5.0))),
        {"torch, autograd through SVD": lambda x: peers.on_singular_values(x, partial(peers.linf, t=5.0))},
    )
    yield Problem(
        "project_nuclear_ball",
        lambda x: proximal.project_nuclear_ball(x, 20.0),
        matrices,
        by_rows(on_singular_values(lambda s: oracles.l1_ball(s, 20.0))),
        {"torch, autograd through SVD": lambda x: peers.on_singular_values(x, partial(peers.l1_ball, radius=20.0))},
        {"pyproximal": numpy_rows(lambda x: NuclearBall((SIDE, SIDE), 20.0, xtol=1e-8).prox(x, 1.0))},
    )
    yield Problem(
        "project_spectral_box",
        lambda x: proximal.project_spectral_box(x, 0.5, 2.0),
        symmetric,
        by_rows(on_eigenvalues(partial(np.clip, a_min=0.5, a_max=2.0))),
        {"torch, autograd through eigh": lambda x: peers.on_eigenvalues(x, lambda s: s.clamp(0.5, 2.0))},
    )
    yield Problem(
        "project_stiefel",
        lambda x: proximal.project_stiefel(x),
        matrices,
        by_rows(on_singular_values(np.ones_like)),
        {
            "torch, autograd through SVD": lambda x: peers.on_singular_values(x, torch.ones_like),
            "torch, Newton-Schulz unrolled": peers.polar,
        },
    )
    yield Problem(
        "project_transport of 64x16x16",
        lambda x: proximal.project_transport(x),
        few,
        oracles.doubly_stochastic,
        {"torch, Dykstra unrolled": partial(peers.doubly_stochastic, steps=1000)},
    )
    chain = torch.stack([torch.arange(N - 1), torch.arange(1, N)], -1)
    yield Problem(
        "prox_tv1d",
        lambda x: proximal.prox_tv1d(x, T),
        X,
        oracles.total_variation(T, chain.cpu().numpy()),
        {"torch, dual unrolled": partial(peers.total_variation, t=T, edges=chain, steps=100)},
    )
    signals = X[:64]
    yield Problem(
        "prox_tv1d of 64x256",
        lambda x: proximal.prox_tv1d(x, T),
        signals,
        oracles.total_variation(T, chain.cpu().numpy()),
        {"torch, dual unrolled": partial(peers.total_variation, t=T, edges=chain, steps=300)},
        {"pyproximal": numpy_rows(lambda x: TV((N,), niter=1000, rtol=1e-10).prox(x, T))},
    )
    nodes = torch.arange(N)
    edges = torch.cat([torch.stack([nodes, (nodes + k) % N], -1) for k in (1, 17)])
    yield Problem(
        "prox_graph_tv of 64x256",
        lambda x: proximal.prox_graph_tv(x, T, edges.T),
        signals,
        oracles.total_variation(T, edges.cpu().numpy()),
        {"torch, dual unrolled": partial(peers.total_variation, t=T, edges=edges, steps=1000)},
    )
    yield Problem(
        "prox_tv2d of 16x16x16",
        lambda x: proximal.prox_tv2d(x, T),
        few[:16],
        oracles.image_total_variation(T),
        {
            "torch, dual unrolled": partial(peers.image_total_variation, t=T, steps=1000),
            "deepinv": lambda x: deepinv.TVPrior(n_it_max=1000).prox(x[:, None], gamma=T)[:, 0],
        },
        {"pyproximal": numpy_rows(lambda x: TV((SIDE, SIDE), niter=1000, rtol=1e-10).prox(x, T))},
    )


# ----------------------------------------------------------------------------------------------------------------- run


def forward_backward(way: Map, x: Tensor, v: Tensor) -> Callable[[], Result]:
    x = x.clone().requires_grad_()

    def job() -> Result:
        z = way(x)
        (x_bar,) = torch.autograd.grad(z, x, v)
        return z[:ROWS].detach(), x_bar[:ROWS]

    return job


def forward(way: Map, x: Tensor) -> Callable[[], Result]:
    @torch.no_grad()
    def job() -> Result:
        return way(x)[:ROWS]

    return job


def cases(options: Options) -> Iterator[Case]:
    with torch.device(options.device):
        problems = [*on_entries(), *on_vectors(), *on_matrices()]
    for problem in problems:
        x = problem.x
        v = normal(*x.shape, seed=9).to(x.device)
        value, slope = map(torch.from_numpy, problem.oracle(*(a[:ROWS].double().cpu().numpy() for a in (x, v))))
        ways = {"difflayers": problem.ours, **problem.peers}
        contenders = [Contender(name, forward_backward(way, x, v)) for name, way in ways.items()]
        yield Case(problem.name, contenders, (value, slope), target=TARGET)
        if problem.forward_only:
            ways = {"difflayers": problem.ours, **problem.forward_only}
            contenders = [Contender(name, forward(way, x)) for name, way in ways.items()]
            yield Case(f"{problem.name}, forward", contenders, value, target=TARGET)


def main(options: Options) -> None:
    run("proximal", list(cases(options)), options, memory=False)
