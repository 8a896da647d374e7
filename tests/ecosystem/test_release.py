"""What a release holds: in the wheel the package with its types and references alone; in the sdist the tests, too."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Names of the files in both."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    return {"wheel": set(zipfile.ZipFile(wheel).namelist()), "sdist": names}


def test_the_wheel_is_the_package(built: dict[str, set[str]]):
    wheel = built["wheel"]
    assert {name.partition("/")[0].partition("-")[0] for name in wheel} == {"difflayers", "torch_difflayers"}
    assert {"difflayers/py.typed", "difflayers/references.bib", "difflayers/testing/cases/conic.py"} <= wheel
    assert any(name.endswith("licenses/LICENSE") for name in wheel)
    kept = {path.relative_to(ROOT).as_posix() for path in (ROOT / "difflayers").rglob("*.py")}
    assert kept <= wheel


def test_the_sdist_can_be_tested_and_built(built: dict[str, set[str]]):
    wanted = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile", "requirements/constraints.txt"}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").glob("*.py")}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")}
    assert wanted <= built["sdist"]
    assert not any("__pycache__" in name or "_build" in name for name in built["sdist"])
