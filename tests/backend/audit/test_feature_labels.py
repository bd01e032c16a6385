"""Labels of SAE features: made, scored, kept, taken along, and never before a person's."""

from __future__ import annotations

import csv
import json
import re
import shutil
import threading

import numpy as np
import pytest

from concept_audit import Audit, ConceptError, DataError
from concept_audit.cli import main
from concept_audit.concepts.labels import drawn_piece, examples, piece
from concept_audit.concepts.words import has_tokens
from concept_audit.evidence import endpoint
from concept_audit.evidence.endpoint import Endpoint
from concept_audit.evidence.labelling import REQUESTS
from concept_audit.store import feature_labels as store
from concept_audit.store.activations import read_firings
from concept_audit.store.examples import read_texts
from tests.backend.evidence.conftest import JudgeServer
from tests.conftest import shards

FEW = 3


@pytest.fixture(scope="module")
def with_words(built, tmp_path_factory):
    """A copy of the finished audit in which every feature has been labelled by words."""
    root = shutil.copytree(built, tmp_path_factory.mktemp("words") / "small")
    Audit(root).feature_labels.from_words()
    return root


@pytest.fixture
def labelled(with_words, tmp_path) -> Audit:
    return Audit(shutil.copytree(with_words, tmp_path / "small"))


def reply(body: dict) -> str:
    """A model that calls every feature by a word and finds the texts that have it."""
    question = body["messages"][0]["content"]
    if "said to fire" not in question:
        return '"Texts about money."\nand more'
    texts = re.findall(r"^(\d+)\. (.*)$", question, re.MULTILINE)
    return ", ".join(number for number, text in texts if "money" in text.lower()) or "none"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_DELAY", 0.01)
    with JudgeServer() as server:
        server.reply = reply
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def common(audit: Audit) -> list[int]:
    """Features that fire in many rows but on few tokens."""
    return audit.concepts.features(order="rarest").query("n_examples >= 80")["feature_id"].tolist()


def test_every_feature_gets_the_score_of_its_tokens_and_some_get_words(labelled):
    frame = labelled.feature_labels.list()
    live = labelled.concepts.features()["feature_id"]
    assert set(frame["feature_id"]) == set(live)
    scored = frame.dropna(subset="score")
    assert {"tokens", "words"} == set(scored["origin"])
    assert ((scored["low"] <= scored["score"]) & (scored["score"] <= scored["high"])).all()
    assert frame["snippet"].str.contains("«.+»", regex=True, flags=re.DOTALL).all()


def test_a_score_is_balanced_accuracy_on_rows_that_no_label_was_made_of(labelled):
    """Counted by hand, from the rows and their tokens."""
    feature = common(labelled)[0]
    sample, background = labelled.opened.read(
        lambda cursor: (store.firing_sample(cursor, feature, 20, 60), store.background_rows(cursor, [range(300)], 1000))
    )
    assert 60 <= len(sample) <= 80 and len(background) == 299  # row 299 repeats row 0
    texts = read_texts(shards(labelled.root, "tokens"), range(300))
    fires = read_firings(shards(labelled.root, "features"), feature, list(range(300)))
    held = [piece(texts[one.example_id], one.position) for one in sample][1::2]
    drawn = [(number, drawn_piece(texts[number], number)) for number in background]
    others = [one for number, one in drawn if not set(fires[number][:, 0]) & set(one.tokens)][:80][1::2]
    about = labelled.feature_labels.of(feature).set_index("origin").loc["tokens"]
    assert about.n == len(held) + len(others) and len(others) > 10
    tokens = about.label.split(" · ")
    hits, alarms = (np.mean([has_tokens(one.text, tokens) for one in side]) for side in (held, others))
    assert about.score == pytest.approx((hits + 1 - alarms) / 2)


def test_pieces_to_try_a_label_on_are_others_than_those_it_is_made_of(labelled):
    texts = read_texts(shards(labelled.root, "tokens"), range(20))
    pieces = [piece(row, int(row.parts.argmax())) for row in texts.values()]
    about = examples(3, pieces[:9], pieces[9:])
    parts = (about.firing, about.held_firing, about.other, about.held_other)
    assert sorted(map(id, (p for part in parts for p in part))) == sorted(map(id, pieces))
    assert all(one.marked.replace("«", "").replace("»", "") == one.text for one in pieces)


def test_what_is_shown_is_the_label_that_tells_more(labelled):
    shown = labelled.concepts.features().set_index("feature_id")
    frame = labelled.feature_labels.list()
    for feature, group in frame.groupby("feature_id"):
        first = group[group["place"] == 1].iloc[0]
        assert shown.label[feature] == first.label and shown.label_origin[feature] == first.origin
        if len(group) == 2:
            words = group.set_index("origin").score
            assert first.origin == ("tokens" if words["words"] < words["tokens"] else "words")


def test_labels_that_are_made_are_not_made_again(labelled):
    found = labelled.feature_labels.from_words()
    assert found.made == 0 and found.before == len(labelled.concepts.features())
    some = common(labelled)[:FEW]
    assert labelled.feature_labels.from_words(some, again=True).before == 0


def test_a_persons_label_comes_before_every_other(labelled, server):
    feature = common(labelled)[0]
    labelled.concepts.label(feature, "my own")
    labelled.feature_labels.from_words([feature], again=True)
    found = labelled.feature_labels.from_endpoint(Endpoint(server.url, "wise"), [feature], again=True)
    assert (found.made, found.before, server.asked) == (0, 1, [])
    about = labelled.concepts.feature(feature)
    assert (about.label, about.label_origin) == ("my own", "person")
    labelled.concepts.label(feature, None)
    assert labelled.concepts.feature(feature).label_origin in ("words", "tokens")


def test_an_endpoint_labels_and_is_tried_on_unmarked_pieces(audit, server):
    feature = common(audit)[0]
    found = audit.feature_labels.from_endpoint(Endpoint(server.url, "wise"), [feature])
    assert (found.made, found.requests, found.left) == (1, REQUESTS, 0)
    name, *tries = [body["messages"][0]["content"] for body in server.asked]
    assert "«" in name and not any("«" in question for question in tries)
    about = audit.feature_labels.of(feature).iloc[0]
    assert (about.label, about.origin, about.maker) == ("Texts about money", "endpoint", "wise")
    # The stand-in is right where it says "money": what it was asked says how often.
    said = [reply(body) for body in server.asked[1:]]
    assert 20 < about.n <= 40 and 0 <= about.score <= 1 and any(said)
    assert audit.concepts.feature(feature).label_score == pytest.approx(about.score)
    shown = {line.partition(". ")[2] for line in name.splitlines()}
    held = {line.partition(". ")[2] for question in tries for line in question.splitlines() if line[:1].isdigit()}
    assert not {text.replace("«", "").replace("»", "") for text in shown if "«" in text} & held


def test_a_budget_is_never_overdrawn_and_the_next_run_goes_on(audit, server):
    some = common(audit)[:FEW]
    wise = Endpoint(server.url, "wise")
    found = audit.feature_labels.from_endpoint(wise, some, budget=2 * REQUESTS - 1)
    assert (found.made, found.left) == (1, FEW - 1) and len(server.asked) == REQUESTS
    found = audit.feature_labels.from_endpoint(wise, some)
    assert (found.before, found.made, found.left) == (1, FEW - 1, 0)
    assert len(server.asked) == FEW * REQUESTS


def test_repeated_requests_count(audit, server):
    server.statuses = [503]
    found = audit.feature_labels.from_endpoint(Endpoint(server.url, "wise"), common(audit)[:1], budget=REQUESTS)
    assert (found.made, found.requests, len(server.asked)) == (0, REQUESTS, REQUESTS)


def test_what_was_labelled_before_an_endpoint_broke_is_kept(audit, server):
    some = common(audit)[:2]
    server.statuses = [200] * REQUESTS + [401]
    assert main(
        ["label", str(audit.root), "--url", server.url, "--model", "wise", "--features", f"{some[0]},{some[1]}"]
    )
    assert audit.feature_labels.list()["feature_id"].tolist() == [some[0]]


def test_the_command_asks_before_texts_go_to_another_machine(audit, capsys):
    assert main(["label", str(audit.root), "--url", "https://far.example/v1", "--model", "wise"]) == 1
    said = capsys.readouterr().err
    assert "pieces of the data's texts to https://far.example/v1" in said and "--yes" in said
    assert main(["label", str(audit.root), "--url", "https://far.example/v1"]) == 1
    assert "--url and --model go together" in capsys.readouterr().err


def test_the_command_says_what_it_did(audit, server, capsys):
    feature = common(audit)[0]
    words = ["label", str(audit.root), "--features", str(feature)]
    assert main(words) == 0
    assert "features labelled" in capsys.readouterr().out
    assert main([*words, "--url", server.url, "--model", "wise", "--budget", "1"]) == 0
    assert "the budget of 1 requests is spent, 1 features are left" in capsys.readouterr().out
    assert main(["features", str(audit.root), "--json", "--top", "999"]) == 0
    found = {one["feature_id"]: one for one in json.loads(capsys.readouterr().out)}
    assert found[feature]["label_origin"] in ("words", "tokens") and 0 <= found[feature]["label_score"] <= 1
    assert main([*words[:2], "--features", "5-2"]) == 1
    assert "'5-2' is no number of a feature" in capsys.readouterr().err
    with pytest.raises(ConceptError, match="SAE feature 99999"):
        audit.feature_labels.from_words([99999])


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_labels_go_to_a_file_and_come_back(labelled, built, tmp_path, suffix):
    first, second = common(labelled)[:2]
    labelled.concepts.label(first, "=HYPERLINK(1)", "Ada")
    path = tmp_path / f"labels.{suffix}"
    written = labelled.feature_labels.write(path)
    assert written == len(labelled.feature_labels.list())
    if suffix == "csv":
        with path.open(newline="") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert "'=HYPERLINK(1)" in cells and not any(cell.startswith("=") for cell in cells)
    other = Audit(shutil.copytree(built, tmp_path / "other"))
    taken, left_out = other.feature_labels.take(path)
    frame = labelled.feature_labels.list()
    assert taken == int((frame["origin"] != "tokens").sum()) and not left_out
    about = other.feature_labels.of(first).iloc[0]
    assert (about.label, about.origin, about.maker) == ("=HYPERLINK(1)", "person", "Ada")
    words = frame[frame["origin"] == "words"].set_index("feature_id")
    there = other.feature_labels.list().query("origin == 'import'").set_index("feature_id")
    assert there.label.to_dict() == words.label.to_dict()
    assert there.score.to_dict() == pytest.approx(words.score.to_dict(), nan_ok=True)
    # A person's label here is not written over.
    other.concepts.label(first, "mine")
    _, left_out = other.feature_labels.take(path)
    assert left_out == {"a person has labelled the feature here": 1} and other.concepts.feature(first).label == "mine"


def test_neuronpedias_records_are_taken_and_what_is_missing_is_named(audit, tmp_path):
    layer = audit.manifest.configuration["sae_layer"]
    records = [
        {"modelId": "m", "layer": f"{layer}-res-jb", "index": "3", "description": "rivers\x1b[2J", "typeName": "x"},
        {"layer": f"{layer - 1}-res-16k", "index": 5, "description": "money", "explanationModelName": "gpt"},
        {"layer": f"{layer}-res-jb", "index": "3", "description": "again"},
        {"layer": f"{layer + 4}-res-jb", "index": "6", "description": "elsewhere"},
        {"index": "7"},
        {"description": "of nothing"},
        {"index": "9999999", "description": "too far"},
        {"index": True, "description": ["odd"]},
    ]
    path = tmp_path / "explanations.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    taken, left_out = audit.feature_labels.take(path)
    frame = audit.feature_labels.list().set_index("feature_id")
    assert taken == 2 and frame.label.to_dict() == {3: "rivers [2J", 5: "money"}
    assert frame.maker[5] == "gpt" and set(frame.origin) == {"import"} and frame.score.isna().all()
    assert sum(left_out.values()) == 6
    for reason in ("another layer", "without label or description", "without feature_id or index", "beyond"):
        assert any(reason in told for told in left_out), reason
    nested = tmp_path / "one.json"
    nested.write_text(json.dumps({"layer": layer, "explanations": [{"index": 8, "description": "boats"}]}))
    assert audit.feature_labels.take(nested)[0] == 1 and audit.concepts.feature(8).label == "boats"


def test_a_file_without_labels_says_what_it_lacks(audit, tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(DataError, match="2 × without feature_id or index.*Neuronpedia's index and description"):
        audit.feature_labels.take(path)
    with pytest.raises(ConceptError, match=r"\.csv or \.jsonl"):
        audit.feature_labels.write(tmp_path / "labels.xlsx")
