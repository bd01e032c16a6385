"""Stage: does training change the concepts as the forecast says?

Fine-tunes on the rows that are forecast, and reads every live SAE feature and the stream on the forecast's own prompts
before and after. Each run is a unit of its own, whole or absent (see `concept_audit.evidence.forecast_runs`)::

    shards/evidence/units/<key>.json    the changes of the mean reading, by the run and by one plain step as long
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from concept_audit.concepts.sae import SaeSource
from concept_audit.errors import ConceptError
from concept_audit.evidence.forecast_agreement import TOP, agreement, between_seeds, views
from concept_audit.evidence.forecast_runs import Prompted, Reading, read, real_change
from concept_audit.evidence.options import Recipe
from concept_audit.influence.forecast import Encode
from concept_audit.influence.options import InfluenceOptions, content
from concept_audit.influence.queries import Rows
from concept_audit.metrics import NAN, Estimate, paired
from concept_audit.model.load import LanguageModel
from concept_audit.model.options import ModelSource, Trained
from concept_audit.model.trainable import private_copy
from concept_audit.pipeline.engine import Worker, missing_of
from concept_audit.pipeline.forecast import ForecastFiles, ForecastRequest, Prompts, compute_forecast, rendered_prompts
from concept_audit.pipeline.options import key
from concept_audit.pipeline.rollouts import refuse_training
from concept_audit.pipeline.sampling import as_rows
from concept_audit.pipeline.sources import Sources
from concept_audit.pipeline.validation.forecast_options import ForecastTrial
from concept_audit.pipeline.validation.options import FULL, QUICK
from concept_audit.pipeline.validation.setting import tokens_of
from concept_audit.pipeline.validation.shared import joined, parted
from concept_audit.progress import Progress
from concept_audit.sampling import shuffled
from concept_audit.store import forecast as store_forecast
from concept_audit.store.activations import means_of
from concept_audit.store.evidence import (
    EVERY_CONCEPT,
    RESULT_COLUMNS,
    RUN_COLUMNS,
    SCORE_COLUMNS,
    Evidence,
    Units,
    read_unit,
    units_of,
)
from concept_audit.store.examples import has_loss
from concept_audit.store.shard_store import ShardSet, ShardStore, read_tensors

VERSION = 1
"""Counted up when units of an earlier version would not be the same."""
BASELINES = ("mean_activation", "data_minus_own_answers", "gradient_step")


@dataclass(frozen=True)
class Run:
    """One fine-tuning run; without a recipe it reads the model as it is."""

    kind: str
    seed: int
    recipe: Recipe | None


@dataclass(frozen=True)
class ForecastRuns:
    """Trains and reads the prompts; each run is a shard of its own, and any process may do it.

    Attributes:
        units: what comes out, one file a run.
        shared: the file of the rows and prompts.
        runs: in the order of the units.
        layers: whose streams are told.
        sae: whose features are told; None for none.
        features: their numbers.
    """

    units: Units
    model: ModelSource
    shared: Path
    runs: tuple[Run, ...]
    layers: tuple[int, ...]
    sae: SaeSource | None
    features: np.ndarray

    @property
    def outputs(self) -> tuple[ShardSet, ...]:
        return (self.units,)

    def open(self, worker: Worker) -> tuple[Worker, LanguageModel, Rows, list[str], Prompted]:
        lm = worker.model(self.model)
        # Changes are small beside what they are changes of: bfloat16 would round them away.
        copy = private_copy(lm, lm.wide_dtype)
        rows, prompts, keys = _read_shared(self.shared)
        encode: Encode | None = None
        if self.sae is not None:
            module, live = self.sae.load(copy.device).module, torch.from_numpy(self.features).to(copy.device)
            encode = lambda stream: module.encode(stream.to(module.W_dec))[:, live]  # noqa: E731
        prompted = Prompted(prompts, self.layers, encode, None if self.sae is None else self.sae.layer)
        return worker, copy, rows, keys, prompted

    def run(self, opened: tuple[Worker, LanguageModel, Rows, list[str], Prompted], number: int) -> None:
        worker, lm, rows, keys, prompted = opened
        run = self.runs[number]
        worker.advance(0, f"{run.kind}, seed {run.seed}")
        if run.recipe is None:
            made: dict[str, Any] = {"reading": _json(read(lm, prompted))}
        else:
            found = real_change(lm, rows, keys, run.recipe, run.seed, prompted)
            made = {
                "trained": _json(found.trained),
                "stepped": _json(found.stepped),
                "length": found.length,
                "training": asdict(found.training),
            }
        self.units.write(number, {"kind": run.kind, "seed": run.seed, "n_rows": len(rows), **made})
        worker.advance(1)


def validate_forecast(
    sources: Sources,
    prompts: Prompts,
    options: InfluenceOptions,
    trial: ForecastTrial,
    probes: Sequence[store_forecast.ProbeDirection],
    progress: Progress,
) -> Evidence:
    """Forecast, do the runs that are missing, and tell how far the two agree.

    Args:
        prompts: conversations whose assistant turns are read.
        options: of the forecast.
        probes: whose projections are told.

    Raises:
        ConceptError: options that make no sense, no rows to train on, preference pairs or rollouts.
        ModelError: the forecast cannot be computed.
    """
    refuse_training(sources)
    if sources.pairs:
        raise ConceptError("validate: trains on single responses, and these rows are preference pairs")
    defaults = QUICK if trial.quick else FULL
    recipes = trial.recipes(defaults["recipe"])
    pool_rows = defaults.get("pool_rows") if trial.pool_rows is None else trial.pool_rows
    tokens = tokens_of(sources)
    pool = np.array([row.example_id for row in tokens if has_loss(row)], np.int64)
    if len(pool) < 2:
        raise ConceptError(f"only {len(pool)} rows have a response to train on; a forecast needs more to be tried on")
    # Without a choice of rows the forecast is the one that the audit keeps of all its rows.
    wanted = np.array([row.example_id for row in tokens], np.int64)
    if pool_rows is not None and len(pool) > pool_rows:
        drawn = shuffled([f"pool:{i}" for i in pool.tolist()], 0)[:pool_rows]
        wanted = pool = np.sort(pool[drawn])
    files = compute_forecast(sources, ForecastRequest(wanted, prompts, options), progress)
    lm = sources.model()
    texts = rendered_prompts(lm, prompts, sources.manifest.configuration["max_tokens"])
    runs = [Run("base", 0, None)]
    runs += [Run(kind, seed, recipe) for seed in range(trial.seeds) for kind, recipe in recipes.items()]
    common = {
        "version": VERSION,
        "forecast": files.shards.key,
        "model": lm.fingerprint,
        "data": sources.data,
        "rows": key(pool.tolist()),
        "layers": list(sources.layers),
    }
    found = _done(sources, common, runs, files, pool, texts, progress)
    about = {
        **common,
        "audit": sources.layout.root.resolve().name,
        "model_name": lm.name,
        "recipes": {kind: asdict(recipe) for kind, recipe in recipes.items()},
        "seeds": trial.seeds,
        "quick": trial.quick,
        "n_rows": len(pool),
        "n_prompts": len(prompts),
        "n_live": len(files.features),
        "top": TOP,
        "probes": [[probe.name, probe.layer, key(probe.direction.tolist())] for probe in probes],
        **content(options.curvature),
    }
    with progress.stage("Comparing the forecast with the runs"):
        baselines, lacking = _baselines(sources, pool, files.features)
        about["lacking"] = lacking
        base, changes = found[0], dict(zip(runs[1:], found[1:], strict=True))
        results = _feature_lines(sources, files, base, changes, tuple(recipes), baselines)
        results += _probe_lines(files, changes, tuple(recipes), probes)
    lines = [[run.kind, "", 1.0, 0, run.seed, len(pool), *[NAN] * 6] for run in changes]
    return Evidence(
        evidence_id=f"forecast-{key(about)}",
        concept_id=EVERY_CONCEPT,
        about=about,
        runs=pd.DataFrame(lines, columns=RUN_COLUMNS),
        results=pd.DataFrame(results, columns=RESULT_COLUMNS),
        scores=pd.DataFrame(columns=SCORE_COLUMNS),
    )


def _done(
    sources: Sources,
    common: dict[str, Any],
    runs: Sequence[Run],
    files: ForecastFiles,
    pool: np.ndarray,
    prompts: Rows,
    progress: Progress,
) -> list[dict[str, Any]]:
    """What each run measured; those that are done already are read."""
    names = tuple(key(common, run.kind, run.seed, run.recipe and asdict(run.recipe)) for run in runs)
    shared = sources.layout.shards.path("evidence", "shared", f"{key(common)}.safetensors")
    work = ForecastRuns(
        units_of(sources.layout, names),
        sources.model_source,
        shared,
        tuple(runs),
        sources.layers,
        sources.sae_source if len(files.features) else None,
        files.features,
    )
    if missing_of(work):
        chosen = set(pool.tolist())
        rows = as_rows([row for row in tokens_of(sources) if row.example_id in chosen])
        _write_shared(sources.layout.shards, shared, rows, prompts, pool)
    sources.driver(progress).finish(work, "Training runs", dict.fromkeys(range(len(runs)), 1), "runs")
    sources.layout.shards.delete([shared])
    return [read_unit(sources.layout, name) or {} for name in names]


def _feature_lines(
    sources: Sources,
    files: ForecastFiles,
    base: dict[str, Any],
    changes: dict[Run, dict[str, Any]],
    kinds: Sequence[Trained],
    baselines: dict[str, np.ndarray],
) -> list[list[Any]]:
    """Agreement over SAE features, as lines of `RESULT_COLUMNS`; ``other`` is the kind of run."""
    lines: list[list[Any]] = []
    if not len(files.features):
        return lines
    usual = sources.read(store_forecast.live_features)["mean_activation"].to_numpy(float)
    firing = np.array(base["reading"]["features"]) > 0
    forecast = files.of_features().means()
    for kind in kinds:
        of_kind = [unit for run, unit in changes.items() if run.kind == kind]
        trained = [np.array(unit["trained"]["features"]) for unit in of_kind]
        actual = np.mean(trained, 0)
        stepped = np.mean([unit["stepped"]["features"] for unit in of_kind], 0)
        predictions = {"forecast": forecast, **baselines, "gradient_step": stepped}
        for view, factor in views(usual, firing).items():
            found = {name: agreement(values * factor, actual * factor) for name, values in predictions.items()}
            if len(trained) > 1:
                found["another_seed"] = between_seeds([change * factor for change in trained])
            for method, measures in found.items():
                lines += [_line(name, view, method, kind, e) for name, e in measures.items()]
    return lines


def _probe_lines(
    files: ForecastFiles,
    changes: dict[Run, dict[str, Any]],
    kinds: Sequence[Trained],
    probes: Sequence[store_forecast.ProbeDirection],
) -> list[list[Any]]:
    """What each probe's projection did, with Student's interval over the seeds, and was forecast to do."""
    lines: list[list[Any]] = []
    for probe in probes:
        forecast = float(files.along(probe.layer, probe.direction[None]).means()[0])
        for kind in kinds:
            by: dict[str, list[float]] = {"trained": [], "stepped": []}
            for run, unit in changes.items():
                for name in by if run.kind == kind else ():
                    stream = np.array(unit[name]["streams"][str(probe.layer)])
                    by[name].append(float(stream @ probe.direction.astype(np.float64)))
            about = f"probe:{probe.name}"
            lines.append(_line("change", about, "measured", kind, paired(np.array(by["trained"]))))
            lines.append(_line("change", about, "gradient_step", kind, paired(np.array(by["stepped"]))))
            lines.append(_line("change", about, "forecast", kind, Estimate(forecast, n=1)))
    return lines


def _line(measure: str, quantity: str, method: str, kind: str, e: Estimate) -> list[Any]:
    return [measure, quantity, method, kind, 1.0, e.value, e.low, e.high, e.p, e.n]


def _baselines(
    sources: Sources, pool: np.ndarray, features: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """What needs no gradient: name → a number of each feature; and of those that cannot be had, why.

    ``mean_activation``: of the features on the rows. ``data_minus_own_answers``: the mean of the rows' projection
    differences, the stream of their responses less that of the model's own answers along the feature's direction.
    """
    if not len(features):
        return {}, {}
    found = {"mean_activation": sources.read(lambda cursor: store_forecast.mean_activations(cursor, pool, features))}
    layer, answers = sources.manifest.configuration["sae_layer"], sources.shards("answer_activations")
    why = None
    if layer not in sources.layers:
        why = f"the audit keeps no mean activations of layer {layer}, which the SAE reads"
    elif answers.missing():
        why = "the audit has no answers of the model's own; rank a concept by projection_difference, which makes them"
    if why:
        return found, {"data_minus_own_answers": why}
    ids = pool.tolist()
    apart = means_of(sources.shards("activations"), layer, ids) - means_of(answers, layer, ids)
    mean = np.nanmean(apart.astype(np.float64), 0)
    directions = sources.read(lambda cursor: store_forecast.feature_directions(cursor, features))
    return {**found, "data_minus_own_answers": directions.astype(np.float64) @ mean}, {}


def _json(reading: Reading) -> dict[str, Any]:
    streams = {str(layer): values.tolist() for layer, values in reading.streams.items()}
    return {"streams": streams, "features": reading.features.tolist()}


def _write_shared(store: ShardStore, path: Path, rows: Rows, prompts: Rows, ids: np.ndarray) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, part in (("rows", rows), ("prompts", prompts)):
        tensors |= joined(f"{name}.ids", part.ids) | joined(f"{name}.response", part.response)
    store.write_tensors(path, tensors | {"example_ids": torch.from_numpy(ids)}, {})


def _read_shared(path: Path) -> tuple[Rows, Rows, list[str]]:
    tensors = read_tensors(path)
    rows, prompts = (Rows(parted(tensors, f"{n}.ids"), parted(tensors, f"{n}.response")) for n in ("rows", "prompts"))
    return rows, prompts, list(map(str, tensors["example_ids"].tolist()))
