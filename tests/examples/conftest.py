"""Examples run in the process of the tests: what they set for their figures must not outlive them."""

import pytest


@pytest.fixture(autouse=True)
def styles_of_figures_are_local():
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context():
        yield
