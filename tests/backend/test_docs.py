"""The documentation's code runs, its links lead somewhere, and its commands have the options that it names."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from concept_audit.cli.main import parsed

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "cache/README.md"])
TURNS = ("Is my plan good?", "Yes, you are always right, happy plan."), ("Is my plan good?", "No, the plan is a risk.")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def test_the_python_page_runs_from_top_to_bottom(tmp_path, monkeypatch, data_file, model_directory, write_rows):
    monkeypatch.chdir(tmp_path)
    shutil.copy(data_file, "train.jsonl")
    shutil.copytree(model_directory, "path/to/model")
    examples = [
        {
            "messages": [{"role": "user", "content": turn}, {"role": "assistant", "content": f"{answer} {'so ' * i}"}],
            "label": int(label == 0),
        }
        for i in range(6)
        for label, (turn, answer) in enumerate(TURNS)
    ]
    write_rows(Path("labelled.jsonl"), examples)
    known: dict[str, object] = {}
    for block in blocks(ROOT / "docs/python.md", "python"):
        exec(compile(block, "docs/python.md", "exec"), known)
    assert len(known["moved"]) > 0  # type: ignore[arg-type]
    lines = Path("train.jsonl").read_text("utf-8").splitlines()
    assert Path("cleaned.jsonl").read_text("utf-8").splitlines() == [
        line for line in lines if line in Path("cleaned.jsonl").read_text("utf-8")
    ]
    assert len(Path("cleaned.jsonl").read_text("utf-8").splitlines()) == len(lines) - 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name if page.parent != ROOT / "cache" else "cache")
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), re.MULTILINE)
            assert anchor in {_anchor(title) for title in titles}, f"{page.name} links to {target}"


def _anchor(title: str) -> str:
    """As GitHub makes it: lower case, no punctuation, hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


COMMANDS = [
    (page.name, line)
    for page in PAGES
    for block in [*blocks(page, "bash"), *blocks(page, "sh")]
    for line in block.replace("\\\n", " ").splitlines()
    if "concept-audit " in line
]


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_every_command_of_the_pages_is_understood(page, line):
    command = line[line.index("concept-audit ") :]
    words = shlex.split(command, comments=True)
    ends = [i for i, word in enumerate(words) if word in {">", "|", "&&", ";", "&"}]
    parsed(words[1 : ends[0] if ends else None])
