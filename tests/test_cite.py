"""Citations: the file of references, what `cite` finds in it, CITATION.cff, and the pages about papers."""

import importlib
import re
import unicodedata
from pathlib import Path

import pytest
import torch
from torch import nn

import difflayers
from difflayers import cite
from difflayers._cite import parse, public_names, references

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("bilevel", "conic", "equilibrium", "implicit", "linalg", "pde", "proximal", "relu", "transport")

# A `Source:` that names no publication: a principle, or whom an equation is named after.
WITHOUT_ENTRY = {"implicit.nonlinear_least_squares", "pde.Darcy", "pde.Heat", "pde.Helmholtz", "pde.Poisson"}

# The docstring names the source of what is computed; the guide, that of how it is differentiated.
FROM_THE_GUIDE = {"pde.residual_least_squares_value", "transport.sinkhorn_divergence", "transport.sinkhorn_value"}

ENTRIES = references()
LISTED = {name for fields in ENTRIES.values() for name in public_names(fields)}
PAGES = sorted((ROOT / "docs" / "papers").glob("*.md"))


def keys(*what: object) -> list[str]:
    return re.findall(r"^@\w+\{(.*),$", cite(*what), flags=re.MULTILINE)


# -------------------------------------------------------------------------------------------------------------- file


def test_entries_are_parsed():
    book = "@book{a1,\n  title = {On {B}races, {\\'e}},\n  year = {19\n    99},\n}\n"
    assert parse(f"% @misc{{no, title = {{x}}}}\n{book}\n@misc{{b,\n}}\n") == {
        "a1": {"ENTRYTYPE": "book", "title": "On {B}races, {\\'e}", "year": "19 99"},
        "b": {"ENTRYTYPE": "misc"},
    }


def test_keys_are_unique():
    with pytest.raises(ValueError, match="a twice"):
        parse("@misc{a,\n}\n@misc{a,\n}\n")


def test_the_whole_file_is_parsed():
    text = (ROOT / "difflayers" / "references.bib").read_text(encoding="utf-8")
    assert len(ENTRIES) == text.count("\n@")
    assert sum(len(fields) - 1 for fields in ENTRIES.values()) == len(re.findall(r"^  \w+ = \{", text, re.MULTILINE))
    for key, fields in ENTRIES.items():
        wanted = {"author", "title"} if key == "difflayers" else {"author", "title", "year", "difflayers"}
        kind = {"article": {"journal"}, "inproceedings": {"booktitle"}, "misc": set()}[fields["ENTRYTYPE"]]
        assert wanted | kind <= set(fields), key
        assert all(value.isascii() for value in fields.values()), key


def docstring(thing: object) -> str:
    """Its own, not that of a class it is derived from; accents are left out."""
    own = vars(thing).get("__doc__") if isinstance(thing, type) else thing.__doc__
    return unicodedata.normalize("NFKD", own or "").encode("ascii", "ignore").decode()


def public() -> dict[str, object]:
    found = {}
    for family in (*FAMILIES, "relu.sklearn"):
        module = importlib.import_module(f"difflayers.{family}")
        found |= {f"{family.split('.')[0]}.{name}": getattr(module, name) for name in module.__all__}
    return found


def test_every_name_exists():
    assert set(public()) >= LISTED


def test_every_source_has_an_entry():
    missing = [
        name
        for name, thing in public().items()
        if name not in LISTED and re.search(r"^ *Source: ", docstring(thing), re.MULTILINE)
    ]
    assert set(missing) == WITHOUT_ENTRY


def test_names_lead_to_their_objects():
    things = public()
    for name in LISTED:
        wanted = [key for key, fields in ENTRIES.items() if name in public_names(fields)]
        assert keys(things[name]) == [*wanted, "difflayers"], name


def test_first_authors_are_those_of_the_docstrings():
    """An entry that is listed at the wrong object would mostly have an author whom its docstring does not name."""
    things = public()
    for key, fields in ENTRIES.items():
        surname = re.sub(r"\\\w+\{?|[^A-Za-z]", "", fields["author"].split(" and ")[0].split()[-1])
        for name in public_names(fields):
            text = docstring(things[name])
            if "Source: " in text and name not in FROM_THE_GUIDE:
                assert surname[-4:].lower() in text.lower() or fields["title"][:9].lower() in text.lower(), (key, name)


# -------------------------------------------------------------------------------------------------------------- cite


class Model(nn.Module):
    """A layer by module, one by function, and a solver that a layer was given."""

    def __init__(self) -> None:
        super().__init__()
        self.plan = difflayers.transport.Sinkhorn(0.1, solver=difflayers.transport.SparseNewton())
        self.again = nn.ModuleList([difflayers.transport.Sinkhorn(0.2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.plan(difflayers.conic.project_polyhedron(x, -torch.eye(2), torch.zeros(2)))


def test_modules_and_their_solvers_are_found_once():
    assert keys(Model()) == ["eisenberger2022unified", "tang2024accelerating", "difflayers"]


def test_traces_see_functions_inside_a_forward():
    with difflayers.trace() as solves:
        Model()(torch.rand(2, 2))
    assert keys(solves) == ["amos2017optnet", "eisenberger2022unified", "tang2024accelerating", "difflayers"]
    assert keys(Model(), solves)[:2] == keys(Model())[:2]


def test_names_of_records_are_unambiguous():
    """What stands first in a record is a function or a module, whose name belongs to one family."""
    for name in LISTED:
        bare = name.split(".")[1]
        if bare[0].islower():
            assert sum(other.split(".")[1] == bare for other in LISTED) == 1, bare


def test_a_solver_of_the_same_name_in_another_family_is_not_meant():
    eye = torch.eye(2, dtype=torch.float64)
    with difflayers.trace() as solves:
        difflayers.conic.quadratic_program(eye, eye[0], -eye, eye[0], solver=difflayers.conic.InteriorPoint())
    assert "InteriorPoint" in solves[0].name
    assert "implicit.InteriorPoint" in LISTED
    assert keys(solves) == ["amos2017optnet", "difflayers"]


def test_subclasses_stand_for_what_they_are_derived_from():
    class Mine(difflayers.conic.UPGrad):
        pass

    assert keys(Mine) == keys(Mine()) == ["quinton2024jacobian", "difflayers"]


def test_objects_that_are_no_modules():
    problem = difflayers.bilevel.Bilevel(
        upper=lambda x, y, batch: y.sum(), lower=lambda x, y, batch: (y - x).square().sum()
    )
    method = difflayers.bilevel.SOBA(problem, torch.zeros(2), torch.zeros(2))
    assert keys(method)[0] == "dagreou2022framework"
    assert keys(difflayers.implicit.Anderson()) == ["anderson1965iterative", "difflayers"]


def test_families():
    assert set(keys(difflayers)) == set(ENTRIES)
    assert "hansen2023learning" in keys(difflayers.pde)
    assert "amos2017optnet" not in keys(difflayers.pde)


def test_without_layers_the_library_is_left():
    assert keys() == keys(nn.Linear(2, 2)) == keys([]) == ["difflayers"]
    assert f"Version {difflayers.__version__}" in cite()


def test_what_is_printed_is_bibtex_without_our_field():
    printed = cite(difflayers)
    expected = {key: {k: v for k, v in fields.items() if k != "difflayers"} for key, fields in ENTRIES.items()}
    expected["difflayers"]["note"] = f"Version {difflayers.__version__}"
    assert parse(printed) == expected
    assert printed.count("{") == printed.count("}")


@pytest.mark.parametrize("bad", [3, "conic", torch, torch.relu, torch.zeros(2), lambda x: x, [1]])
def test_what_is_not_ours_is_refused(bad: object):
    with pytest.raises(TypeError, match="what: expected"):
        cite(bad)


# ------------------------------------------------------------------------------------------------ CITATION.cff, pages


def test_citation_file_agrees_with_the_package():
    fields = dict(re.findall(r"^(\S+): (.+)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE))
    assert fields["version"] == difflayers.__version__
    assert fields["title"].strip('"') == re.sub(r"[{}]", "", ENTRIES["difflayers"]["title"])
    assert fields["license"] in (ROOT / "pyproject.toml").read_text()


def cited(page: Path) -> set[str]:
    return {
        key.strip() for found in re.findall(r"\{cite:[pt]\}`([^`]+)`", page.read_text()) for key in found.split(",")
    }


def test_pages_cite_what_exists():
    for page in PAGES:
        assert cited(page) <= set(ENTRIES), page.name


def test_the_index_has_every_page():
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs" / "papers" / "index.md").read_text()))
    assert linked == {page.name for page in PAGES} - {"index.md"}


def test_every_page_has_its_parts():
    for page in PAGES:
        if page.name != "index.md":
            heads = re.findall(r"^## (.*)$", page.read_text(), flags=re.MULTILINE)
            assert heads == ["Inner problem", "Layer", "Departures", "Reproduced", "How to cite"], page.name
            assert cited(page), page.name


def test_every_picture_of_the_gallery_is_of_an_example():
    for page in PAGES:
        for example in re.findall(r"sphx_glr_gallery_(\w+\.py)", page.read_text()):
            assert (ROOT / "examples" / example).is_file(), (page.name, example)
