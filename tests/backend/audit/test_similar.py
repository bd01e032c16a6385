"""Rows near to a row: by cosine about the mean of all rows, without the row and its copies."""

from __future__ import annotations

import numpy as np
import pytest

from concept_audit import Audit, BuildOptions, ConceptError, ModelOptions, build
from concept_audit.store.activations import read_means
from tests.conftest import chat_rows, write_jsonl


def test_the_nearest_rows_are_those_of_brute_force(audit):
    layer = 2
    h = np.concatenate(list(read_means(audit.opened.sources().shards("activations"), layer))).astype(np.float64)
    centred = h - h.mean(0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    wanted = unit @ unit[5]
    wanted[5] = -2
    found = audit.rows.similar(5, layer, limit=6)
    assert found["example_id"].tolist() == np.argsort(-wanted)[:6].tolist()
    np.testing.assert_allclose(found["similarity"], np.sort(wanted)[::-1][:6], rtol=1e-9)


def test_copies_are_not_near_and_what_cannot_be_compared_is_said(tmp_path, model_directory):
    rows = chat_rows(6)
    rows = [rows[0], rows[0], rows[1], rows[1], *rows[2:]]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    options = BuildOptions(
        data=str(data), out=tmp_path / "out", model=ModelOptions(str(model_directory), device="cpu"), sae="none"
    )
    audit = Audit(build(options))
    layer = audit.layers[0]
    found = audit.rows.similar(0, layer)
    assert set(found["content_hash"]) == set(audit.rows.list()["content_hash"]) - {audit.rows.list()["content_hash"][0]}
    assert found["content_hash"].is_unique and len(found) == 5
    with pytest.raises(ConceptError, match="keeps the layers"):
        audit.rows.similar(0, 99)
