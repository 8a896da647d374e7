"""Runs contenders, each in a process of its own, and keeps results.json."""

import dataclasses
import importlib
import json
import pkgutil
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from integrity import subjects as package
from integrity.clauses import CLAUSES, run_clause
from integrity.harness import RAISES, Cell, Contender, Problem

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
SECONDS = 120  # for all clauses of one contender

Subjects = list[tuple[Problem, list[Contender]]]


def all_subjects() -> Subjects:
    names = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    return [subject for m in sorted(modules, key=lambda m: getattr(m, "ORDER", 50)) for subject in m.subjects()]


def version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def child(problem_name: str, contender_name: str, clauses: Sequence[str]) -> None:
    """In the child process: one line of JSON for every cell, as soon as it is known."""
    problem, contender = find(problem_name, contender_name)
    for clause in clauses:
        cell = run_clause(clause, problem, contender)
        print("\n" + json.dumps({"clause": clause, **dataclasses.asdict(cell)}), file=sys.__stdout__, flush=True)


def find(problem_name: str, contender_name: str) -> tuple[Problem, Contender]:
    for problem, contenders in all_subjects():
        for contender in contenders:
            if (problem.name, contender.name) == (problem_name, contender_name):
                return problem, contender
    raise SystemExit(
        f"no contender {contender_name!r} of a problem {problem_name!r}; docs/integrity.md has their names"
    )


def cells(problem: Problem, contender: Contender, seconds: float = SECONDS) -> dict[str, Cell]:
    """All cells of one contender; a clause that crashes the interpreter or takes too long costs this clause only."""
    found: dict[str, Cell] = {}
    while left := [name for name in CLAUSES if name not in found]:
        command = [sys.executable, "-m", "integrity", "--cells", problem.name, contender.name, *left]
        try:
            run = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, timeout=seconds, check=False)
            output, failed = run.stdout, f"the interpreter ended with code {run.returncode}"
        except subprocess.TimeoutExpired as e:
            raw = e.stdout or b""
            output = raw.decode() if isinstance(raw, bytes) else raw
            failed = f"no answer after {seconds:.0f} s"
        for line in output.splitlines():
            if line.startswith('{"clause": '):
                stated = json.loads(line)
                name = stated.pop("clause")
                found[name] = Cell(**stated)
        remaining = [name for name in left if name not in found]
        if remaining:
            found[remaining[0]] = Cell(RAISES, None, failed)
    return {name: found[name] for name in CLAUSES}


def row(contender: Contender, found: dict[str, Cell]) -> dict[str, Any]:
    return {
        "name": contender.name,
        "package": contender.package,
        "version": version(contender.package),
        "ours": contender.ours,
        "call": contender.call,
        "tolerance": contender.tolerance,
        "limit": contender.limit,
        "cells": {name: dataclasses.asdict(cell) for name, cell in found.items()},
    }


def run(subjects: Subjects, peers: Iterable[str]) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows of the contenders of these packages, of all if none is named, by problem and contender."""
    wanted = {name.lower() for name in peers}
    rows = {}
    for problem, contenders in subjects:
        for contender in contenders:
            if wanted and contender.package.lower() not in wanted:
                continue
            if version(contender.package) is None:
                print(f"{problem.name}: {contender.name} is left out, {contender.package} is not installed")
                continue
            fresh = row(contender, cells(problem, contender))
            rows[problem.name, contender.name] = fresh
            said = ", ".join(f"{name} {cell['outcome']}" for name, cell in fresh["cells"].items())
            print(f"{problem.name}: {contender.name}: {said}", flush=True)
    return rows


def merged(stored: dict[str, Any], subjects: Subjects, fresh: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    """The stored results with fresh rows; what was not run keeps its row, what is no subject any more goes."""
    old = {(p["name"], c["name"]): c for p in stored.get("problems", []) for c in p["contenders"]}
    known = old | fresh
    problems = []
    for problem, contenders in subjects:
        keys = [(problem.name, contender.name) for contender in contenders]
        rows = [known[key] for key in keys if key in known]
        if rows:
            described = {"name": problem.name, "text": problem.text, "bad_text": problem.bad_text}
            problems.append({**described, "contenders": rows})
    versions = {"python": platform.python_version(), "torch": version("torch"), "numpy": version("numpy")}
    return {"versions": versions, "problems": problems}


def load() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def save(results: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
