"""From shards to ``audit.duckdb``, in one step that either happens or does not.

The database is written beside its place and renamed at the end. Rows go in a shard
at a time and rankings a group of features at a time, so memory does not grow with
the data; DuckDB spills what it must sort beyond its limit.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from concept_audit.files import atomic_write, remove
from concept_audit.progress import Progress, Stage
from concept_audit.store import schema
from concept_audit.store.activations import read_means
from concept_audit.store.cursor import Cursor, only_row
from concept_audit.store.database_files import quoted
from concept_audit.store.documents import insert_windows, with_numbers
from concept_audit.store.examples import read_skipped
from concept_audit.store.features import feature_activation
from concept_audit.store.layout import Layout
from concept_audit.store.manifest import Manifest
from concept_audit.store.rankings import insert_scores, ranking_id
from concept_audit.store.rollouts import advantages, insert_rollouts, with_weights
from concept_audit.store.shard_store import RowShards
from concept_audit.types import Method, Rollouts, methods_of

LEAST_MEMORY = 384 << 20
THREAD_MEMORY = 192 << 20
"""Each thread sorts in memory of its own: no more of them than share the limit well."""
CELLS_AT_ONCE = 400_000
VALUES_COUNTED = 1000
TOP_TOKENS = 8
HISTOGRAM_BINS = 24
"""Of the activations of a feature, up to its highest."""
LEVELS_PER_E = 64.0

Scorer = Callable[[np.ndarray], np.ndarray]
"""Directions float32 [d_model, concepts] → scores float64 [rows, concepts]."""


@dataclass(frozen=True)
class SaeDirections:
    """What the store needs to know of a sparse autoencoder.

    Attributes:
        layer: where it reads the residual stream.
        directions: float32 [features, d_model], unit decoder directions.
        fingerprint: of the SAE.
        promoted, suppressed: of each feature, the tokens that its direction makes more, and less, likely.
        token_text: token id → its text.
        score: the method that ranks its features.
        score_cells: how many scores (rows × features) are computed now; beyond, on demand.
    """

    layer: int
    directions: np.ndarray
    fingerprint: str
    promoted: Sequence[Sequence[str]]
    suppressed: Sequence[Sequence[str]]
    token_text: Callable[[int], str]
    score: Scorer
    score_cells: int


def assemble(
    layout: Layout,
    manifest: Manifest,
    build_id: str,
    layers: Sequence[int],
    sae: SaeDirections | None,
    progress: Progress,
    memory: int = LEAST_MEMORY,
) -> dict[str, int] | None:
    """Write ``audit.duckdb`` from the shards.

    Args:
        manifest: says which shards are this build's.
        layers: those whose mean response activations are in the shards.
        memory: bytes that DuckDB may take to sort and to keep; no less than `LEAST_MEMORY` is of use.

    Returns:
        counts of the groups of rollouts, see `insert_rollouts`; None where rows are none.

    Raises:
        StoreError: the disk is full.
    """
    rows, tokens, means = (manifest.shards(layout, kind) for kind in ("rows", "tokens", "activations"))
    rollouts, groups = manifest.rollouts, None
    with atomic_write(layout.audit) as partial:
        con = duckdb.connect(str(partial), config={"storage_compatibility_version": schema.STORAGE})
        try:
            limit(con, memory)
            con.execute("SET temp_directory = ?", [f"{partial}.tmp"])
            con.execute(schema.AUDIT_TABLES)
            con.execute("INSERT INTO base.meta VALUES ('format', ?), ('build_id', ?)", [str(schema.FORMAT), build_id])
            if rollouts is not None:
                with progress.stage("Advantages of rollouts in their groups", len(rows.partition), "shards") as stage:
                    groups = insert_rollouts(con, rows, rollouts, stage)
            with progress.stage("Writing rows to the store", len(rows.partition), "shards") as stage:
                _insert_examples(con, rows, tokens, manifest, stage)
            _insert_layers(con, means, layers)
            if sae is not None:
                con.execute("INSERT INTO base.meta VALUES ('sae', ?)", [sae.fingerprint])
                features = manifest.shards(layout, "features")
                with progress.stage("Writing SAE features to the store", len(rows.partition), "shards") as stage:
                    _insert_features(con, features, tokens, sae, partial.with_name(f"{partial.name}.unsorted"), stage)
            con.execute(schema.AUDIT_VIEWS)
            if sae is not None:
                of_pairs = manifest.pair is not None
                _insert_rankings(con, build_id, sae, methods_of("sae_feature", of_pairs), rollouts, progress)
            con.execute("CHECKPOINT")
        finally:
            con.close()
            for leftover in partial.parent.glob(partial.name + ".*"):
                remove(leftover)
    return groups


def limit(con: Cursor, memory: int) -> None:
    """Have DuckDB take no more than so many bytes, or `LEAST_MEMORY`, and as many threads as do well with that."""
    memory = max(memory, LEAST_MEMORY)
    con.execute(f"SET memory_limit = '{memory}B'")
    con.execute(f"SET threads = {min(os.cpu_count() or 1, memory // THREAD_MEMORY)}")


def _insert_examples(con: Cursor, rows: RowShards, tokens: RowShards, manifest: Manifest, stage: Stage) -> None:
    split = manifest.document is not None
    metadata, joined = (with_numbers() if split else "metadata"), ""
    if manifest.rollouts is not None:
        metadata, joined = with_weights(manifest.rollouts)
    fields: dict[str, Counter[str]] = {}
    rows_with: Counter[str] = Counter()
    for number in rows.numbers():
        shard = str(rows.complete(number))
        con.execute(
            f"""INSERT INTO base.examples
                SELECT example_id, r.content_hash, source, source_row, prompt, response, n_tokens, {metadata},
                       messages, n_response_tokens, truncated, NULL
                FROM read_parquet(?) r JOIN read_parquet(?) t USING (example_id) {joined} ORDER BY example_id""",
            [shard, str(tokens.complete(number))],
        )
        if split:
            insert_windows(con, shard, str(tokens.complete(number)))
        span = rows.partition.span(number)
        kept = "SELECT metadata FROM base.examples WHERE example_id BETWEEN ? AND ? ORDER BY example_id"
        for (text,) in con.execute(kept, [span.start, span.stop - 1]).fetchall():
            _count_values(json.loads(text), fields, rows_with)
        for row in read_skipped(rows, number):
            con.execute("INSERT INTO base.skipped_rows VALUES (?, ?, ?, ?)", list(astuple(row)))
        stage.advance()
    con.execute(
        """UPDATE base.examples SET duplicate_of = first.example_id
           FROM (SELECT content_hash, min(example_id) AS example_id FROM base.examples
                 GROUP BY content_hash HAVING count(*) > 1) AS first
           WHERE examples.content_hash = first.content_hash AND examples.example_id > first.example_id"""
    )
    for name, values in fields.items():
        top = [value for value, _ in values.most_common(50)]
        con.execute("INSERT INTO base.metadata_fields VALUES (?, ?, ?, ?)", [name, rows_with[name], len(values), top])


def _count_values(metadata: Mapping[str, object], fields: dict[str, Counter[str]], rows_with: Counter[str]) -> None:
    for name, value in metadata.items():
        counted = fields.setdefault(name, Counter())
        if value is None:
            continue
        rows_with[name] += 1
        # The text that DuckDB's json_extract_string gives, which filters compare with.
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        # A field of free text has as many values as rows: stop telling them apart.
        if text in counted or len(counted) < VALUES_COUNTED:
            counted[text] += 1


def _insert_layers(con: Cursor, means: RowShards, layers: Sequence[int]) -> None:
    """Mean and standard deviation of each dimension over the rows, at each layer."""
    for layer in layers:
        count = 0
        total = squares = np.zeros(())
        for block in read_means(means, layer):
            scored = block[~np.isnan(block).any(1)].astype(np.float64)
            count, total, squares = count + len(scored), total + scored.sum(0), squares + (scored**2).sum(0)
        if count:
            mean = total / count
            spread = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
            con.execute("INSERT INTO base.layers VALUES (?, ?, ?)", [layer, mean.tolist(), spread.tolist()])


def _insert_features(
    con: Cursor, features: RowShards, tokens: RowShards, sae: SaeDirections, scratch: Path, stage: Stage
) -> None:
    """Fill the tables of SAE features.

    Args:
        scratch: a file for activations as they come from the shards. Sorted across all of them, what a page asks of a
            feature lies together, and is found without a look at every shard's part.
    """
    con.execute(f"ATTACH {quoted(scratch)} AS scratch (STORAGE_VERSION '{schema.STORAGE}')")
    con.execute("CREATE TABLE scratch.unsorted AS SELECT * FROM base.feature_activations LIMIT 0")
    con.execute("CREATE TEMP TABLE totals (feature_id INTEGER, token_id INTEGER, total DOUBLE, firings BIGINT)")
    # Activations on a logarithmic scale, since a feature's highest is known only at the end.
    con.execute("CREATE TEMP TABLE levels (feature_id INTEGER, level BIGINT, firings BIGINT)")
    con.execute("CREATE TEMP TABLE tokens (token_id INTEGER, occurrences BIGINT)")
    for number in features.numbers():
        shard, rows = str(features.complete(number)), str(tokens.complete(number))
        con.execute(
            """INSERT INTO scratch.unsorted
               SELECT feature_id, f.example_id, max(activation), sum(activation) / any_value(n.content),
                      arg_max(token_position, activation)
               FROM read_parquet($1) f JOIN (
                   SELECT example_id, len(list_filter(parts, lambda p: p = 2)) AS content FROM read_parquet($2)
               ) n USING (example_id)
               GROUP BY feature_id, f.example_id""",
            [shard, rows],
        )
        con.execute(
            """INSERT INTO totals SELECT feature_id, token_id, sum(activation), count(*)
               FROM read_parquet(?) GROUP BY feature_id, token_id""",
            [shard],
        )
        con.execute(
            """INSERT INTO levels SELECT feature_id, floor(ln(activation) * $2)::BIGINT AS level, count(*)
               FROM read_parquet($1) WHERE activation > 0 GROUP BY ALL""",
            [shard, LEVELS_PER_E],
        )
        con.execute(
            """INSERT INTO tokens SELECT token_id, count(*) FROM (
                   SELECT unnest(input_ids) AS token_id, unnest(parts) AS part FROM read_parquet(?)
               ) WHERE part = 2 GROUP BY token_id""",
            [rows],
        )
        stage.advance()
    con.execute("INSERT INTO base.feature_activations SELECT * FROM scratch.unsorted ORDER BY feature_id, example_id")
    con.execute("DETACH scratch")
    _insert_feature_table(con, sae)


def _insert_feature_table(con: Cursor, sae: SaeDirections) -> None:
    # A token stands for a feature if the feature fires strongly whenever the token
    # comes: the mean over its occurrences, shrunk so that a single one counts little.
    top = con.execute(
        """WITH sums AS (SELECT feature_id, token_id, sum(total) AS total FROM totals GROUP BY ALL),
                seen AS (SELECT token_id, sum(occurrences) AS occurrences FROM tokens GROUP BY ALL),
                placed AS (
                    SELECT feature_id, token_id, row_number() OVER (
                        PARTITION BY feature_id ORDER BY total / (occurrences + 2) DESC, token_id) AS place
                    FROM sums JOIN seen USING (token_id) QUALIFY place <= ?)
           SELECT feature_id, list(token_id ORDER BY place) FROM placed GROUP BY feature_id""",
        [TOP_TOKENS * 2],
    ).fetchall()
    firing = con.execute(
        """SELECT feature_id, max(m), sum(total) / sum(firings), sum(firings)
           FROM (SELECT feature_id, sum(total) AS total, sum(firings) AS firings FROM totals GROUP BY feature_id)
           JOIN (SELECT feature_id, max(max_activation) AS m FROM base.feature_activations GROUP BY feature_id)
           USING (feature_id) GROUP BY feature_id"""
    ).fetchall()
    n_examples = dict(
        con.execute("SELECT feature_id, count(*) FROM base.feature_activations GROUP BY feature_id").fetchall()
    )
    n_tokens = only_row(con.execute("SELECT coalesce(sum(occurrences), 0) FROM tokens"))[0] or 1
    tokens_of = dict(top)
    fired = {feature: values for feature, *values in firing}
    histograms = _histograms(con)
    records, counts = [], []
    for feature in range(len(sae.directions)):
        highest, mean, firings = fired.get(feature, (0.0, 0.0, 0))
        texts = _distinct_texts([sae.token_text(t) for t in tokens_of.get(feature, [])])
        label = _label(texts, sae.promoted[feature], fires=highest > 0)
        found_in = n_examples.get(feature, 0)
        records.append((feature, label, float(firings / n_tokens), highest, mean, found_in, texts, sae.layer))
        bins = histograms.get(feature, [])
        counts.append([dict(bins).get(place, 0) for place in range(HISTOGRAM_BINS)])
    names = ("feature_id", "label", "density", "max", "mean", "n_examples", "top_tokens", "layer")
    columns = {name: list(values) for name, values in zip(names, zip(*records, strict=True), strict=True)}
    columns["top_tokens"] = pa.array(columns["top_tokens"], pa.list_(pa.string()))
    width = sae.directions.shape[1]
    columns["direction"] = pa.FixedSizeListArray.from_arrays(pa.array(sae.directions.reshape(-1)), width)
    strings = pa.list_(pa.string())
    columns["promoted"] = pa.array([list(tokens) for tokens in sae.promoted], strings)
    columns["suppressed"] = pa.array([list(tokens) for tokens in sae.suppressed], strings)
    columns["histogram"] = pa.array(counts, pa.list_(pa.int64()))
    found = pa.table(columns)  # noqa: F841 - DuckDB finds it by its name
    con.execute("INSERT INTO base.sae_features SELECT * FROM found ORDER BY feature_id")
    con.execute("DROP TABLE totals")
    con.execute("DROP TABLE levels")
    con.execute("DROP TABLE tokens")


def _label(tokens: Sequence[str], promoted: Sequence[str], fires: bool) -> str:
    """A short name: the tokens that a feature fires on, those first that it also makes more likely."""
    also = {token.strip().lower() for token in promoted}
    chosen = sorted(tokens, key=lambda token: token.strip().lower() not in also)[:3]
    return " · ".join(token.strip() for token in chosen) or ("white space" if fires else "never fires on this data")


def _histograms(con: Cursor) -> dict[int, list[tuple[int, int]]]:
    """Feature → (bin, tokens) of its activations, in `HISTOGRAM_BINS` equal bins up to its highest."""
    found = con.execute(
        """SELECT feature_id, list((bin, n)) FROM (
               SELECT feature_id, least(floor(exp((level + 0.5) / $2) / m * $1)::INTEGER, $1 - 1) AS bin, sum(firings) AS n
               FROM levels JOIN (
                   SELECT feature_id, max(max_activation) AS m FROM base.feature_activations GROUP BY feature_id
               ) USING (feature_id) GROUP BY ALL
           ) GROUP BY feature_id""",
        [HISTOGRAM_BINS, LEVELS_PER_E],
    ).fetchall()
    return {feature: [(int(place), int(n)) for place, n in bins] for feature, bins in found}


def _distinct_texts(texts: Sequence[str]) -> list[str]:
    """The first `TOP_TOKENS` that differ by more than case and space; tokens without a visible sign go last."""
    kept: dict[str, str] = {}
    for text in sorted(texts, key=lambda t: not t.strip()):
        kept.setdefault(text.strip().lower(), text)
    return list(kept.values())[:TOP_TOKENS]


def _insert_rankings(
    con: Cursor,
    build_id: str,
    sae: SaeDirections,
    methods: Sequence[Method],
    rollouts: Rollouts | None,
    progress: Progress,
) -> None:
    n_rows = only_row(con.execute("SELECT count(*) FROM base.examples"))[0]
    live = [
        f for (f,) in con.execute("SELECT feature_id FROM base.sae_features WHERE density > 0 ORDER BY 1").fetchall()
    ]
    if n_rows * len(live) > sae.score_cells:
        progress.say(f"{len(live):,} SAE features × {n_rows:,} rows: features are ranked on demand instead of now")
        return
    parameters = {} if rollouts is None else rollouts.parameters()
    weights = 1.0 if rollouts is None else advantages(con, "base.rollouts")[:, None]
    group = max(1, CELLS_AT_ONCE // max(n_rows, 1))
    with progress.stage("Ranking rows by SAE feature", len(live), "features") as stage:
        for start in range(0, len(live), group):
            chosen = live[start : start + group]
            scored: dict[Method, np.ndarray] = {"vector_filter": sae.score(sae.directions[chosen].T)}
            if "feature_activation" in methods:
                scored["feature_activation"] = feature_activation(con, chosen)
            for method, scores in scored.items():
                _insert_ranking(con, build_id, method, chosen, parameters, scores * weights + 0.0)
            stage.advance(len(chosen))


def _insert_ranking(
    con: Cursor,
    build_id: str,
    method: Method,
    features: Sequence[int],
    parameters: Mapping[str, object],
    scores: np.ndarray,
) -> None:
    """Rank the rows by a method of several features: scores float64 [rows, features]."""
    ids = [ranking_id(build_id, f"sae:{feature}", 1, method, parameters) for feature in features]
    named = pa.table({"ranking_id": ids, "feature_id": features})  # noqa: F841 - DuckDB finds it by its name
    con.execute(
        "INSERT INTO base.rankings SELECT ranking_id, 'sae:' || feature_id, 1, ?, ? FROM named",
        [method, json.dumps(parameters)],
    )
    insert_scores(con, np.array(ids, np.int64), scores)
