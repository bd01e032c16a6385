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

CREATE TABLE base.evidence (
    evidence_id VARCHAR PRIMARY KEY, build_id VARCHAR NOT NULL, concept_id VARCHAR NOT NULL,
    version INTEGER NOT NULL, number INTEGER NOT NULL, about JSON NOT NULL);
CREATE TABLE base.evidence_runs (
    evidence_id VARCHAR NOT NULL, kind VARCHAR NOT NULL, method VARCHAR NOT NULL, share DOUBLE NOT NULL,
    number INTEGER NOT NULL, seed INTEGER NOT NULL, n_rows INTEGER NOT NULL, own DOUBLE, text DOUBLE,
    shown DOUBLE, preference DOUBLE, loss DOUBLE, judge DOUBLE);
CREATE TABLE base.evidence_results (
    evidence_id VARCHAR NOT NULL, measure VARCHAR NOT NULL, quantity VARCHAR NOT NULL, method VARCHAR NOT NULL,
    other VARCHAR NOT NULL, share DOUBLE NOT NULL, estimate DOUBLE, low DOUBLE, high DOUBLE, p DOUBLE,
    n INTEGER NOT NULL);
CREATE TABLE base.evidence_scores (
    evidence_id VARCHAR NOT NULL, method VARCHAR NOT NULL, example_id BIGINT NOT NULL, score DOUBLE,
    label TINYINT, percentile_low DOUBLE, percentile_high DOUBLE);
CREATE OR REPLACE VIEW main.examples AS SELECT * FROM audit.main.examples;
CREATE OR REPLACE VIEW main.sae_features AS
    SELECT feature_id, coalesce(l.label, f.label) AS label, density, max_activation, top_tokens,
           mean_activation, n_examples, layer, promoted, suppressed, histogram
    FROM audit.main.sae_features f LEFT JOIN (
        SELECT feature_id, label FROM base.feature_labels
        WHERE sae = (SELECT value FROM audit.base.meta WHERE key = 'sae')) l USING (feature_id);
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
    SELECT ranking_id, example_id, score, rank, percentile FROM audit.base.ranking_scores
    UNION ALL
    SELECT ranking_id, example_id, score, rank, percentile FROM derived.base.ranking_scores;
CREATE OR REPLACE VIEW main.scores AS
    SELECT r.concept_id, r.method, s.example_id, s.score, s.rank, s.percentile, r.parameters, s.ranking_id,
           coalesce(list_contains(from_json(r.parameters->'query_rows', '["BIGINT"]'), s.example_id), false) AS is_query
    FROM main.ranking_scores s JOIN main.rankings r USING (ranking_id);
CREATE OR REPLACE VIEW main.flags AS
    SELECT f.content_hash, e.example_id, f.flag, f.note, f.flagged_by, f.flagged_at
    FROM base.flags f LEFT JOIN audit.main.examples e USING (content_hash);
CREATE OR REPLACE VIEW main.flag_log AS
    SELECT event_id, action, note, n_texts, how, undoes, made_by, made_at FROM base.flag_log;
INSERT INTO base.meta VALUES ('format', '3');
