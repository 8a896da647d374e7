"""docs/write_your_own.md: the layer keeps the contract, is as short as said, and the page shows all of it."""

import re
from pathlib import Path

import pytest
import torch

from difflayers.testing import CLAUSES, check_layer
from examples.own_layer import CASE, SoftQuantile, soft_quantile
from tests.test_house import code_lines

ROOT = Path(__file__).parents[2]
SOURCE = (ROOT / "examples" / "own_layer.py").read_text()
PAGE = (ROOT / "docs" / "write_your_own.md").read_text()


def test_the_layer_keeps_the_contract(device: torch.device):
    results = {result.clause: result.outcome for result in check_layer(CASE, device=device)}
    # it takes no function, so there is nothing that a function could capture
    assert results == {name: "absent" if name == "captured_tensor_is_refused" else "passed" for name in CLAUSES}
    assert f"{len(CLAUSES) - 1} of {len(CLAUSES)} clauses passed" in PAGE


def test_the_layer_has_as_many_lines_as_the_page_says():
    layer, module = SOURCE.partition("# The residual.")[2].partition("# The module.")[::2]
    lines = code_lines(layer)
    assert lines <= 40
    assert f"{lines} lines" in PAGE
    assert f"{code_lines(module.partition('# What is known about it.')[0])} lines" in PAGE


def test_the_page_shows_every_line():
    """Its excerpts are cut at comments; put together they are the file, without its docstring."""
    marks = re.findall(r"^# .*\.$", SOURCE, flags=re.MULTILINE)
    first = next(line for line in SOURCE.splitlines() if line.startswith("from "))
    included = re.findall(r"```\{literalinclude\} \.\./examples/own_layer\.py\n(.*?)```", PAGE, flags=re.DOTALL)
    starts = [re.search(r':start-(?:at|after): "(.*)"', options)[1] for options in included]
    ends = [re.search(r':end-before: "(.*)"', options) for options in included]
    assert first.startswith(starts[0])
    assert starts[1:] == marks
    assert [end and end[1] for end in ends] == [*marks, None]


MISTAKES = {
    "gradcheck": ("return distance(z, x, eps).sigmoid()", "return distance(z, x, eps.detach()).sigmoid()"),
    "one_bad_element": (
        "z = torch.where(active, torch.where(inside, newton, (lower + upper) / 2), z)",
        "z = torch.where(inside, newton, (lower + upper) / 2)",
    ),
    "no_stray_device": ("distance(z, x, eps) / 2", "distance(z, x, eps) * torch.tensor(0.5)"),
    "starved_solver_warns": ("int(Status.MAX_STEPS)", "int(Status.CONVERGED)"),
    "hostile_input": ("regular = slope * eps > torch.finfo(rhs.dtype).eps ** 0.5", "regular = slope > 0"),
    "jacfwd_equals_jacrev": (".expand(rhs.shape)", ""),
    "module_learns": ("self.log_eps.exp())", "self.log_eps.exp().detach())"),
}


@pytest.mark.parametrize("clause", MISTAKES)
def test_mistakes_are_found_by_the_clause_that_the_page_names(clause: str):
    right, wrong = MISTAKES[clause]
    assert SOURCE.count(right) == 1
    spoilt = {"__name__": "spoilt"}
    exec(compile(SOURCE.replace(right, wrong), "own_layer.py", "exec"), spoilt)
    with pytest.raises(AssertionError, match=f"breaks {clause}"):
        check_layer(spoilt["CASE"], clauses=[clause])
    assert f"| `{clause}`" in PAGE


def test_the_module_finds_a_share():
    """Gradients reach the share and the temperature: the module learns which quantile it is shown."""
    torch.manual_seed(0)
    sample = torch.randn(200, 50)
    target = soft_quantile(sample, torch.tensor(0.9), torch.tensor(0.1))
    module = SoftQuantile(q=0.5, eps=0.1)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        (module(sample) - target).square().mean().backward()
        optimizer.step()
    assert module.logit_q.sigmoid().item() == pytest.approx(0.9, abs=0.03)
