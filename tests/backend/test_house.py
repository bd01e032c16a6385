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


def test_all_but_the_dashboard_does_without_streamlit(tmp_path):
    code = (
        "import sys, pkgutil, importlib, importlib.util, importlib.machinery\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('streamlit', 'plotly'): raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import concept_audit\n"
        "for module in pkgutil.walk_packages(concept_audit.__path__, 'concept_audit.'):\n"
        "    if not module.name.endswith('__main__'): importlib.import_module(module.name)\n"
        "plain = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name == 'streamlit' else plain(name, *more)\n"
        "(__import__('pathlib').Path(sys.argv[1]) / 'small').mkdir()\n"
        "(__import__('pathlib').Path(sys.argv[1]) / 'small' / 'manifest.json').write_text('{}')\n"
        "sys.exit(concept_audit.cli.main(['serve', '--cache', sys.argv[1]]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1, done.stderr
    assert "pip install 'concept-audit[app]'" in done.stderr
