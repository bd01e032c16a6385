"""Probes while they are made: the report, the queue, versions, names and files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.metrics import precision_recall_curve

from concept_audit import Audit, ConceptError, LabelledExample, RowFilter
from concept_audit.audit.probe_file import probe_from_json
from concept_audit.concepts.probe import boundary, difference_of_means, splits
from concept_audit.concepts.probe_report import probe_report
from concept_audit.metrics import precision_recall
from tests.backend.test_audit import of_rows, typed


def test_the_report_of_a_clear_difference_and_of_none():
    rng = np.random.default_rng(0)
    labels = np.repeat([1, 0], 20)
    noise = rng.normal(size=(40, 16)).astype(np.float32)
    shifted = noise + 4 * labels[:, None] * np.eye(16, dtype=np.float32)[0]
    found = probe_report({1: noise, 2: shifted}, labels)
    assert found.layer == 2 and found.auroc > 0.98 and found.by_layer[1] < 0.8
    assert found.auroc_interval[0] > found.random_auroc[1] > found.random_auroc[0]
    assert 0.4 < found.random_auroc[0] < 0.6
    assert (found.scores[labels == 1] > 0).mean() > 0.9 and (found.scores[labels == 0] < 0).mean() > 0.9
    thresholds, precision, recall = precision_recall(found.scores, found.labels)
    theirs = precision_recall_curve(labels, found.scores)
    ours = {round(float(t), 6): (p, r) for t, p, r in zip(thresholds, precision, recall, strict=True)}
    for p, r, t in zip(*theirs[:2], theirs[2], strict=False):
        assert ours[round(float(t), 6)] == pytest.approx((p, r))


def test_the_null_of_a_report_chooses_its_layer_as_the_report_does():
    """Of noise at ten layers the best looks like something; so does the best of shuffled labels."""
    rng = np.random.default_rng(0)
    labels, noise = np.repeat([1, 0], 20), rng.normal(size=(10, 40, 16)).astype(np.float32)
    found = probe_report(dict(enumerate(noise)), labels)
    alone = probe_report({found.layer: noise[found.layer]}, labels)
    assert found.auroc == alone.auroc == max(found.by_layer.values())
    assert found.random_auroc[0] > alone.random_auroc[0] + 0.1
    assert alone.random_auroc[1] < found.auroc < found.random_auroc[1]


def test_a_report_scores_each_example_as_plain_probes_that_have_not_seen_it_do():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([1, 0], [14, 22]))
    inputs = (3 + rng.normal(size=(36, 50)) + labels[:, None] * 0.4).astype(np.float32)
    total, times = np.zeros(36), np.zeros(36)
    for train, test in splits(labels, 7):
        direction = difference_of_means(inputs[train], labels[train])
        total[test] += inputs[test] @ direction - boundary(inputs[train], labels[train], direction)
        times[test] += 1
    np.testing.assert_allclose(probe_report({3: inputs}, labels, 7).scores, total / times, atol=1e-5)


def test_a_report_of_examples_that_do_not_differ_is_refused():
    with pytest.raises(ConceptError, match="same activations"):
        probe_report({1: np.full((20, 8), 0.1, np.float32)}, np.repeat([1, 0], 10))


def test_the_report_needs_labels(audit):
    with pytest.raises(ConceptError, match="label"):
        audit.probes.report("nobody")
    audit.labels.add("topic", of_rows(audit))
    assert 0 <= audit.probes.report("topic").auroc <= 1


def test_the_queue_offers_likely_uncertain_and_unlikely_rows_and_repeats_none(audit):
    audit.train_probe("topic", of_rows(audit))
    ranked = audit.rank("topic")
    labelled = {e.content_hash for e in audit.labels.list("topic")}
    seen, kinds = set(labelled), []
    for _ in range(12):
        kind, row = audit.queue.next("topic", RowFilter())
        kinds.append(kind)
        assert row["content_hash"] not in seen
        seen.add(row["content_hash"])
        fresh = ranked[~ranked["content_hash"].isin(seen - {row["content_hash"]})]
        if kind == "likely":
            assert row["example_id"] == fresh["example_id"].iloc[0]
        elif kind == "unlikely":
            assert row["example_id"] == fresh["example_id"].iloc[-1]
        else:
            boundary = audit.probes.list()[0].details["boundary"]
            nearest = (fresh["score"] - boundary).abs().min()
            mine = fresh[fresh["example_id"] == row["example_id"]]["score"].iloc[0]
            assert abs(mine - boundary) == pytest.approx(nearest)
        audit.queue.skip("topic", [row["content_hash"]])
    assert kinds == ["uncertain", "unlikely", "likely"] * 4 or set(kinds) == {"likely", "uncertain", "unlikely"}
    last = row["content_hash"]
    audit.queue.unskip("topic", last)
    assert audit.labels.counts().set_index("probe").skipped["topic"] == 11


def test_an_untrained_probe_offers_every_row_once(audit):
    seen = []
    for _ in range(20):
        kind, row = audit.queue.next("new", RowFilter(text="river"))
        assert kind == "shuffled" and "river" in (row["prompt"] + row["response"]).lower()
        seen.append(row["content_hash"])
        audit.queue.skip("new", [row["content_hash"]])
    assert len(set(seen)) == 20


def test_versions_are_kept_and_can_be_gone_back_to(audit):
    first = audit.train_probe("topic", of_rows(audit))
    second = audit.train_probe("topic", of_rows(audit, 40))
    assert [p.version for p in audit.probes.list()] == [2] and [p.version for p in audit.probes.versions("topic")] == [
        1
    ]
    audit.probes.restore("topic", 1)
    now = audit.probes.list()[0]
    assert now.version == 3 and (now.direction == first.direction).all() and now.details["restored_from"] == 1
    assert (audit.probes.versions("topic")[0].direction == second.direction).all()
    with pytest.raises(ConceptError, match="version 9"):
        audit.probes.restore("topic", 9)


def test_a_probe_changes_its_name_with_all_it_has(audit):
    audit.train_probe("topic", of_rows(audit))
    scores = audit.rank("topic")["score"].tolist()
    audit.probes.rename("topic", "theme")
    assert [p.name for p in audit.probes.list()] == ["theme"] and len(audit.labels.list("theme")) == 20
    assert audit.rank("theme")["score"].tolist() == scores
    audit.labels.add("other", of_rows(audit)[:1])
    for old, new, words in (
        ("theme", "other", "there already"),
        ("nobody", "x", "none of this name"),
        ("theme", "?", "name"),
    ):
        with pytest.raises(ConceptError, match=words):
            audit.probes.rename(old, new)


def test_a_probe_goes_through_a_file(audit, built, tmp_path):
    import shutil

    audit.train_probe("topic", [*of_rows(audit), *typed(4)])
    audit.probes.set_threshold("topic", 0.25)
    content = audit.probes.export("topic")
    other = Audit(shutil.copytree(built, tmp_path / "other"))
    assert other.probes.import_(content, "theirs") == "theirs"
    assert (other.probes.list()[0].direction == audit.probes.list()[0].direction).all()
    assert other.probes.list()[0].details["threshold"] == 0.25
    assert other.rank("theirs")["score"].tolist() == audit.rank("topic")["score"].tolist()
    assert {e.content_hash for e in other.labels.list("theirs")} == {e.content_hash for e in audit.labels.list("topic")}
    told = json.loads(content)
    for broken, words in (
        ("{}", "not a probe"),
        ("nonsense", "not a probe"),
        (json.dumps({**told, "model_fingerprint": "0000"}), "fingerprint"),
        (json.dumps({**told, "direction": [2.0] * 32}), "unit length"),
        (json.dumps({**told, "layer": 4, "name": "deep"}), "keeps layers"),
        (json.dumps({**told, "name": "theirs"}), "there already"),
        (json.dumps({**told, "name": "wide", "direction": [*told["direction"], 0.0]}), "33 numbers.*stream 32"),
    ):
        with pytest.raises(ConceptError, match=words):
            other.probes.import_(broken)
    with pytest.raises(ConceptError, match="not trained"):
        audit.probes.export("nobody")


@pytest.mark.parametrize(
    "change",
    [
        {"direction": [float("nan")] * 32},
        {"direction": ["1"] * 32},
        {"direction": "abc"},
        {"layer": "2"},
        {"layer": True},
        {"layer": -1},
        {"fit": "magic"},
        {"details": []},
        {"details": {"auroc": "<b>0.9</b>"}},
        {"details": {"auroc": 0.9, "auroc_low": 0.8, "auroc_high": 2.0, "n_positive": 4, "n_negative": 4, "tried": []}},
        {"name": "../../elsewhere"},
        {"model_fingerprint": None},
        {"examples": [{"messages": [{"role": "assistant", "content": "Hi"}], "label": float("nan")}]},
        {"examples": [{"messages": [{"role": "assistant", "content": "Hi"}], "label": 2}]},
        {"examples": [{"messages": [{"role": "assistant", "content": "Hi"}], "label": True}]},
        {"examples": [{"messages": [{"role": "wizard", "content": "Hi"}], "label": 1}]},
        {"examples": [{"messages": [{"role": "assistant", "content": 7}], "label": 1}]},
        {"examples": [{"messages": [{"role": "user", "content": "Hi"}], "label": 1}]},
        {"examples": [{"messages": [], "label": 1}]},
        {"examples": {"messages": []}},
    ],
)
def test_a_file_of_a_probe_is_checked_whole(change):
    sound = {
        "kind": "concept-audit probe",
        "name": "theirs",
        "layer": 2,
        "fit": "logistic_regression",
        "model_fingerprint": "0123",
        "details": {"auroc": 0.9, "auroc_low": 0.8, "auroc_high": 1.0, "n_positive": 4, "n_negative": 4, "tried": []},
        "direction": [1.0] + [0.0] * 31,
        "examples": [{"messages": [{"role": "assistant", "content": "Hi"}], "label": 1}],
    }
    probe, examples = probe_from_json(json.dumps(sound))
    assert probe.layer == 2 and examples[0].label == 1
    with pytest.raises(ConceptError, match="not a probe that was taken away|probe name"):
        probe_from_json(json.dumps({**sound, **change}))


def test_what_a_file_of_a_probe_says_beyond_what_is_known_is_left_out():
    details = {"auroc": 1, "auroc_low": 1, "auroc_high": 1, "n_positive": 4, "n_negative": 4, "tried": [{"layer": 2}]}
    values = {
        "kind": "concept-audit probe",
        "name": "theirs",
        "layer": 2,
        "fit": "logistic_regression",
        "model_fingerprint": "0123",
        "details": {**details, "note": "<script>"},
        "direction": [1.0],
        "examples": [],
    }
    probe, _ = probe_from_json(json.dumps(values))
    assert probe.details == {**details, "tried": []}


def test_a_label_of_the_same_text_replaces_the_earlier(audit):
    (one, *_) = of_rows(audit)
    audit.labels.add("p", [one])
    audit.labels.add("p", [LabelledExample(one.messages, 1 - one.label)])
    assert [e.label for e in audit.labels.list("p")] == [1 - one.label]
