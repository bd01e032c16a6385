"""A small model, and the query of a concept on the first row of the data that a module brings."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from concept_audit.influence.queries import DenseQueries, NegatedConcept, Rows, query_gradient
from concept_audit.influence.targets import Projection
from concept_audit.model.linear import linear_layers
from concept_audit.model.load import as_language_model
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
