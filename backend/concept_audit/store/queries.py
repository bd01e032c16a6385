"""What the app, the command line and the Python API read from an audit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from concept_audit.errors import ConceptError
from concept_audit.store.cursor import Cursor, only_row
from concept_audit.store.filters import KEEP, RowFilter
from concept_audit.store.rankings import scores_table
from concept_audit.types import Concept

ROW_COLUMNS = """
    e.example_id, e.content_hash, e.source, e.source_row, e.prompt, e.response, e.metadata, e.messages,
    e.n_tokens, e.n_response_tokens, e.truncated, e.duplicate_of, f.flag, f.note
"""
_IS_QUERY = """coalesce(list_contains((
    SELECT from_json(any_value(parameters)->'query_rows', '["BIGINT"]') FROM main.rankings WHERE ranking_id = ?
), e.example_id), false) AS is_query"""
FLAGGED_ROWS = "(SELECT r.example_id, g.flag FROM main.examples r JOIN base.flags g USING (content_hash))"
"""Flags are of texts and few: their rows are found first, so that not every row is joined with its text's."""
FETCHED_AT_ONCE = 10_000
_ON_A_WORD = r"coalesce(regexp_full_match(top_tokens[1], '\s\p{L}{3,}'), false)"
FEATURE_ORDER = {
    # Those that fire on a word before those that fire on a piece of one; strong where they fire, and in few rows, as
    # words are weighed by tf-idf.
    "telling": f"{_ON_A_WORD} DESC, "
    "max_activation * ln((SELECT count(*) FROM main.examples) / greatest(n_examples, 2)) DESC",
    "max_activation": "max_activation DESC",
    "density": "density DESC",
    "rarest": "density = 0, density ASC",
    "feature_id": "feature_id ASC",
}


@dataclass(frozen=True)
class Overview:
    """Counts over all rows of an audit."""

    n_rows: int
    n_tokens: int
    n_response_tokens: int
    n_duplicates: int
    n_truncated: int
    n_unscored: int
    n_features: int
    n_probes: int
    n_flagged: int


def overview(cursor: Cursor) -> Overview:
    """Count rows, tokens, concepts and flags."""
    counted = only_row(
        cursor.execute(
            """SELECT count(*), coalesce(sum(n_tokens), 0), coalesce(sum(n_response_tokens), 0),
                  count(duplicate_of), count(*) FILTER (truncated), count(*) FILTER (n_response_tokens = 0),
                  (SELECT count(*) FROM main.sae_features WHERE density > 0),
                  (SELECT count(*) FROM base.probes),
                  (SELECT count(*) FROM main.flags WHERE example_id IS NOT NULL AND flag <> ?)
           FROM main.examples""",
            [KEEP],
        )
    )
    return Overview(*map(int, counted))


def metadata_fields(cursor: Cursor) -> pd.DataFrame:
    """The metadata fields: field, n_rows, n_values, top_values (the most frequent, as text)."""
    return cursor.execute("SELECT field, n_rows, n_values, top_values FROM audit.base.metadata_fields").df()


def build_id(cursor: Cursor) -> str:
    """What identifies the present build."""
    return only_row(cursor.execute("SELECT value FROM audit.base.meta WHERE key = 'build_id'"))[0]


def spreads(cursor: Cursor) -> dict[int, np.ndarray]:
    """Layer → standard deviation of each dimension over the rows, float32 [d_model]."""
    found = cursor.execute("SELECT layer, spread FROM audit.base.layers").fetchall()
    return {layer: np.asarray(spread, np.float32) for layer, spread in found}


def concepts(cursor: Cursor, live_only: bool = False) -> pd.DataFrame:
    """Every concept but for its direction: concept_id, name, kind, layer, label, version, details."""
    live = "(SELECT 'sae:' || feature_id FROM main.sae_features WHERE density > 0)"
    return cursor.execute(
        f"""SELECT concept_id, name, kind, layer, label, version, details FROM main.concepts
           WHERE kind = 'probe' OR NOT {bool(live_only)} OR concept_id IN {live}
           ORDER BY kind, TRY_CAST(substr(concept_id, 5) AS INTEGER), name"""
    ).df()


def concept(cursor: Cursor, wanted: str) -> Concept:
    """The concept with this id or name.

    Raises:
        ConceptError: there is none.
    """
    found = cursor.execute(
        """SELECT concept_id, name, kind, layer, direction, version FROM main.concepts
           WHERE concept_id = $1 OR name = $1 ORDER BY concept_id = $1 DESC LIMIT 1""",
        [wanted],
    ).fetchone()
    if found is None:
        probes = [name for (name,) in cursor.execute("SELECT name FROM base.probes ORDER BY name").fetchall()]
        features = only_row(cursor.execute("SELECT count(*) FROM main.sae_features"))[0]
        known = [f"probes {', '.join(probes)}"] if probes else []
        known += [f"SAE features sae:0 to sae:{features - 1}"] if features else []
        raise ConceptError(
            f"no concept {wanted!r} in this audit; there are {' and '.join(known) or 'none yet'}. "
            "Train a probe with `concept-audit probe`"
        )
    concept_id, name, kind, layer, direction, version = found
    return Concept(concept_id, name, kind, layer, np.asarray(direction, np.float32), version)


def features(cursor: Cursor, search: str = "", order: str = "max_activation", live_only: bool = True) -> pd.DataFrame:
    """SAE features whose label, top tokens or promoted tokens contain `search`, in the order of a key of `FEATURE_ORDER`."""
    return cursor.execute(
        f"""SELECT feature_id, label, density, max_activation, mean_activation, n_examples, top_tokens, promoted, layer,
                   label_origin, label_score
            FROM main.sae_features
            WHERE (density > 0 OR NOT ?) AND (? = '' OR contains(lower(label), lower(?))
                OR len(list_filter(top_tokens || promoted, lambda t: contains(lower(t), lower(?)))) > 0)
            ORDER BY {FEATURE_ORDER[order]}, feature_id""",
        [live_only, search, search, search],
    ).df()


def feature(cursor: Cursor, number: int) -> pd.Series:
    """One SAE feature with all that is known of it.

    Raises:
        ConceptError: there is none of this number.
    """
    found = cursor.execute("SELECT * FROM main.sae_features WHERE feature_id = ?", [number]).df()
    if found.empty:
        raise ConceptError(f"SAE feature {number}: there is none of this number in this audit")
    return found.iloc[0]


def strongest_rows(cursor: Cursor, feature: int, limit: int) -> pd.DataFrame:
    """The rows in which an SAE feature fires highest, copies left out; with ``max_activation``."""
    return cursor.execute(
        f"""WITH strongest AS MATERIALIZED (
                SELECT a.max_activation, example_id
                FROM main.feature_activations a JOIN main.examples USING (example_id)
                WHERE a.feature_id = ? AND duplicate_of IS NULL ORDER BY a.max_activation DESC, example_id LIMIT ?)
            SELECT max_activation, {ROW_COLUMNS} FROM strongest JOIN main.examples e USING (example_id)
            LEFT JOIN base.flags f USING (content_hash) ORDER BY max_activation DESC, e.example_id""",
        [feature, limit],
    ).df()


def ranking_stored(cursor: Cursor, ranking: int) -> bool:
    """Whether the scores of a ranking are in either database."""
    return bool(only_row(cursor.execute("SELECT count(*) FROM main.rankings WHERE ranking_id = ?", [ranking]))[0])


def rows(
    cursor: Cursor, ranking: int | None, where: RowFilter, limit: int | None = None, offset: int = 0
) -> pd.DataFrame:
    """Rows that pass a filter: by rank, or in the order of the data where `ranking` is None.

    Returns:
        rank, score, percentile (with a ranking only), then the columns of the row and its flag, and (with a ranking
        only) is_query, whether it is one of the ranking's query examples, and exact, whether its score is no
        approximation.
    """
    source, condition, parameters = matching(cursor, ranking, where)
    columns = "rank, score, percentile, " if ranking is not None else ""
    more = f", {_IS_QUERY}, page.exact" if ranking is not None else ""
    wanted = "s.example_id, s.rank, s.score, s.percentile, s.exact" if ranking is not None else "e.example_id"
    order = "s.rank" if ranking is not None else "e.example_id"
    # The rows of the page are picked first: their texts are read for them alone.
    return cursor.execute(
        f"""WITH page AS MATERIALIZED (
                SELECT {wanted} FROM {source} WHERE {condition} ORDER BY {order} LIMIT ? OFFSET ?)
            SELECT {columns}{ROW_COLUMNS}{more}
            FROM page JOIN main.examples e USING (example_id) LEFT JOIN base.flags f USING (content_hash)
            ORDER BY {"page.rank" if ranking is not None else "e.example_id"}""",
        [*parameters, limit, offset, *([] if ranking is None else [ranking])],
    ).df()


def ranked_texts(cursor: Cursor, ranking: int, ranks: range) -> pd.DataFrame:
    """Rows of a ranking by their ranks, with what is written of them.

    Returns:
        rank, example_id, score, percentile, prompt, response, metadata (JSON), is_query, exact; see `rows`.
    """
    return cursor.execute(
        f"""WITH page AS MATERIALIZED (
                SELECT example_id, rank, score, percentile, exact FROM {scores_table(cursor, ranking)}
                WHERE ranking_id = ? AND rank BETWEEN ? AND ?)
            SELECT rank, e.example_id, score, percentile, e.prompt, e.response, e.metadata, {_IS_QUERY}, exact
            FROM page JOIN main.examples e USING (example_id) ORDER BY rank""",
        [ranking, ranks.start, ranks.stop - 1, ranking],
    ).df()


def snapshot(cursor: Cursor, ranking: int | None, where: RowFilter, by_rank: bool = False) -> pd.DataFrame:
    """Rows that pass a filter, with what people have said of them until now.

    Args:
        by_rank: in the order of the ranking, if there is one; otherwise in that of the data.

    Returns:
        example_id, flag, note; with a ranking rank, score, percentile. No texts: memory stays small.
    """
    source, condition, parameters = matching(cursor, ranking, where)
    scores = "rank, score, percentile, " if ranking is not None else ""
    wanted = "s.example_id, s.rank, s.score, s.percentile" if ranking is not None else "e.example_id"
    return cursor.execute(
        f"""WITH chosen AS MATERIALIZED (SELECT {wanted} FROM {source} WHERE {condition})
            SELECT c.example_id, {scores}f.flag, f.note
            FROM chosen c JOIN main.examples e USING (example_id) LEFT JOIN base.flags f USING (content_hash)
            ORDER BY {"c.rank" if by_rank and ranking is not None else "c.example_id"}""",
        parameters,
    ).df()


def rows_by_id(cursor: Cursor, example_ids: Sequence[int]) -> pd.DataFrame:
    """Rows by their ids, in the order of the data, without their flags."""
    ids = list(example_ids)
    # Rows lie in the order of their ids: the bounds tell which parts of the table need not be read at all.
    return cursor.execute(
        """SELECT example_id, content_hash, source, source_row, prompt, response, metadata FROM main.examples
           WHERE example_id BETWEEN ? AND ? AND example_id IN (SELECT unnest(?::BIGINT[])) ORDER BY example_id""",
        [min(ids, default=0), max(ids, default=-1), ids],
    ).df()


def flaggers(cursor: Cursor) -> list[dict[str, Any]]:
    """Who flagged how many rows as what."""
    found = cursor.execute(
        """SELECT flag, flagged_by, count(*) AS n_rows, max(flagged_at) FROM main.flags WHERE example_id IS NOT NULL
           GROUP BY flag, flagged_by ORDER BY flag, flagged_by"""
    ).fetchall()
    return [
        {"flag": flag, "flagged_by": who, "rows": count, "latest": latest.isoformat(timespec="seconds")}
        for flag, who, count, latest in found
    ]


def sample(cursor: Cursor, where: RowFilter, seed: str, limit: int) -> pd.DataFrame:
    """Rows that pass a filter in an order that looks random but is the same for a seed."""
    source, condition, parameters = matching(cursor, None, where)
    return cursor.execute(
        f"""WITH picked AS MATERIALIZED (
                SELECT e.example_id, md5(content_hash || ?) AS place FROM {source} WHERE {condition}
                ORDER BY place, e.example_id LIMIT ?)
            SELECT {ROW_COLUMNS} FROM picked JOIN main.examples e USING (example_id)
            LEFT JOIN base.flags f USING (content_hash) ORDER BY place, e.example_id""",
        [seed, *parameters, limit],
    ).df()


def unlabelled(
    cursor: Cursor,
    probe: str,
    where: RowFilter,
    ranking: int | None,
    kind: str,
    boundary: float,
    leave_out: Sequence[str] = (),
    limit: int = 1,
) -> pd.DataFrame:
    """The next rows to label, of those that have no label of this probe and were not skipped.

    Args:
        kind: ``likely`` (the highest score), ``unlikely`` (the lowest), ``uncertain`` (nearest to
            `boundary`), or ``shuffled``.
        leave_out: content hashes of rows that are not wanted.
    """
    source, condition, parameters = matching(cursor, ranking, where)
    one = "e.example_id" if ranking is None else "s.example_id"
    orders: dict[str, tuple[str, list[Any]]] = {
        "shuffled": ("md5(e.content_hash || ?)", [probe]),
        "likely": ("s.rank", []),
        "unlikely": ("s.rank DESC", []),
        "uncertain": ("abs(s.score - ?)", [boundary]),
    }
    order, more = orders["shuffled" if ranking is None else kind]
    # The row is picked first: no other's text is read.
    return cursor.execute(
        f"""WITH seen AS MATERIALIZED (
                SELECT example_id FROM main.examples WHERE content_hash IN (
                    SELECT content_hash FROM base.probe_examples WHERE probe = ?
                    UNION ALL SELECT content_hash FROM base.probe_skips WHERE probe = ?
                    UNION ALL SELECT unnest(?::VARCHAR[]))),
            picked AS MATERIALIZED (
                SELECT example_id, row_number() OVER () AS place FROM (
                    SELECT {one} AS example_id FROM {source}
                    WHERE {condition} AND {one} NOT IN (SELECT example_id FROM seen)
                    ORDER BY {order}, {one} LIMIT ?))
            SELECT {ROW_COLUMNS} FROM picked JOIN main.examples e USING (example_id)
            LEFT JOIN base.flags f USING (content_hash)
            QUALIFY row_number() OVER (PARTITION BY content_hash ORDER BY place) = 1
            ORDER BY place""",
        [probe, probe, list(leave_out), *parameters, *more, limit],
    ).df()


def count_rows(cursor: Cursor, ranking: int | None, where: RowFilter) -> int:
    """How many rows pass a filter."""
    source, condition, parameters = matching(cursor, ranking, where)
    return only_row(cursor.execute(f"SELECT count(*) FROM {source} WHERE {condition}", parameters))[0]


def histogram(cursor: Cursor, ranking: int, where: RowFilter, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of all rows and of those that pass a filter, counted in equal bins.

    Returns:
        edges float64 [bins + 1]; counts int64 [bins] of all rows; counts int64 [bins] of rows that pass.
    """
    low, high = only_row(
        cursor.execute("SELECT min(score), max(score) FROM main.ranking_scores WHERE ranking_id = ?", [ranking])
    )
    if low is None:
        return np.linspace(0, 1, bins + 1), np.zeros(bins, np.int64), np.zeros(bins, np.int64)
    width = (high - low) / bins or 1.0
    source, _, _ = matching(cursor, ranking, where)
    condition, parameters = where.sql("s.example_id")
    counted = cursor.execute(
        f"""SELECT least(floor((s.score - ?) / ?)::INTEGER, ?) AS bin, count(*), count(*) FILTER ({condition})
            FROM {source} WHERE s.ranking_id = ? GROUP BY bin""",
        [low, width, bins - 1, *parameters, ranking],
    ).fetchall()
    everything, passing = np.zeros(bins, np.int64), np.zeros(bins, np.int64)
    for place, total, kept in counted:
        everything[place], passing[place] = total, kept
    return low + width * np.arange(bins + 1), everything, passing


def score_summary(cursor: Cursor, ranking: int) -> dict[str, float]:
    """Mean, standard deviation and number of the scores of a ranking."""
    mean, deviation, count = only_row(
        cursor.execute(
            """SELECT avg(score), coalesce(stddev_pop(score), 0), count(*)
           FROM main.ranking_scores WHERE ranking_id = ?""",
            [ranking],
        )
    )
    return {"mean": mean or 0.0, "deviation": deviation, "count": count}


def content_hashes(cursor: Cursor) -> Iterator[tuple[str, int]]:
    """The content hash and the id of every row, in the order of the data, as they are read."""
    found = cursor.execute("SELECT content_hash, example_id FROM main.examples ORDER BY example_id")
    while part := found.fetchmany(FETCHED_AT_ONCE):
        yield from part


def find_rows(cursor: Cursor, content_hashes: Sequence[str]) -> dict[str, int]:
    """content_hash → the id of the first row with that content, for those that the data set has."""
    found = cursor.execute(
        """SELECT content_hash, min(example_id) FROM main.examples
           WHERE content_hash IN (SELECT unnest(?::VARCHAR[])) GROUP BY content_hash""",
        [list(content_hashes)],
    ).fetchall()
    return dict(found)


def rows_with(cursor: Cursor, content_hashes: Sequence[str]) -> dict[str, list[int]]:
    """content_hash → the ids of all rows with that content, for those that the data set has."""
    found = cursor.execute(
        """SELECT content_hash, list(example_id ORDER BY example_id) FROM main.examples
           WHERE content_hash IN (SELECT unnest(?::VARCHAR[])) GROUP BY content_hash""",
        [list(content_hashes)],
    ).fetchall()
    return dict(found)


def matching(cursor: Cursor, ranking: int | None, where: RowFilter) -> tuple[str, str, list[Any]]:
    """The rows that pass a filter, as a FROM clause, a condition and its parameters (the ranking's first).

    ``s`` are the scores, where there is a ranking; ``e`` the rows and ``f`` their flags, where the filter
    asks for them, or where there is no ranking.
    """
    condition, parameters = where.sql("e.example_id" if ranking is None else "s.example_id")
    if ranking is None:
        return "main.examples e LEFT JOIN base.flags f USING (content_hash)", condition, parameters
    source = f"{scores_table(cursor, ranking)} s"
    if where.needs_rows:
        source += " JOIN main.examples e ON e.example_id = s.example_id"
    if where.needs_flags:
        source += f" LEFT JOIN {FLAGGED_ROWS} f ON f.example_id = s.example_id"
    return source, f"s.ranking_id = ? AND {condition}", [ranking, *parameters]
