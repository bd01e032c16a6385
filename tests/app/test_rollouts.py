"""Pages of an audit of rollouts, in Streamlit's test harness: what they say of scores by the advantage."""

from __future__ import annotations

import pytest

from concept_audit import Audit, BuildOptions, LabelledExample, Message, ModelOptions, RewardColumns, build
from tests.app.test_pages import open_page, words
from tests.conftest import chat_rows


@pytest.fixture
def audit(tmp_path, monkeypatch, model_directory, write_rows) -> Audit:
    rows = [row | {"reward": n % 3, "group": n // 4} for n, row in enumerate(chat_rows(24))]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    model = ModelOptions(str(model_directory), device="cpu")
    rewards = RewardColumns(rollouts=True)
    made = Audit(build(BuildOptions(str(data), tmp_path / "rollouts", model, layers=(1,), sae="none", rewards=rewards)))
    labelled = [
        LabelledExample((Message("user", "q"), Message("assistant", f"{'yes' if n % 2 else 'no'} {'so ' * n}")), n % 2)
        for n in range(12)
    ]
    made.train_probe("agrees", labelled)
    made.probes.set_threshold("agrees", 0.1)
    monkeypatch.setenv("CONCEPT_AUDIT_CACHE", str(tmp_path))
    monkeypatch.setenv("CONCEPT_AUDIT_NAME", "rollouts")
    return made


@pytest.mark.parametrize("name", ["overview", "probe_lab", "ranking", "compare", "groups", "export"])
def test_pages_open_without_an_exception(audit, name):
    page = open_page(name)
    assert not page.exception and not page.error
    if name == "ranking":
        assert "before the advantage · held-out AUROC" in words(page)


def test_validation_is_not_offered(audit):
    assert "these rows are rollouts, which weigh by their advantage" in words(open_page("evidence"))
