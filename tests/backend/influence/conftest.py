"""A small model, the query of a concept on the first row of the data that a module brings, and an index without loss."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from concept_audit.influence import projection
from concept_audit.influence.coding import STEP
from concept_audit.influence.queries import DenseQueries, NegatedConcept, Rows, query_gradient
from concept_audit.influence.targets import Projection
from concept_audit.model.linear import linear_layers
from concept_audit.model.load import as_language_model
from concept_audit.pipeline.index import build as index_build
from concept_audit.pipeline.index.codes import Codes
from concept_audit.store import index as store_index
from tests.conftest import small_model, small_tokenizer


@pytest.fixture(scope="module")
def lm():
    return as_language_model("small", small_model("llama"), small_tokenizer())


@pytest.fixture(scope="module")
def query(lm, data):
    layers = linear_layers(lm, 1, 3)
    v = np.random.default_rng(0).normal(size=32).astype(np.float32)
    gradient = query_gradient(
        lm, layers, NegatedConcept(Projection(3, v)), Rows(data.ids[:1], data.response[:1]), [1.0]
    )
    return layers, DenseQueries([gradient], torch.float32)


@pytest.fixture
def uncoded(monkeypatch):
    """Every number between the sides is kept as it is: an index is a change of coordinates then."""
    monkeypatch.setattr(projection, "FLOOR", 1e-2)
    monkeypatch.setattr(projection, "LEFT", 512)
    monkeypatch.setattr(projection, "RIGHT", 512)

    def exactly(codes, numbers):
        even = numbers[:, codes.order] / codes.spread[codes.order] / STEP[8]
        return even.astype(np.float32), np.ones(len(numbers), np.float32)

    monkeypatch.setattr(Codes, "encode", exactly)
    monkeypatch.setattr(store_index, "_integer_product", lambda queries, packing: None)
    # Codes are kept in whole bytes; here they are kept as they are.
    monkeypatch.setattr(index_build, "np", SimpleNamespace(**vars(np) | {"int8": np.float32}))
