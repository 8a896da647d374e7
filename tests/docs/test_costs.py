"""What the guides say of costs is still what the stored benchmarks say, and the layers they name exist."""

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# page, words of the page, milliseconds that they say, benchmark, case, contender after "difflayers"
COSTS = [
    ("choosing", "0.1 ms box", 0.1, "proximal", "project_box", ""),
    ("choosing", "1.5 ms simplex", 1.5, "proximal", "project_simplex", ""),
    ("choosing", "40 ms sorted", 40, "proximal", "project_isotonic", ""),
    ("choosing", "1024 matrices of 16 x 16: 25 ms", 25, "proximal", "prox_nuclear", ""),
    ("choosing", "1024 vectors of 256: 5 ms", 5, "proximal", "soft_topk", ""),
    ("choosing", "16 pictures of 16 x 16: 270 ms", 270, "proximal", "prox_tv2d of 16x16x16", ""),
    ("choosing", "2 ms for 10 unknowns", 2, "quadratic_program", "batch 128, n = 10", ".conic.quadratic_program"),
    ("choosing", "70 ms for 100", 70, "quadratic_program", "batch 128, n = 100", ".conic.quadratic_program"),
    ("choosing", "25 ms linear", 25, "cvxpy_layer", "linear program, batch 32", " CvxpyLayer"),
    ("choosing", "130 ms entropy", 130, "cvxpy_layer", "entropy, exponential cones, batch 32", " CvxpyLayer"),
    ("choosing", "64 of 64 x 64: 20", 20, "sinkhorn", "64 x 64 x 64, eps 0.1 of the range", ".transport.sinkhorn"),
    ("choosing", "60 to 90 ms", 60, "sinkhorn", "1 x 1024 x 1024, eps 0.1 of the range", ".transport.sinkhorn"),
    ("choosing", "4000 points: 0.7 s", 700, "point_cloud", "4000 and 4000 points",
     ".transport.sinkhorn_value, PointCloud"),
    ("choosing", "7: 11 ms", 11, "generalized_sum_pool", "(64, 128, 7, 7), 64 prototypes, gamma 20",
     ".transport.GeneralizedSumPool"),
    ("choosing", "64 of 64 x 64: 5 ms", 5, "overhead", "linear_solve 64x64 float64 forward+backward", ""),
    ("choosing", "64 of 256 unknowns: 25 ms", 25, "deq", "64x256 radius 0.5 float64", " defaults"),
    ("choosing", "near instability 120 ms", 120, "deq", "64x256 radius 0.9 float64", " defaults"),
    ("choosing", "10 unknowns: 3 ms", 3, "overhead", "root_find Newton 1x10 float64 forward+backward", ", 5 steps"),
    ("choosing", "64 of 64 unknowns: 45 ms", 45, "overhead", "root_find Newton 64x64 float64 forward+backward",
     ", 6 steps"),
    ("choosing", "an overhead below 1 ms", 0.86, "custom_root", "fixed_point 1x10 float64 forward+backward",
     ".solution_map, same loop"),
    ("choosing", "256 signals, 64 x 256: 60 ms", 60, "lasso", "256 signals, 64x256", ".proximal.lasso"),
    ("choosing", "32 vectors of 64: 0.7 ms", 0.7, "learned_proximal", "prox of 32 vectors of 64", ""),
    ("choosing", "their prior 40 ms", 40, "learned_proximal", "prior of 32 vectors of 64", ""),
    ("choosing", "64 signals of 1000: 25 ms", 25, "tv1d", "prox_tv1d 64x1000, t = 1", ".prox_tv1d"),
    ("choosing", "8 losses: 1 ms", 1, "upgrad", "8 objectives, Gaussian", ".conic.upgrad_weights"),
    ("choosing", "of 128: 6 ms", 6, "upgrad", "128 objectives, Gaussian", ".conic.upgrad_weights"),
    ("choosing", "1000 losses: 0.7 ms", 0.7, "spectral_risk", "ChiSquare 1x1000", ".spectral_risk"),
    ("choosing", "1000 weights: 25 ms", 25, "hypergradient", "logistic regression, d = 1,000, n = 2,000",
     ".bilevel.hypergradient"),
    ("choosing", "100 000: 0.3 s", 300, "hypergradient", "network of 99,760 weights", ".bilevel.hypergradient"),
    ("choosing", "50 gates: 0.9 s", 900, "convex_relu", "n = 500, d = 20, 50 gates", ""),
    ("choosing", "gated 0.07 s", 70, "gated_relu", "n = 500, d = 20, 50 gates", ".relu.convex_gated_relu, gap 1e-6"),
    ("choosing", "64 functions: 50 ms", 50, "pde_constraint", "forward and backward", ".pde.residual_least_squares"),
    ("performance", "0.9 ms", 0.9, "overhead", "fixed_point tanh 1x10 float64 forward+backward", ""),
    ("performance", "6.5 ms", 6.5, "overhead", "fixed_point tanh 64x256 float64 forward+backward", ""),
    ("performance", "4.1 ms", 4.1, "overhead", "fixed_point tanh 64x256 float32 forward+backward", ""),
    ("performance", "113 ms", 113, "memory", "16x256 float64, 1000 steps", " Implicit"),
    ("performance", "271 ms", 271, "memory", "16x256 float64, 1000 steps", " Unrolled"),
]  # fmt: skip


def rows(name: str) -> list[dict]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["rows"]


@pytest.mark.parametrize(
    ("page", "words", "said", "name", "case", "contender"), COSTS, ids=lambda value: str(value)[:40]
)
def test_the_page_says_what_was_measured(page: str, words: str, said: float, name: str, case: str, contender: str):
    assert words in (ROOT / "docs" / f"{page}.md").read_text()
    (row,) = [row for row in rows(name) if (row["case"], row["contender"]) == (case, f"difflayers{contender}")]
    assert row["median_seconds"] * 1e3 == pytest.approx(said, rel=0.25)


def test_memory_of_a_recorded_loop_grows_as_the_page_says():
    page = (ROOT / "docs" / "performance.md").read_text()
    found = {(row["case"], row["contender"]): row["peak_bytes"] / 1e6 for row in rows("memory")}
    for words, said, steps, contender in (
        ("1.4 MB", 1.4, 10, "Implicit"),
        ("1.1 MB", 1.1, 1000, "Implicit"),
        ("2.7 MB", 2.7, 10, "Unrolled"),
        ("108 MB", 108, 1000, "Unrolled"),
    ):
        assert words in page
        assert found[f"16x256 float64, {steps} steps", f"difflayers {contender}"] == pytest.approx(said, rel=0.25)


def test_choosing_names_layers_that_exist():
    families = ("implicit", "linalg", "proximal", "conic", "transport", "relu", "pde", "bilevel", "equilibrium")
    public = {name for family in families for name in importlib.import_module(f"difflayers.{family}").__all__}
    page = (ROOT / "docs" / "choosing.md").read_text()
    taken = [row.split(" | ")[1] for row in page.splitlines() if row.startswith("| ") and row.count(" | ") >= 2]
    named = {name for cell in taken for name in re.findall(r"`(\w+)(?:\(.*?\)+)?`", cell)}
    assert len(named) > 50
    assert named - public - {"bilevel", "SolveError"} == set()
