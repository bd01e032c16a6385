"""Tables and views of an audit's three databases, apart by what can be made again.

``audit.duckdb`` is what the build found, and ``derived.duckdb`` what was computed on demand: a command makes
either again. ``workspace.duckdb`` is what people did, which nothing can make again; the files hang on it and it
on neither.

Tables live in the schema ``base`` and may change from version to version; the views in ``main`` are the contract
that any DuckDB client may rely on. ``audit.duckdb`` stands by itself. The views of ``workspace.duckdb`` join all
three, so it wants the others attached under their names; without ``derived`` all but ``scores`` can be asked::

    duckdb -readonly cache/demo/workspace.duckdb
    ATTACH 'cache/demo/audit.duckdb' AS audit (READ_ONLY);
    ATTACH 'cache/demo/derived.duckdb' AS derived (READ_ONLY);
    SELECT * FROM scores WHERE concept_id = 'probe:flattery' ORDER BY rank LIMIT 10;
"""

from __future__ import annotations

from concept_audit.store.evidence import EVIDENCE_TABLES

FORMAT = 2
"""Of ``audit.duckdb``; another one has to be built anew."""
WORKSPACE_FORMAT = 5
"""Of ``workspace.duckdb``; an older one is brought here step by step: see `concept_audit.store.migrations`."""
DERIVED_FORMAT = 2
"""Of ``derived.duckdb``; an older one is brought here too, one of a newer version is thrown away."""
STORAGE = "v1.4.0"
"""DuckDB's storage version of new files: the oldest DuckDB that may be installed reads them."""

AUDIT_TABLES = """
CREATE SCHEMA base;
CREATE TABLE base.meta (key VARCHAR PRIMARY KEY, value VARCHAR NOT NULL);
CREATE TABLE base.examples (
    example_id BIGINT NOT NULL, content_hash VARCHAR NOT NULL, source VARCHAR NOT NULL,
    source_row BIGINT NOT NULL, prompt VARCHAR NOT NULL, response VARCHAR NOT NULL,
    n_tokens INTEGER NOT NULL, metadata JSON NOT NULL, messages JSON NOT NULL,
    n_response_tokens INTEGER NOT NULL, truncated BOOLEAN NOT NULL, duplicate_of BIGINT);
CREATE TABLE base.skipped_rows (
    place BIGINT NOT NULL, source VARCHAR NOT NULL, source_row BIGINT NOT NULL, reason VARCHAR NOT NULL);
CREATE TABLE base.rollouts (
    example_id BIGINT NOT NULL, group_id BIGINT NOT NULL, reward DOUBLE, advantage DOUBLE NOT NULL);
CREATE TABLE base.windows (
    example_id BIGINT NOT NULL, document BIGINT NOT NULL, window_number BIGINT NOT NULL, n_windows BIGINT NOT NULL,
    first_character BIGINT NOT NULL, end_character BIGINT NOT NULL, n_predicted INTEGER NOT NULL,
    n_content INTEGER NOT NULL);
CREATE TABLE base.metadata_fields (
    field VARCHAR NOT NULL, n_rows BIGINT NOT NULL, n_values BIGINT NOT NULL, top_values VARCHAR[] NOT NULL);
CREATE TABLE base.layers (layer INTEGER NOT NULL, mean FLOAT[] NOT NULL, spread FLOAT[] NOT NULL);
CREATE TABLE base.sae_features (
    feature_id INTEGER NOT NULL, label VARCHAR NOT NULL, density DOUBLE NOT NULL,
    max_activation FLOAT NOT NULL, mean_activation FLOAT NOT NULL, n_examples BIGINT NOT NULL,
    top_tokens VARCHAR[] NOT NULL, layer INTEGER NOT NULL, direction FLOAT[] NOT NULL,
    promoted VARCHAR[] NOT NULL, suppressed VARCHAR[] NOT NULL, histogram BIGINT[] NOT NULL);
CREATE TABLE base.feature_activations (
    feature_id INTEGER NOT NULL, example_id BIGINT NOT NULL, max_activation FLOAT NOT NULL,
    mean_activation FLOAT NOT NULL, token_position INTEGER NOT NULL);
CREATE TABLE base.rankings (
    ranking_id BIGINT NOT NULL, concept_id VARCHAR NOT NULL, version INTEGER NOT NULL,
    method VARCHAR NOT NULL, parameters JSON NOT NULL);
CREATE TABLE base.ranking_scores (
    ranking_id BIGINT NOT NULL, example_id BIGINT NOT NULL, score DOUBLE NOT NULL,
    rank BIGINT NOT NULL, percentile DOUBLE NOT NULL);
"""

AUDIT_VIEWS = """
CREATE VIEW main.examples AS
    SELECT example_id, content_hash, source, source_row, prompt, response, n_tokens, metadata,
           messages, n_response_tokens, truncated, duplicate_of
    FROM base.examples;
CREATE VIEW main.skipped_rows AS SELECT source, source_row, reason FROM base.skipped_rows ORDER BY place;
CREATE VIEW main.rollouts AS SELECT example_id, group_id, reward, advantage FROM base.rollouts;
CREATE VIEW main.windows AS
    SELECT example_id, document, window_number, n_windows, first_character, end_character FROM base.windows;
CREATE VIEW main.concepts AS
    SELECT 'sae:' || feature_id AS concept_id, 'feature ' || feature_id AS name, 'sae_feature' AS kind,
           layer, direction, label, 1 AS version, '{}'::JSON AS details
    FROM base.sae_features;
CREATE VIEW main.scores AS
    SELECT r.concept_id, r.method, s.example_id, s.score, s.rank, s.percentile, r.parameters, s.ranking_id,
           coalesce(list_contains(from_json(r.parameters->'query_rows', '["BIGINT"]'), s.example_id), false) AS is_query,
           true AS exact
    FROM base.ranking_scores s JOIN base.rankings r USING (ranking_id);
CREATE VIEW main.sae_features AS
    SELECT feature_id, label, density, max_activation, top_tokens, mean_activation, n_examples, layer,
           promoted, suppressed, histogram
    FROM base.sae_features;
CREATE VIEW main.feature_activations AS
    SELECT feature_id, example_id, max_activation, mean_activation, token_position
    FROM base.feature_activations;
"""

PEOPLES_TABLES = """
CREATE SCHEMA base;
CREATE TABLE base.meta (key VARCHAR PRIMARY KEY, value VARCHAR NOT NULL);
CREATE TABLE base.probes (
    name VARCHAR PRIMARY KEY, version INTEGER NOT NULL, layer INTEGER NOT NULL, fit VARCHAR NOT NULL,
    direction FLOAT[] NOT NULL, details JSON NOT NULL, model_fingerprint VARCHAR NOT NULL,
    trained_at TIMESTAMP NOT NULL);
CREATE TABLE base.probe_versions (
    name VARCHAR NOT NULL, version INTEGER NOT NULL, layer INTEGER NOT NULL, fit VARCHAR NOT NULL,
    direction FLOAT[] NOT NULL, details JSON NOT NULL, model_fingerprint VARCHAR NOT NULL,
    trained_at TIMESTAMP NOT NULL, PRIMARY KEY (name, version));
CREATE TABLE base.probe_trainings (
    name VARCHAR NOT NULL, version INTEGER NOT NULL, direction VARCHAR NOT NULL, PRIMARY KEY (name, version));
CREATE TABLE base.probe_examples (
    probe VARCHAR NOT NULL, content_hash VARCHAR NOT NULL, messages JSON NOT NULL, label TINYINT NOT NULL,
    labelled_at TIMESTAMP NOT NULL, PRIMARY KEY (probe, content_hash));
CREATE TABLE base.probe_skips (
    probe VARCHAR NOT NULL, content_hash VARCHAR NOT NULL, PRIMARY KEY (probe, content_hash));
CREATE TABLE base.flags (
    content_hash VARCHAR PRIMARY KEY, flag VARCHAR NOT NULL, note VARCHAR NOT NULL,
    flagged_by VARCHAR NOT NULL, flagged_at TIMESTAMP NOT NULL);
CREATE TABLE base.flag_log (
    event_id BIGINT PRIMARY KEY, action VARCHAR NOT NULL, note VARCHAR NOT NULL, n_texts BIGINT NOT NULL,
    how VARCHAR NOT NULL, undoes BIGINT, made_by VARCHAR NOT NULL, made_at TIMESTAMP NOT NULL);
CREATE TABLE base.flag_changes (
    event_id BIGINT NOT NULL, content_hash VARCHAR NOT NULL, before STRUCT(
        flag VARCHAR, note VARCHAR, flagged_by VARCHAR, flagged_at TIMESTAMP), after STRUCT(
        flag VARCHAR, note VARCHAR, flagged_by VARCHAR, flagged_at TIMESTAMP));
CREATE TABLE base.saved_views (
    name VARCHAR PRIMARY KEY, page VARCHAR NOT NULL, query VARCHAR NOT NULL, saved_by VARCHAR NOT NULL,
    saved_at TIMESTAMP NOT NULL);
CREATE TABLE base.feature_labels (
    sae VARCHAR NOT NULL, feature_id INTEGER NOT NULL, label VARCHAR NOT NULL, labelled_by VARCHAR NOT NULL,
    labelled_at TIMESTAMP NOT NULL, PRIMARY KEY (sae, feature_id));
CREATE TABLE base.made_labels (
    sae VARCHAR NOT NULL, feature_id INTEGER NOT NULL, origin VARCHAR NOT NULL, label VARCHAR NOT NULL,
    maker VARCHAR NOT NULL, score DOUBLE, low DOUBLE, high DOUBLE, n INTEGER NOT NULL, snippet VARCHAR NOT NULL,
    build_id VARCHAR NOT NULL, made_at TIMESTAMP NOT NULL, PRIMARY KEY (sae, feature_id, origin));
"""
"""Of ``base.probe_trainings`` no row ever goes: a version never comes again for a name, whatever is deleted."""
WORKSPACE_TABLES = PEOPLES_TABLES + EVIDENCE_TABLES

DERIVED_TABLES = """
CREATE SCHEMA base;
CREATE TABLE base.meta (key VARCHAR PRIMARY KEY, value VARCHAR NOT NULL);
CREATE TABLE base.rankings (
    ranking_id BIGINT PRIMARY KEY, build_id VARCHAR NOT NULL, concept_id VARCHAR NOT NULL,
    version INTEGER NOT NULL, direction VARCHAR NOT NULL, method VARCHAR NOT NULL, parameters JSON NOT NULL,
    used TIMESTAMP NOT NULL);
CREATE TABLE base.ranking_scores (
    ranking_id BIGINT NOT NULL, example_id BIGINT NOT NULL, score DOUBLE NOT NULL,
    rank BIGINT NOT NULL, percentile DOUBLE NOT NULL, exact BOOLEAN NOT NULL DEFAULT true);
CREATE TABLE base.refinements (ranking_id BIGINT PRIMARY KEY, details JSON NOT NULL);
CREATE TABLE base.row_activations (
    content_hash VARCHAR NOT NULL, model_fingerprint VARCHAR NOT NULL, layer INTEGER NOT NULL,
    activation FLOAT[] NOT NULL, used TIMESTAMP NOT NULL, PRIMARY KEY (content_hash, model_fingerprint, layer));
CREATE TABLE base.token_projections (
    content_hash VARCHAR NOT NULL, direction_hash VARCHAR NOT NULL, values FLOAT[] NOT NULL,
    used TIMESTAMP NOT NULL, PRIMARY KEY (content_hash, direction_hash));
CREATE TABLE base.own_answers (
    content_hash VARCHAR NOT NULL, model_fingerprint VARCHAR NOT NULL, answer VARCHAR NOT NULL,
    used TIMESTAMP NOT NULL, PRIMARY KEY (content_hash, model_fingerprint));
"""
"""``used``: when it was last asked for; what has not been for longest goes first. ``refinements`` say how far the
exact scores of a ranking from the gradient index are, and what they tell of it."""

WORKSPACE_VIEWS = """
CREATE OR REPLACE VIEW main.examples AS SELECT * FROM audit.main.examples;
CREATE OR REPLACE VIEW main.feature_labels AS
    SELECT feature_id, label, origin, maker, score, low, high, n, snippet, made_at, row_number() OVER (
        PARTITION BY feature_id ORDER BY CASE WHEN origin = 'words' AND score < tokens_score THEN 6
            ELSE list_position(['person', 'endpoint', 'import', 'words', 'tokens'], origin) END) AS place
    FROM (
        SELECT *, max(score) FILTER (origin = 'tokens') OVER (PARTITION BY feature_id) AS tokens_score FROM (
            SELECT feature_id, label, 'person' AS origin, labelled_by AS maker, NULL::DOUBLE AS score,
                   NULL::DOUBLE AS low, NULL::DOUBLE AS high, 0 AS n, '' AS snippet, labelled_at AS made_at
            FROM base.feature_labels WHERE sae = (SELECT value FROM audit.base.meta WHERE key = 'sae')
            UNION ALL
            SELECT feature_id, label, origin, maker, score, low, high, n, snippet, made_at FROM base.made_labels
            WHERE sae = (SELECT value FROM audit.base.meta WHERE key = 'sae') AND (origin IN ('endpoint', 'import')
                OR build_id = (SELECT value FROM audit.base.meta WHERE key = 'build_id'))));
CREATE OR REPLACE VIEW main.sae_features AS
    SELECT feature_id, coalesce(l.label, f.label) AS label, density, max_activation, top_tokens,
           mean_activation, n_examples, layer, promoted, suppressed, histogram,
           coalesce(l.origin, 'tokens') AS label_origin, l.score AS label_score
    FROM audit.main.sae_features f LEFT JOIN (
        SELECT feature_id, label, origin, score FROM main.feature_labels WHERE place = 1) l USING (feature_id);
CREATE OR REPLACE VIEW main.feature_activations AS SELECT * FROM audit.main.feature_activations;
CREATE OR REPLACE VIEW main.concepts AS
    SELECT concept_id, name, kind, c.layer, direction, f.label, version, details
    FROM audit.main.concepts c JOIN main.sae_features f ON c.concept_id = 'sae:' || f.feature_id
    UNION ALL
    SELECT 'probe:' || name, name, 'probe', layer, direction, name, version, details FROM base.probes;
CREATE OR REPLACE VIEW main.rankings AS
    SELECT ranking_id, concept_id, version, method, parameters FROM audit.base.rankings
    UNION ALL
    SELECT ranking_id, concept_id, version, method, parameters FROM derived.base.rankings r
    WHERE build_id = (SELECT value FROM audit.base.meta WHERE key = 'build_id')
      AND (NOT starts_with(concept_id, 'probe:') OR EXISTS (
          SELECT 1 FROM base.probes p JOIN base.probe_trainings t USING (name, version)
          WHERE 'probe:' || p.name = r.concept_id AND p.version = r.version AND t.direction = r.direction));
CREATE OR REPLACE VIEW main.ranking_scores AS
    SELECT ranking_id, example_id, score, rank, percentile, true AS exact FROM audit.base.ranking_scores
    UNION ALL
    SELECT ranking_id, example_id, score, rank, percentile, exact FROM derived.base.ranking_scores;
CREATE OR REPLACE VIEW main.scores AS
    SELECT r.concept_id, r.method, s.example_id, s.score, s.rank, s.percentile, r.parameters, s.ranking_id,
           coalesce(list_contains(from_json(r.parameters->'query_rows', '["BIGINT"]'), s.example_id), false) AS is_query,
           s.exact
    FROM main.ranking_scores s JOIN main.rankings r USING (ranking_id);
CREATE OR REPLACE VIEW main.flags AS
    SELECT f.content_hash, e.example_id, f.flag, f.note, f.flagged_by, f.flagged_at
    FROM base.flags f LEFT JOIN audit.main.examples e USING (content_hash);
CREATE OR REPLACE VIEW main.flag_log AS
    SELECT event_id, action, note, n_texts, how, undoes, made_by, made_at FROM base.flag_log;
"""
"""Of a probe's rankings, those of its present training alone: no row has two ranks."""

CONTRACT_VIEWS = ("examples", "concepts", "scores", "sae_features", "feature_activations", "flags")
