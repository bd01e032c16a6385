"""The rules of the house: who may import whom, and who may speak SQL or to Hugging Face."""

from __future__ import annotations

import ast
from pathlib import Path

import concept_audit
import concept_audit_app

PACKAGE, APP = Path(concept_audit.__file__).parent, Path(concept_audit_app.__file__).parent
PUBLIC = {"concept_audit", "concept_audit.serve"}
ABOVE = {  # a package may import those that stand after it
    "audit": 0,
    "pipeline": 1,
    "evidence": 2,
    "influence": 3,
    "concepts": 4,
    "store": 5,
    "model": 6,
    "data": 6,
}

STILL_WRITING = {"examples.py"}
"""Keeps the activations that it computes; that is the caller's work."""


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def files(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def test_the_app_uses_the_public_names_of_the_backend_alone():
    for path in files(APP):
        assert {name for name in imports(path) if name.split(".")[0] == "concept_audit"} <= PUBLIC, path


def test_the_backend_knows_nothing_of_the_app():
    for path in files(PACKAGE):
        assert not any(name.split(".")[0] in ("concept_audit_app", "streamlit", "plotly") for name in imports(path)), (
            path
        )


def test_imports_run_downwards():
    for path in files(PACKAGE):
        package = path.relative_to(PACKAGE).parts[0]
        for name in imports(path):
            parts = name.split(".")
            if package in ABOVE and parts[0] == "concept_audit" and len(parts) > 1 and parts[1] in ABOVE:
                assert ABOVE[parts[1]] >= ABOVE[package], f"{path} imports {name}"


def test_only_the_store_speaks_sql():
    for path in files(PACKAGE) + files(APP):
        if path.parent.name != "store":
            calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
            names = {call.func.attr for call in calls if isinstance(call.func, ast.Attribute)}
            assert not names & {"execute", "executemany", "sql"}, path
            assert "duckdb" not in imports(path), path


def test_what_computes_does_not_write_to_a_database():
    for path in files(PACKAGE):
        package = path.relative_to(PACKAGE).parts[0]
        if package in ("evidence", "influence", "concepts", "model", "data") and path.name not in STILL_WRITING:
            nodes = ast.walk(ast.parse(path.read_text("utf-8")))
            assert not any(isinstance(node, ast.Attribute) and node.attr == "writing" for node in nodes), path


def test_only_the_model_part_knows_hugging_face():
    for path in files(PACKAGE) + files(APP):
        if path.parent.name != "model":
            assert not any(name.split(".")[0] in ("transformers", "peft") for name in imports(path)), path


def test_every_public_name_can_be_imported():
    for name in concept_audit.__all__:
        assert getattr(concept_audit, name) is not None
