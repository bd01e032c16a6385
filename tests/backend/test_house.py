"""The rules of the house: who may import whom, who may speak SQL, who may write."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import concept_audit
import concept_audit_app

PACKAGE, APP = Path(concept_audit.__file__).parent, Path(concept_audit_app.__file__).parent
ROOT = Path(__file__).resolve().parents[2]
COMPUTING = ("evidence", "influence", "concepts", "model", "data")


def files(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text("utf-8"))))


def test_imports_keep_the_contracts():
    """Layers, the app's public names, who knows Streamlit, Transformers or DuckDB: `tool.importlinter`."""
    where = os.pathsep.join([str(PACKAGE.parent), str(APP.parent), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as check; check()", "--no-cache"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": where},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_only_the_store_speaks_sql():
    for path in files(PACKAGE) + files(APP):
        if path.parent.name != "store":
            calls = [node for node in nodes(path) if isinstance(node, ast.Call)]
            names = {call.func.attr for call in calls if isinstance(call.func, ast.Attribute)}
            assert not names & {"execute", "executemany", "sql"}, path


def test_what_computes_does_not_write_to_a_database():
    for part in COMPUTING:
        for path in files(PACKAGE / part):
            assert not any(isinstance(node, ast.Attribute) and node.attr == "writing" for node in nodes(path)), path


def test_every_public_name_can_be_imported():
    for name in concept_audit.__all__:
        assert getattr(concept_audit, name) is not None
