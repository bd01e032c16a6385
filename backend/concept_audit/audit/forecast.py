"""Which concepts training on the data would strengthen or weaken, to first order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd

from concept_audit.audit.opened import DEFAULTS, EVERY_ROW, OpenAudit
from concept_audit.data.prompts import NEUTRAL
from concept_audit.data.read import read_queries
from concept_audit.errors import ConceptError, StoreError
from concept_audit.influence.forecast_intervals import GroupForecasts, Intervals, intervals
from concept_audit.influence.options import InfluenceOptions
from concept_audit.pipeline.forecast import ForecastFiles, ForecastRequest, Prompts, compute_forecast, forecast_files
from concept_audit.progress import Progress
from concept_audit.store import forecast as store_forecast
from concept_audit.store.filters import RowFilter

COLUMNS = ["concept_id", "name", "kind", "layer", "forecast", "low", "high", "null_low", "null_high"]
"""Of a forecast that is taken away."""
MORE_COLUMNS = ["label", "usual", "relative", "n_rows"]
FLAGGED = RowFilter(flag="any")
Read = Callable[[ForecastFiles], GroupForecasts]


@dataclass(frozen=True)
class _Part:
    """Terms of a forecast: a factor, and the rows that it is of."""

    factor: float
    where: RowFilter
    rest: bool = False


class Forecasts:
    """Forecasts of all concepts at once: computed when first asked for, and kept."""

    def __init__(self, opened: OpenAudit):
        self._opened = opened
        self._guard = threading.Lock()

    def forecast(
        self,
        where: RowFilter = EVERY_ROW,
        prompts: Prompts | None = None,
        options: InfluenceOptions = DEFAULTS,
        progress: Progress | None = None,
    ) -> pd.DataFrame:
        """What training on rows would do to every live SAE feature and every probe, on neutral prompts, to first order.

        It is computed if it is not kept: a pass forward and backward over the rows, whatever the number of concepts.

        Args:
            where: the rows; every row by default.
            prompts: conversations whose assistant turns are read; None for the 64 that come with the package.
            options: curvature, weights, blocks, precision and `partial` are read, and nothing else.

        Returns:
            concept_id, name, kind, layer; forecast (of the mean of the rows' scores: the mean of their exact concept
            influence on these prompts, by an SAE feature's activation through its encoder, or by the projection onto a
            probe's direction), low and high (its 95% interval over rows and prompts), null_low and null_high (where
            95% of the forecasts of rows with random signs lie); label; usual (a feature's mean activation where it
            fires in the data; NaN of a probe), relative (forecast / usual) and n_rows, by relative size, probes
            first. Interval and band are NaN where the rows fall into fewer than 4 groups.

        Raises:
            ConceptError: no row passes, or a prompt has nothing to read.
            ModelError: the model has no weights to attribute to.
            StoreError: it is not kept, and the audit is opened read-only.
        """
        return self._table([_Part(1.0, where)], prompts, options, progress)

    def difference(
        self,
        where: RowFilter,
        other: RowFilter | None = None,
        prompts: Prompts | None = None,
        options: InfluenceOptions = DEFAULTS,
        progress: Progress | None = None,
    ) -> pd.DataFrame:
        """The forecast of some rows less that of others: as `forecast`, of the difference of the two means.

        Args:
            other: None for all rows but those of `where`, which takes the forecasts of both.
        """
        rest = _Part(-1.0, where, rest=True) if other is None else _Part(-1.0, other)
        return self._table([_Part(1.0, where), rest], prompts, options, progress)

    def without(
        self,
        where: RowFilter = FLAGGED,
        prompts: Prompts | None = None,
        options: InfluenceOptions = DEFAULTS,
        progress: Progress | None = None,
    ) -> pd.DataFrame:
        """What if some rows were removed: the forecast of the rest, as `forecast`."""
        return self._table([_Part(1.0, where, rest=True)], prompts, options, progress)

    def removal_effects(self, where: RowFilter = FLAGGED) -> pd.DataFrame:
        """What the stored rankings by concept influence say of the data without some rows; nothing is computed.

        They are on the queries of each ranking, not on neutral prompts.

        Returns:
            concept_id, parameters (JSON, of the ranking), before and after (means of the scores of all rows, and of
            those that stay), n_left_out.
        """
        where = self._opened.searched(where)
        return self._opened.cached_read(
            ("removal", repr(where)), lambda cursor: store_forecast.removal_effects(cursor, where)
        )

    def has(
        self, where: RowFilter = EVERY_ROW, prompts: Prompts | None = None, options: InfluenceOptions = DEFAULTS
    ) -> bool:
        """Whether a forecast is kept, so that asking for it costs nothing.

        Raises:
            ConceptError: no row passes.
        """
        return self._located(self._request(where, prompts, options)).done

    def count(self, where: RowFilter) -> int:
        """How many rows pass a filter."""
        return len(self._rows(where))

    def ensure(
        self,
        where: RowFilter = EVERY_ROW,
        prompts: Prompts | None = None,
        options: InfluenceOptions = DEFAULTS,
        progress: Progress | None = None,
    ) -> None:
        """Compute a forecast, or what is missing of it; raises as `forecast`."""
        self._files(where, prompts, options, progress)

    def _files(
        self, where: RowFilter, prompts: Prompts | None, options: InfluenceOptions, progress: Progress | None
    ) -> ForecastFiles:
        wanted = self._request(where, prompts, options)
        files = self._located(wanted)
        if files.done:
            return files
        if self._opened.read_only:
            raise StoreError(
                f"{self._opened.name}: this forecast is not computed yet, and the audit is opened read-only, so nothing "
                "is; ask for it once without --read-only, and it is there"
            )
        return compute_forecast(self._opened.sources(), wanted, progress or self._opened.progress)

    def _request(self, where: RowFilter, prompts: Prompts | None, options: InfluenceOptions) -> ForecastRequest:
        if prompts is not None and not len(prompts):
            raise ConceptError("no prompts: give at least one conversation with an assistant turn")
        return ForecastRequest(self._rows(where), neutral_prompts() if prompts is None else prompts, options)

    def _located(self, wanted: ForecastRequest) -> ForecastFiles:
        """Where a forecast is kept; the groups of its rows are remembered."""
        key = ("forecast files", wanted.rows.tobytes(), repr(wanted.prompts), repr(wanted.options))
        return self._opened.remembered(key, lambda: forecast_files(self._opened.sources(), wanted), of_build=True)

    def _rows(self, where: RowFilter) -> np.ndarray:
        if where.scores is not None or where.percentile is not None:
            raise ConceptError("a forecast is of rows whatever their scores; filter by text, metadata or flags")
        where = self._opened.searched(where)
        return self._opened.cached_read(
            ("forecast rows", repr(where)), lambda cursor: store_forecast.row_ids(cursor, where)
        )

    def _table(
        self, parts: Sequence[_Part], prompts: Prompts | None, options: InfluenceOptions, progress: Progress | None
    ) -> pd.DataFrame:
        filters = {repr(where): where for part in parts for where in ([EVERY_ROW] if part.rest else []) + [part.where]}
        files = {name: self._files(where, prompts, options, progress) for name, where in filters.items()}
        made = self._opened.made
        probes = self._opened.read(
            lambda cursor: store_forecast.probe_directions(cursor, made.fingerprints["model"], self._opened.layers)
        )
        features = self._opened.read(store_forecast.live_features)
        key = tuple((part.factor, files[repr(part.where)].shards.key, part.rest) for part in parts)
        trained = tuple((probe.name, probe.layer, probe.direction.tobytes()) for probe in probes)

        def computed() -> tuple[list[Intervals], int]:
            with self._guard:
                found = []
                if len(features):
                    found.append(intervals(_terms(parts, files, ForecastFiles.of_features)))
                for layer in sorted({probe.layer for probe in probes}):
                    directions = np.stack([probe.direction for probe in probes if probe.layer == layer])
                    read = partial(ForecastFiles.along, layer=layer, directions=directions)
                    found.append(intervals(_terms(parts, files, read)))
                return found, _counted(parts[0], files)

        found, n_rows = self._opened.remembered(("forecast", key, trained), computed)
        return _together(features, probes, found, n_rows)


def neutral_prompts() -> Prompts:
    """The 64 prompts that come with the package."""
    return [example.messages for example in read_queries(NEUTRAL)]


def _terms(parts: Sequence[_Part], files: dict[str, ForecastFiles], read: Read) -> list[tuple[float, GroupForecasts]]:
    """The terms of a forecast, whose parts' files are kept under the names of their filters."""
    terms = []
    for part in parts:
        found = read(files[repr(part.where)])
        if part.rest:
            found = read(files[repr(EVERY_ROW)]).less(found)
            if not found.rows.sum():
                raise ConceptError("every row passes the filter, so no row is left to compare with or to keep")
        terms.append((part.factor, found))
    return terms


def _counted(part: _Part, files: dict[str, ForecastFiles]) -> int:
    of = files[repr(part.where)].rows.sum()
    return int(files[repr(EVERY_ROW)].rows.sum() - of if part.rest else of)


def _together(
    features: pd.DataFrame, probes: Sequence[store_forecast.ProbeDirection], found: Sequence[Intervals], n_rows: int
) -> pd.DataFrame:
    tables, rest = [], list(found)
    if len(features):
        numbers = features["feature_id"]
        about = {
            "concept_id": [f"sae:{i}" for i in numbers],
            "name": [f"feature {i}" for i in numbers],
            "kind": "sae_feature",
            "layer": features["layer"],
            "label": features["label"],
            "usual": features["mean_activation"].astype(float),
        }
        tables.append(pd.DataFrame({**about, **vars(rest.pop(0))}))
    for layer, each in zip(sorted({probe.layer for probe in probes}), rest, strict=True):
        names = [probe.name for probe in probes if probe.layer == layer]
        about = {
            "concept_id": [f"probe:{name}" for name in names],
            "name": names,
            "kind": ["probe"] * len(names),
            "layer": [layer] * len(names),
            "label": names,
            "usual": [np.nan] * len(names),
        }
        tables.insert(0, pd.DataFrame({**about, **vars(each)}))
    if not tables:
        return pd.DataFrame(columns=[*COLUMNS, *MORE_COLUMNS])
    table = pd.concat(tables, ignore_index=True)
    table["relative"] = table["forecast"] / table["usual"].where(table["usual"] > 0)
    table["n_rows"] = n_rows
    size = table["relative"].abs().fillna(np.inf)
    table = table.assign(size=size).sort_values(["size", "concept_id"], ascending=[False, True], ignore_index=True)
    return table[[*COLUMNS, *MORE_COLUMNS]]
