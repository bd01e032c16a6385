CREATE SCHEMA base;
CREATE TABLE base.meta (key VARCHAR PRIMARY KEY, value VARCHAR NOT NULL);
CREATE TABLE base.rankings (
    ranking_id BIGINT PRIMARY KEY, build_id VARCHAR NOT NULL, concept_id VARCHAR NOT NULL,
    version INTEGER NOT NULL, direction VARCHAR NOT NULL, method VARCHAR NOT NULL, parameters JSON NOT NULL,
    used TIMESTAMP NOT NULL);
CREATE TABLE base.ranking_scores (
    ranking_id BIGINT NOT NULL, example_id BIGINT NOT NULL, score DOUBLE NOT NULL,
    rank BIGINT NOT NULL, percentile DOUBLE NOT NULL);
CREATE TABLE base.row_activations (
    content_hash VARCHAR NOT NULL, model_fingerprint VARCHAR NOT NULL, layer INTEGER NOT NULL,
    activation FLOAT[] NOT NULL, used TIMESTAMP NOT NULL, PRIMARY KEY (content_hash, model_fingerprint, layer));
CREATE TABLE base.token_projections (
    content_hash VARCHAR NOT NULL, direction_hash VARCHAR NOT NULL, values FLOAT[] NOT NULL,
    used TIMESTAMP NOT NULL, PRIMARY KEY (content_hash, direction_hash));
CREATE TABLE base.own_answers (
    content_hash VARCHAR NOT NULL, model_fingerprint VARCHAR NOT NULL, answer VARCHAR NOT NULL,
    used TIMESTAMP NOT NULL, PRIMARY KEY (content_hash, model_fingerprint));
INSERT INTO base.meta VALUES ('format', '1');
