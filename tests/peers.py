"""The same scores by kronfluence (Grosse et al. 2023; Bae 2024), which shares no code with ours.

It is installed without its dependencies, since torchvision, which it asks for and
does not use here, comes from the package index in a build for another PyTorch::

    pip install --no-deps kronfluence einconv opt-einsum einops
"""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from concept_audit.influence.queries import Rows
from concept_audit.model.load import LanguageModel


@dataclass(frozen=True)
class PeerScores:
    """Scores [rows], and the seconds that the factors and the scores took."""

    scores: np.ndarray
    factor_seconds: float
    score_seconds: float


class _Rows(torch.utils.data.Dataset):
    def __init__(self, rows: Rows):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int):
        return self._rows.ids[index], self._rows.response[index]


def _collate(rows) -> dict[str, torch.Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    batch = {name: torch.zeros(len(rows), longest, dtype=torch.long) for name in ("ids", "mask", "response")}
    for place, (ids, response) in enumerate(rows):
        batch["ids"][place, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        batch["mask"][place, : len(ids)] = 1
        batch["response"][place, : len(ids)] = torch.from_numpy(response.astype(np.int64))
    return batch


def kronfluence_scores(
    lm: LanguageModel,
    names: list[str],
    layer: int,
    direction: np.ndarray,
    query: Rows,
    rows: Rows,
    strategy: str,
    damping: float,
    batch: int = 4,
    rank: int | None = None,
) -> PeerScores:
    """Concept influence of each row by kronfluence's pairwise scores, one aggregated query.

    Args:
        names: the linear layers to track.
        strategy: ``identity`` or ``ekfac`` (with the empirical Fisher).
        damping: as a share of the mean eigenvalue: 0.1, the peer's own default.
    """
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from kronfluence.utils.dataset import DataLoaderKwargs

    class ConceptTask(Task):
        def compute_train_loss(self, batch, model, sample=False):
            logits = model(input_ids=batch["ids"], attention_mask=batch["mask"]).logits[:, :-1].float()
            weights = batch["response"][:, 1:].to(logits.dtype)
            nll = F.cross_entropy(logits.flatten(0, 1), batch["ids"][:, 1:].flatten(), reduction="none")
            return ((nll.view(weights.shape) * weights).sum(1) / weights.sum(1)).sum()

        def compute_measurement(self, batch, model):
            found = model(input_ids=batch["ids"], attention_mask=batch["mask"], output_hidden_states=True)
            stream = found.hidden_states[layer]
            weights = batch["response"].to(stream.dtype)
            mean = torch.einsum("btd,bt->bd", stream, weights) / weights.sum(1, keepdim=True)
            return -(mean @ torch.from_numpy(direction).to(stream)).mean()

        def get_influence_tracked_modules(self):
            return names

        def get_attention_mask(self, batch):
            return batch["mask"]

    assert damping == 0.1, "the peer's heuristic is a tenth of the mean eigenvalue"
    task = ConceptTask()
    # It wraps the model's layers for good.
    model = prepare_model(copy.deepcopy(lm.model), task)
    with tempfile.TemporaryDirectory() as directory:
        analyzer = Analyzer(
            "peer", model, task, cpu=True, disable_tqdm=True, disable_model_save=True, output_dir=directory
        )
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=_collate))
        started = time.perf_counter()
        analyzer.fit_all_factors(
            "factors",
            dataset=_Rows(rows),
            per_device_batch_size=batch,
            factor_args=FactorArguments(strategy=strategy, use_empirical_fisher=True),
        )
        fitted = time.perf_counter()
        analyzer.compute_pairwise_scores(
            "scores",
            factors_name="factors",
            query_dataset=_Rows(query),
            train_dataset=_Rows(rows),
            per_device_query_batch_size=len(query),
            per_device_train_batch_size=batch,
            score_args=ScoreArguments(
                damping_factor=None, aggregate_query_gradients=True, query_gradient_low_rank=rank
            ),
        )
        finished = time.perf_counter()
        found = analyzer.load_pairwise_scores("scores")
    scores = found["all_modules"][0].double().numpy()
    return PeerScores(scores, fitted - started, finished - fitted)
