CREATE SCHEMA IF NOT EXISTS base;
CREATE TABLE IF NOT EXISTS base.meta (key VARCHAR PRIMARY KEY, value VARCHAR NOT NULL);
CREATE TABLE IF NOT EXISTS base.probes (
    name VARCHAR PRIMARY KEY, version INTEGER NOT NULL, layer INTEGER NOT NULL, fit VARCHAR NOT NULL,
    direction FLOAT[] NOT NULL, details JSON NOT NULL, model_fingerprint VARCHAR NOT NULL,
    trained_at TIMESTAMP NOT NULL);
CREATE TABLE IF NOT EXISTS base.probe_examples (
    probe VARCHAR NOT NULL, content_hash VARCHAR NOT NULL, messages JSON NOT NULL, label TINYINT NOT NULL,
    labelled_at TIMESTAMP NOT NULL, PRIMARY KEY (probe, content_hash));
CREATE TABLE IF NOT EXISTS base.flags (
    content_hash VARCHAR PRIMARY KEY, flag VARCHAR NOT NULL, note VARCHAR NOT NULL,
    flagged_by VARCHAR NOT NULL, flagged_at TIMESTAMP NOT NULL);
CREATE TABLE IF NOT EXISTS base.rankings (
    ranking_id BIGINT PRIMARY KEY, build_id VARCHAR NOT NULL, concept_id VARCHAR NOT NULL,
    version INTEGER NOT NULL, method VARCHAR NOT NULL, parameters JSON NOT NULL);
CREATE TABLE IF NOT EXISTS base.ranking_scores (
    ranking_id BIGINT NOT NULL, example_id BIGINT NOT NULL, score DOUBLE NOT NULL,
    rank BIGINT NOT NULL, percentile DOUBLE NOT NULL);
CREATE TABLE IF NOT EXISTS base.row_activations (
    content_hash VARCHAR NOT NULL, model_fingerprint VARCHAR NOT NULL, layer INTEGER NOT NULL,
    activation FLOAT[] NOT NULL, PRIMARY KEY (content_hash, model_fingerprint, layer));
CREATE TABLE IF NOT EXISTS base.token_projections (
    content_hash VARCHAR NOT NULL, direction_hash VARCHAR NOT NULL, values FLOAT[] NOT NULL,
    PRIMARY KEY (content_hash, direction_hash));
CREATE TABLE IF NOT EXISTS base.probe_versions (
    name VARCHAR NOT NULL, version INTEGER NOT NULL, layer INTEGER NOT NULL, fit VARCHAR NOT NULL,
    direction FLOAT[] NOT NULL, details JSON NOT NULL, model_fingerprint VARCHAR NOT NULL,
    trained_at TIMESTAMP NOT NULL, PRIMARY KEY (name, version));
CREATE TABLE IF NOT EXISTS base.probe_skips (
    probe VARCHAR NOT NULL, content_hash VARCHAR NOT NULL, PRIMARY KEY (probe, content_hash));
CREATE SEQUENCE IF NOT EXISTS base.flag_events START 1;
CREATE TABLE IF NOT EXISTS base.flag_log (
    event_id BIGINT PRIMARY KEY, action VARCHAR NOT NULL, note VARCHAR NOT NULL, n_texts BIGINT NOT NULL,
    how VARCHAR NOT NULL, undoes BIGINT, made_by VARCHAR NOT NULL, made_at TIMESTAMP NOT NULL);
CREATE TABLE IF NOT EXISTS base.flag_changes (
    event_id BIGINT NOT NULL, content_hash VARCHAR NOT NULL, before STRUCT(
        flag VARCHAR, note VARCHAR, flagged_by VARCHAR, flagged_at TIMESTAMP), after STRUCT(
        flag VARCHAR, note VARCHAR, flagged_by VARCHAR, flagged_at TIMESTAMP));
CREATE TABLE IF NOT EXISTS base.saved_views (
    name VARCHAR PRIMARY KEY, page VARCHAR NOT NULL, query VARCHAR NOT NULL, saved_by VARCHAR NOT NULL,
    saved_at TIMESTAMP NOT NULL);
CREATE TABLE IF NOT EXISTS base.feature_labels (
    sae VARCHAR NOT NULL, feature_id INTEGER NOT NULL, label VARCHAR NOT NULL, labelled_by VARCHAR NOT NULL,
    labelled_at TIMESTAMP NOT NULL, PRIMARY KEY (sae, feature_id));
CREATE TABLE IF NOT EXISTS base.own_answers (
    content_hash VARCHAR NOT NULL, model_fingerprint VARCHAR NOT NULL, answer VARCHAR NOT NULL,
    PRIMARY KEY (content_hash, model_fingerprint));
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
    SELECT ranking_id, concept_id, version, method, parameters FROM base.rankings
    WHERE build_id = (SELECT value FROM audit.base.meta WHERE key = 'build_id');
CREATE OR REPLACE VIEW main.ranking_scores AS
    SELECT ranking_id, example_id, score, rank, percentile FROM audit.base.ranking_scores
    UNION ALL
    SELECT ranking_id, example_id, score, rank, percentile FROM base.ranking_scores;
CREATE OR REPLACE VIEW main.scores AS
    SELECT r.concept_id, r.method, s.example_id, s.score, s.rank, s.percentile, r.parameters, s.ranking_id
    FROM main.ranking_scores s JOIN main.rankings r USING (ranking_id);
CREATE OR REPLACE VIEW main.flags AS
    SELECT f.content_hash, e.example_id, f.flag, f.note, f.flagged_by, f.flagged_at
    FROM base.flags f LEFT JOIN audit.main.examples e USING (content_hash);
CREATE OR REPLACE VIEW main.flag_log AS
    SELECT event_id, action, note, n_texts, how, undoes, made_by, made_at FROM base.flag_log;
INSERT INTO base.meta VALUES ('format', '2');
