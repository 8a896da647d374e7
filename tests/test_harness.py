"""The benchmark harness: what it reports, never how fast anything is."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks.harness import AsLooseAs, Case, Contender, Options, Row, peak_memory, relative_error, run, table


def test_relative_error_takes_the_worst_tensor():
    reference = (torch.ones(4), torch.full((3,), 2.0))
    assert relative_error(reference, reference) == 0.0
    assert relative_error((torch.ones(4), torch.full((3,), 2.2)), reference) == pytest.approx(0.1)
    assert math.isinf(relative_error(torch.tensor([math.nan]), torch.ones(1)))
    with pytest.raises(ValueError, match=r"expected shape \(4,\), got \(3,\)"):
        relative_error(torch.ones(3), torch.ones(4))


def test_where_a_peer_wins_stands_first():
    rows = [
        Row("a", "ours", True, 0.0, [1.0] * 5, [1.0] * 5),
        Row("a", "slow", False, 0.0, [3.0] * 5, [3.0] * 5),
        Row("b", "ours", True, 0.0, [1.0] * 5, [1.0] * 5),
        Row("b", "fast", False, 0.0, [0.5] * 5, [0.5] * 5),
    ]
    lines = table(rows).splitlines()
    assert "fast" in lines[2] and "0.50 (peer wins)" in lines[2]
    assert [line.split()[1] for line in lines[3:]] == ["ours", "slow", "ours"]


def test_an_inaccurate_peer_and_a_variant_of_ours_do_not_win():
    rows = [
        Row("a", "difflayers", True, 1e-9, [1.0] * 5, [1.0] * 5, target=1e-8),
        Row("a", "difflayers, other solver", False, 1e-9, [0.5] * 5, [0.5] * 5, target=1e-8),
        Row("a", "sloppy", False, 1e-3, [0.1] * 5, [0.1] * 5, target=1e-8, settings="tol 1e-02"),
    ]
    text = table(rows)
    assert "peer wins" not in text
    assert "0.10 (too inaccurate)" in text and text.endswith("tol 1e-02")


def test_every_contender_gets_the_tolerance_it_needs():
    tried = []

    def build(tolerance):
        tried.append(tolerance)
        return lambda: torch.tensor([1.0 + tolerance], dtype=torch.float64)

    exact = torch.ones(1, dtype=torch.float64)
    job = AsLooseAs(build, [1e-2, 1e-4, 1e-6], exact, 1e-3)
    assert relative_error(job(), exact) == pytest.approx(1e-4)
    job()
    assert tried == [1e-2, 1e-4] and job.settings() == "tol 1e-04"
    never = AsLooseAs(build, [1e-2, 1e-4], exact, 1e-9)
    assert relative_error(never(), exact) == pytest.approx(1e-4)
    assert never.settings() == "tol 1e-04, does not reach 1e-09"
    large = AsLooseAs(lambda scaling: lambda: exact * scaling, [0.995], exact, 1e-2, "scaling")
    large()
    assert large.settings() == "scaling 0.995"


def test_a_benchmark_that_fails_does_not_stop_the_others(monkeypatch, capsys):
    ran = []

    def fails(options):
        raise RuntimeError("a peer is missing")

    monkeypatch.setitem(sys.modules, "benchmarks.bench_deq", SimpleNamespace(main=fails))
    monkeypatch.setitem(sys.modules, "benchmarks.bench_lasso", SimpleNamespace(main=ran.append))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "deq", "lasso"])
    assert command_line.main() == 1
    assert len(ran) == 1
    said = capsys.readouterr().err
    assert "a peer is missing" in said and said.endswith("failed, their stored results are as before: deq\n")


def test_run_writes_what_a_reader_needs(tmp_path, capsys):
    x = torch.arange(5.0)
    case = Case("sum", [Contender("ours", lambda: x.sum()), Contender("peer", lambda: x.mean() * 5.5)], x.sum())
    run("toy", [case], Options(repetitions=5, results=tmp_path), memory=False)
    assert "not measured" in capsys.readouterr().out
    report = json.loads((tmp_path / "toy.json").read_text())
    assert report["threads"] == 1
    assert report["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]  # either may name the build
    ours, peer = report["rows"]
    assert ours["ratio_to_ours"] == 1.0 and ours["relative_error"] == 0.0
    assert peer["relative_error"] == pytest.approx(0.1)
    assert len(peer["seconds"]) == 5
    assert peer["target"] is None  # infinity is no JSON


def test_peak_memory_sees_a_temporary():
    def job() -> torch.Tensor:
        return torch.ones(2**23, dtype=torch.float64).sum()  # 64 MiB

    assert peak_memory(job, "cpu") == pytest.approx(2**26, rel=0.1)


def test_too_few_repetitions_are_refused():
    with pytest.raises(ValueError, match="expected at least 5, got 3"):
        Options(repetitions=3)
