"""Self-labelling: plans of a linear program and of a conic solver, streams against tensors, resumption, bad chunks.

Oracles: for eps to zero the linear program of scipy; for any eps cvxpy's relative entropy by Clarabel; a stream against
the same data in one tensor, which another algorithm solves (Sinkhorn and Newton on the whole plan).
"""

import io

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import difflayers
from difflayers.transport import KernelSinkhorn, SelfLabelState, SemiDualNewton, self_label, self_label_ex


def log_probs(seed: int, n: int, k: int, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Predictions that favour the later clusters."""
    generator = torch.Generator().manual_seed(seed)
    x = scale * (torch.randn(n, k, generator=generator, dtype=torch.float64) + torch.linspace(0, 2, k))
    return x.log_softmax(-1).to(dtype)


def chunks(x: torch.Tensor, rows: int = 70):
    return lambda: x.split(rows, -2)


# -------------------------------------------------------------------------------------------------------------- oracles


def test_hard_labels_solve_the_linear_program():
    from scipy.optimize import linprog

    x = log_probs(0, 12, 3)
    rows, columns = np.kron(np.eye(12), np.ones(3)), np.kron(np.ones(12), np.eye(3))
    sums = np.r_[np.full(12, 1.0), np.full(3, 4.0)]
    best = linprog(-x.numpy().ravel(), A_eq=np.r_[rows, columns], b_eq=sums, bounds=(0, None))
    expected = torch.from_numpy(best.x.reshape(12, 3).argmax(-1))
    for data in (x, chunks(x, 5)):
        labels = self_label(data, eps=0.01)
        assert torch.equal(labels, expected)
        assert labels.bincount().tolist() == [4, 4, 4]


def test_soft_labels_agree_with_a_conic_solver():
    import cvxpy as cp

    x, prior, eps = log_probs(1, 7, 3), np.array([0.5, 0.2, 0.3]), 0.3
    Q = cp.Variable((7, 3))
    entropy = cp.sum(cp.rel_entr(Q, np.full((7, 1), 1 / 7) * prior))
    objective = cp.Minimize(-cp.sum(cp.multiply(Q, x.numpy())) + eps * entropy)
    problem = cp.Problem(objective, [cp.sum(Q, 1) == 1 / 7, cp.sum(Q, 0) == prior])
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    expected = torch.from_numpy(7 * Q.value)
    masses = torch.from_numpy(prior)
    torch.testing.assert_close(self_label(x, masses, eps=eps, soft=True), expected, atol=1e-6, rtol=0)
    streamed = self_label_ex(chunks(x, 3), masses, eps=eps).value.state.soft(x)
    torch.testing.assert_close(streamed, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("k", "scale", "eps"), [(5, 1, 0.04), (10, 3, 0.04), (3, 0.1, 0.5), (10, 10, 0.01)])
def test_stream_equals_tensor(k: int, scale: float, eps: float):
    x = log_probs(2, 300, k, scale)
    whole = self_label_ex(x, eps=eps, soft=True, solver=KernelSinkhorn(rtol=1e-14))
    stream = self_label_ex(chunks(x), eps=eps, solver=SemiDualNewton(rtol=1e-13))
    assert bool(whole.converged)
    assert bool(stream.converged)
    assert float(stream.residual) <= 1e-13
    assert int(stream.steps) <= 40  # Sinkhorn alone takes hundreds to thousands here
    torch.testing.assert_close(stream.value.state.soft(x), whole.value.labels, atol=1e-10, rtol=0)
    assert torch.equal(stream.value.labels, whole.value.labels.argmax(-1))
    assert torch.equal(self_label(x, eps=eps), stream.value.labels)


def test_sharp_predictions_without_skew():
    """Nearly a linear program, and too near to the goal at the start for the entropy to be raised by itself."""
    for seed in range(4):
        x = 300 * torch.randn(60, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found = self_label_ex(chunks(x, 25), eps=1.0)
        assert bool(found.converged)
        assert int(found.steps) <= 60
        assert torch.equal(found.value.labels, self_label(x, eps=1.0))


def test_sinkhorn_alone_gives_the_same():
    x = log_probs(3, 200, 4, 0.5)
    plain = self_label_ex(chunks(x), solver=SemiDualNewton(newton_limit=0, max_steps=5000))
    newton = self_label_ex(chunks(x))
    assert bool(plain.converged)
    assert int(plain.steps) > int(newton.steps)
    torch.testing.assert_close(plain.value.state.soft(x), newton.value.state.soft(x), atol=1e-8, rtol=0)


def test_powers_below_the_smallest_number():
    """One cluster is hopeless in every row, p ** 25 is zero in double precision, and its size is right all the same."""
    x = log_probs(4, 90, 3)
    x[:, 0] -= 60.0
    assert float((25 * x[:, 0]).exp().max()) == 0.0
    for data in (x, chunks(x, 40)):
        found = self_label_ex(data)
        assert bool(found.converged)
        torch.testing.assert_close(found.value.state.soft(x).mean(0), torch.full((3,), 1 / 3, dtype=torch.float64))
        assert (found.value.labels.bincount() - 30).abs().max() <= 1  # soft rows between two clusters


def test_float32_chunks_are_added_up_in_float64():
    x = log_probs(5, 4000, 6, dtype=torch.float32)
    found = self_label_ex(chunks(x, 64), solver=SemiDualNewton(rtol=1e-12))
    assert bool(found.converged)
    exact = self_label_ex(x.double(), soft=True).value.labels
    soft = found.value.state.soft(x)
    assert soft.dtype == torch.float32
    torch.testing.assert_close(soft.double(), exact, atol=1e-6, rtol=0)


def test_prior_sizes_and_an_empty_cluster():
    x, prior = log_probs(6, 200, 4), torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64)
    for data in (x, chunks(x)):
        counts = self_label(data, 3 * prior).bincount(minlength=4)  # only proportions matter
        assert counts[3] == 0
        assert (counts - 200 * prior).abs().max() <= 2


# ------------------------------------------------------------------------------------------------------------- sources


def test_every_source_gives_the_same(tmp_path):
    x = log_probs(7, 250, 5)
    expected = self_label(chunks(x))
    file = np.memmap(tmp_path / "x.bin", np.float64, "w+", shape=(250, 5))
    file[:] = x.numpy()
    few = SemiDualNewton(chunk_rows=60)
    for source in (np.memmap(tmp_path / "x.bin", np.float64, "r", shape=(250, 5)), x):
        assert torch.equal(self_label(source, solver=few), expected)
    loader = DataLoader(TensorDataset(x), batch_size=33)  # gives lists: one head
    assert torch.equal(self_label(loader)[0], expected)
    empty = lambda: (x[:0], x[:100], x[100:100], x[100:])  # noqa: E731
    assert torch.equal(self_label(empty), expected)


def test_heads():
    x, y = log_probs(8, 120, 5), log_probs(9, 120, 3)
    each = [self_label(x), self_label(y)]
    streamed = self_label(lambda: zip(x.split(50), y.split(50), strict=True), solver=SemiDualNewton())
    as_lists = self_label(lambda: map(list, zip(x.split(50), y.split(50), strict=True)))
    for found in (self_label([x, y]), streamed, as_lists, self_label([x, y], solver=SemiDualNewton(chunk_rows=7))):
        assert isinstance(found, list)
        assert all(torch.equal(f, e) for f, e in zip(found, each, strict=True))
    both = torch.stack([x, x.flip(-1)])
    for found in (self_label(both), self_label(chunks(both))):
        assert torch.equal(found, torch.stack([self_label(x), self_label(x.flip(-1))]))
    priors = [None, torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)]
    for found in (self_label([x, y], priors), self_label(lambda: [[x, y]], priors)):
        assert torch.equal(found[1], self_label(y, priors[1]))
    solution = self_label_ex([x, y])
    assert solution.status.shape == (2,)
    assert [t.shape for t in solution.value.state.labels([x[:4], y[:4]])] == [(4,), (4,)]


def test_no_rows_and_few_rows():
    x = log_probs(10, 2, 5)
    assert self_label(x[:0]).shape == (0,)
    assert self_label(x[:0], soft=True).shape == (0, 5)
    assert self_label(x).shape == (2,)
    assert torch.equal(self_label(x), self_label(chunks(x, 1)))
    torch.testing.assert_close(self_label(x, soft=True).sum(-2), torch.full((5,), 0.4, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------- resumption


@pytest.mark.parametrize("stop", [1, 3, 6, 9])
def test_resumed_to_the_bit(stop: int):
    x = log_probs(11, 300, 6, 5)
    seen: list[SelfLabelState] = []
    through = self_label_ex(chunks(x), solver=SemiDualNewton(on_pass=seen.append))
    assert int(through.steps) > 9
    assert [state.passes for state in seen] == list(range(1, int(through.steps) + 1))
    part = self_label_ex(chunks(x), solver=SemiDualNewton(max_steps=stop))
    assert part.status == difflayers.Status.MAX_STEPS
    assert torch.equal(part.value.state.potentials[0], seen[stop - 1].potentials[0])
    file = io.BytesIO()
    torch.save(part.value.state, file)
    file.seek(0)
    rest = self_label_ex(chunks(x), state=torch.load(file, weights_only=True))
    assert torch.equal(rest.value.state.potentials[0], through.value.state.potentials[0])
    assert torch.equal(rest.value.labels, through.value.labels)
    assert (rest.status, rest.steps, rest.residual) == (through.status, through.steps, through.residual)


def test_restart_for_other_data():
    x = log_probs(12, 400, 8)
    first = self_label_ex(chunks(x)).value.state
    moved = (x + 0.02 * log_probs(13, 400, 8)).log_softmax(-1)
    cold, warm = self_label_ex(chunks(moved)), self_label_ex(chunks(moved), state=first.restarted())
    assert bool(warm.converged)
    assert int(warm.steps) < int(cold.steps)
    assert torch.equal(warm.value.labels, cold.value.labels)
    same = self_label_ex(chunks(x), state=first)  # a state that is done takes one look
    assert int(same.steps) == first.passes + 1
    assert torch.equal(same.value.state.potentials[0], first.potentials[0])


def test_state_labels_new_rows():
    x = log_probs(14, 500, 4)
    state = self_label_ex(x[:400]).value.state
    together = self_label(x)
    assert (state.labels(x[400:]) == together[400:]).double().mean() > 0.9
    assert torch.equal(state.labels(x[:400]), self_label(x[:400]))


# ------------------------------------------------------------------------------------------------------------- honesty


def test_unfinished_streams_say_so():
    x = log_probs(15, 100, 5, 6)
    with pytest.warns(difflayers.SolveWarning, match="self_label"):
        self_label(chunks(x), solver=SemiDualNewton(max_steps=2))
    found = self_label_ex(chunks(x), solver=SemiDualNewton(max_steps=2))
    masses = found.value.state.soft(x).mean(0)
    measured = (masses - 0.2).abs().sum()
    assert found.status == difflayers.Status.MAX_STEPS
    assert float(measured) > 0.1
    # at the eps that was asked for, although the search was at a larger one
    torch.testing.assert_close(found.residual, measured)
    assert float(found.value.state.errors) != pytest.approx(float(measured))


def test_a_cluster_that_is_forbidden_to_all():
    x = log_probs(16, 60, 4)
    bad = x.clone()
    bad[:, 2] = -torch.inf
    with pytest.raises(difflayers.SolveError):
        self_label(chunks(bad))
    labels = self_label(chunks(torch.stack([bad, x])), on_failure="nan")
    assert (labels[0] == -100).all()
    assert torch.equal(labels[1], self_label(x))
    forbidden = x.clone()
    forbidden[:20, 0] = -torch.inf
    for data in (forbidden, chunks(forbidden)):
        labels = self_label(data)
        assert (labels[:20] != 0).all()
        assert labels.bincount().tolist() == [15, 15, 15, 15]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_chunks_are_named(value: float):
    x = log_probs(17, 100, 4)
    x[63, 1] = value
    with pytest.raises(ValueError, match=r"log_probs: .* got (NaN|inf) in chunk 3 of pass 0, head 0"):
        self_label(chunks(x, 20))
    with pytest.raises(ValueError, match="log_probs: expected finite"):
        self_label(x)


def test_bad_sources_are_refused():
    x = log_probs(18, 100, 4)
    wrong = {
        "anew in every pass": iter(x.split(10)),
        "got int": 3,
        "at least one row": lambda: iter(()),
        r"\(n, K\) for every head": lambda: (x[:50], x[50:, :3]),
        "floating-point": np.ones((4, 2), dtype=np.int64),
        "as many rows": lambda: [[x, x[:5]]],
    }
    for message, source in wrong.items():
        with pytest.raises(ValueError, match=f"log_probs: .*{message}"):
            self_label(source)
    lengths = iter((100, 90, 80))
    with pytest.raises(ValueError, match="log_probs: expected 100 rows in every pass, got 90"):
        self_label(lambda: x[: next(lengths)].split(30))
    for message, options in (("soft", {"soft": True}), ("eps", {"eps": 0.0}), ("prior", {"prior": -torch.ones(4)})):
        with pytest.raises(ValueError, match=f"{message}: expected"):
            self_label(chunks(x), **options)
    for eps in (None, "0.1"):
        for source in (x, chunks(x)):
            with pytest.raises(ValueError, match="eps: expected a number or a tensor"):
                self_label(source, eps=eps)
    with pytest.raises(ValueError, match="solver: expected SemiDualNewton"):
        self_label(chunks(x), solver=difflayers.transport.LogSinkhorn())
    for options in ({"rtol": -1.0}, {"max_steps": 0}, {"chunk_rows": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            SemiDualNewton(**options)


def test_eps_of_every_head_in_any_number_of_dimensions():
    heads = torch.stack([log_probs(seed, 30, 3) for seed in range(4)]).reshape(2, 2, 30, 3)
    eps = torch.tensor([[0.1, 0.2], [0.3, 0.4]], dtype=heads.dtype)
    streamed = self_label_ex(lambda: heads.split(7, -2), eps=eps).value
    dense = self_label_ex(heads, eps=eps).value
    assert torch.equal(streamed.labels, dense.labels)
    for one, other in zip(streamed.state.heads, dense.state.heads, strict=True):
        assert one.eps == other.eps
        torch.testing.assert_close(one.potential - one.potential[0], other.potential - other.potential[0])


# --------------------------------------------------------------------------------------------------------- derivatives


def test_soft_labels_have_the_derivative_of_the_plan():
    """Central differences of a solution by the stream, which shares no code with the derivative."""
    x, prior = log_probs(19, 6, 3, 0.7), torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    weight, step = log_probs(20, 6, 3), 1e-5

    def value(t: torch.Tensor) -> torch.Tensor:
        return (
            self_label_ex(lambda: [t], prior, eps=0.3, solver=SemiDualNewton(rtol=1e-13)).value.state.soft(t) * weight
        ).sum()

    x.requires_grad_()
    (self_label(x, prior, eps=0.3, soft=True) * weight).sum().backward()
    expected = torch.zeros_like(x)
    for i in range(6):
        for j in range(3):
            e = torch.zeros_like(x)
            e[i, j] = step
            expected[i, j] = (value(x.detach() + e) - value(x.detach() - e)) / (2 * step)
    torch.testing.assert_close(x.grad, expected, atol=1e-8, rtol=1e-6)
    assert not self_label(x).requires_grad


def test_no_heads_and_no_masses_are_named():
    for call in (self_label, self_label_ex):
        with pytest.raises(ValueError, match="log_probs: expected at least one head, got an empty list"):
            call([])
        with pytest.raises(ValueError, match="prior: expected masses that are not all 0, got 0"):
            call(torch.zeros(4, 2).log_softmax(-1), torch.zeros(2))
