"""An audit of documents that are longer than the longest row: split, ranked as windows and as documents, and exported."""

from __future__ import annotations

import csv
import gzip
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from concept_audit import (
    Audit,
    BuildOptions,
    ConceptError,
    InfluenceOptions,
    LabelledExample,
    Message,
    ModelOptions,
    ProcessEngine,
    RowFilter,
    StoreError,
    build,
)
from concept_audit.audit.repair import check, repair
from concept_audit.cli import main
from concept_audit.model.chat import ChatRenderer
from concept_audit.model.linear import linear_layers
from concept_audit.store.layout import Layout
from concept_audit.store.manifest import read_manifest, rebuild_command
from tests.conftest import SMALL_SAE, sentence, shards, write_jsonl

LONGEST = 48
BAD = 3
"""The row that cannot be used."""
QUERY = LabelledExample((Message("user", "q"), Message("assistant", "Yes, the green boat.")), 1)
EXACT = InfluenceOptions.of(
    curvature_tokens=400, precision="float32", engine="exact", queries=(QUERY,), leave_out_own=False
)


def document_rows() -> list[dict]:
    """Short and long documents; the last one is a copy of the second."""
    made = random.Random(11)
    sizes = [6, 90, 5, 4, 200, 7, 60, 130]
    rows = [{"text": " ".join(sentence(made, 8) for _ in range(-(-n // 8))), "number": i} for i, n in enumerate(sizes)]
    rows[BAD] = {"text": None, "number": BAD}
    return [*rows, {"text": rows[1]["text"], "number": len(rows)}]


def agreeing() -> list[LabelledExample]:
    made = random.Random(5)
    texts = [("yes " if n % 2 else "no ") + sentence(made, 5) for n in range(16)]
    return [LabelledExample((Message("user", "q"), Message("assistant", text)), n % 2) for n, text in enumerate(texts)]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return document_rows()


def options(data, place, model_directory, **more) -> BuildOptions:
    usual = {"layers": (1, 2), "sae": "none", "max_tokens": LONGEST, "long_documents": "split", "on_bad_row": "skip"}
    return BuildOptions(str(data), place, ModelOptions(str(model_directory), device="cpu"), **{**usual, **more})


def built(data, place, model_directory, **more) -> Audit:
    audit = Audit(build(options(data, place, model_directory, **more)))
    audit.train_probe("agrees", agreeing(), layer=2)
    return audit


@pytest.fixture(scope="module")
def audit(tmp_path_factory, rows, model_directory) -> Audit:
    place = tmp_path_factory.mktemp("documents")
    data = write_jsonl(place / "rows.jsonl", rows)
    return built(data, place / "audit", model_directory, sae="train", sae_training=SMALL_SAE)


@pytest.fixture
def flagging(audit):
    """The audit, whose flags go afterwards."""
    yield audit
    audit.flags.clear(audit.rows.list()["content_hash"].tolist())


def windows(audit: Audit):
    """Rows with where they lie."""
    table = audit.rows.list().set_index("example_id")
    return table.join(audit.query("SELECT * FROM audit.windows").set_index("example_id"))


def test_windows_are_the_documents_one_after_the_other(audit, rows):
    table = windows(audit)
    assert not table["truncated"].any() and (table["n_tokens"] <= LONGEST).all()
    assert sorted(set(table["document"])) == [n for n in range(len(rows)) if n != BAD]
    for document, parts in table.groupby("document"):
        text = rows[document]["text"]
        assert "".join(parts["response"]) == text
        assert parts["window_number"].tolist() == list(range(1, len(parts) + 1))
        assert (parts["n_windows"] == len(parts)).all() and (parts["source_row"] == document + 1).all()
        for part in parts.itertuples():
            assert text[part.first_character : part.end_character] == part.response
    assert table.groupby("document").size().max() > 3
    assert audit.documents.number_of(table.index) == table["document"].nunique()
    assert audit.documents.number_of(table.index[:1]) == 1 and audit.documents.number_of([]) == 0
    assert audit.documents.counts() == {"documents": 5, "windows": int((table["n_windows"] > 1).sum())}


def test_metadata_tell_the_document_of_windows_and_of_no_other_row(audit, rows):
    for row in windows(audit).itertuples():
        more = {"document_number": row.document, "window_number": row.window_number} if row.n_windows > 1 else {}
        assert json.loads(row.metadata) == {"number": row.document} | more
    found = audit.rows.list(RowFilter(metadata={"document_number": ("4",)}))
    assert "".join(found["response"]) == rows[4]["text"]


def test_rows_that_fit_and_audits_that_do_not_split_are_what_they_were(audit, rows, tmp_path, model_directory):
    cut = Audit(build(options(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "a", model_directory, long_documents="cut")))  # fmt: skip
    assert cut.query("SELECT count(*) AS n FROM audit.windows")["n"][0] == 0 and cut.documents.counts() is None
    assert cut.documents.number_of([0]) == 0
    assert cut.documents.places([0]) == {} and cut.manifest.configuration["long_documents"] is None
    before, now = cut.rows.list(), windows(audit)
    fits = now[now["n_windows"] == 1]
    same = before[~before["truncated"]]
    assert same["content_hash"].tolist() == fits["content_hash"].tolist()
    assert same["metadata"].tolist() == fits["metadata"].tolist()
    with pytest.raises(ConceptError, match="no documents that were split; .*--long-documents split"):
        cut.documents.rank("agrees")
    with pytest.raises(StoreError, match="--whole-documents: no documents were split"):
        cut.exports.write(tmp_path / "x.jsonl", "jsonl", whole_documents=True)


def test_copies_of_a_document_have_the_same_hashes(audit):
    hashes = windows(audit).groupby("document")["content_hash"].agg(list)
    assert hashes[1] == hashes[8] and len(set(hashes[4])) == len(hashes[4])


def token_rows(audit: Audit, document: int) -> list:
    renderer = ChatRenderer(audit.model().tokenizer, LONGEST)
    texts = windows(audit).query(f"document == {document}")["response"]
    return [renderer.render((Message("assistant", text),)) for text in texts]


def sum_of_losses(model: torch.nn.Module, row) -> tuple[torch.Tensor, int]:
    ids = torch.from_numpy(row.input_ids.astype(np.int64))
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].double()
    wanted = torch.from_numpy(row.response[1:])
    nll = -logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0][wanted]
    return nll.sum(), len(nll)


def gradient_of_mean_loss(audit: Audit, token_rows: list) -> list[torch.Tensor]:
    """Of the mean over all predicted tokens of rows, straight through the model."""
    model = audit.model().model
    weights = [layer.module.weight for layer in linear_layers(audit.model(), 1, 4)]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        sums, counts = zip(*(sum_of_losses(model, row) for row in token_rows), strict=True)
        return list(torch.autograd.grad(sum(sums) / sum(counts), weights))
    finally:
        for weight in weights:
            weight.requires_grad_(False)


def test_a_documents_influence_is_that_of_its_mean_loss(audit):
    found = audit.documents.rank("agrees", "gradient_dot", options=EXACT).set_index("document")["score"]
    query = ChatRenderer(audit.model().tokenizer, LONGEST).render(QUERY.messages)
    towards = gradient_of_mean_loss(audit, [query])
    for document in (0, 1, 4, 6):
        gradient = gradient_of_mean_loss(audit, token_rows(audit, document))
        wanted = sum(
            float((left.double() * right.double()).sum()) for left, right in zip(gradient, towards, strict=True)
        )
        assert found[document] == pytest.approx(wanted, rel=1e-4), document


def test_a_documents_projection_is_the_mean_over_all_of_its_tokens(audit):
    found = audit.documents.rank("agrees").set_index("document")["score"]
    direction = audit.concept("agrees").direction
    with torch.no_grad():
        for document in (0, 4, 7):
            values = []
            for row in token_rows(audit, document):
                ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
                stream = audit.model().model(input_ids=ids, output_hidden_states=True).hidden_states[2][0].numpy()
                values.append(stream[row.response] @ direction)
            assert found[document] == pytest.approx(np.concatenate(values).mean(), rel=1e-3)


def test_a_feature_of_a_document_is_its_mean_activation(audit):
    feature = audit.concepts.features()["feature_id"].iloc[0]
    found = audit.documents.rank(f"sae:{feature}").set_index("document")["score"]
    fired = audit.query(
        f"SELECT example_id, mean_activation AS m FROM feature_activations WHERE feature_id = {feature}"
    )
    means = dict(zip(fired["example_id"], fired["m"], strict=True))
    tokens = {row["example_id"]: row for n in shards(audit.root, "tokens").numbers() for row in pq.read_table(shards(audit.root, "tokens").path(n)).to_pylist()}  # fmt: skip
    for document, parts in windows(audit).groupby("document"):
        sizes = np.array([tokens[i]["parts"].count(2) for i in parts.index])
        wanted = np.average([means.get(i, 0.0) for i in parts.index], weights=sizes)
        assert found[document] == pytest.approx(wanted, rel=1e-4, abs=1e-7)


def test_documents_by_their_mean_and_by_their_strongest_window(audit):
    for method in ("vector_filter", "bm25", "concept_influence"):
        scores = audit.rank("agrees", method, options=EXACT).set_index("example_id")["score"]
        table = windows(audit).join(scores)
        found = audit.documents.rank("agrees", method, options=EXACT)
        assert found["rank"].tolist() == list(range(1, 9)) and found["score"].is_monotonic_decreasing
        for row in found.itertuples():
            parts = table[table["document"] == row.document]
            assert row.strongest_score == parts["score"].max() and row.strongest_example_id == parts["score"].idxmax()
            assert row.strongest_window == parts["window_number"][parts["score"].idxmax()]
            assert (
                row.windows == len(parts) and parts["score"].min() - 1e-12 <= row.score <= row.strongest_score + 1e-12
            )
            assert row.source_row == row.document + 1 and row.exact
        strongest = audit.documents.rank("agrees", method, 3, "strongest", EXACT)
        wanted = table.groupby("document")["score"].max().sort_values(ascending=False, kind="stable")
        assert strongest["strongest_score"].tolist() == wanted[:3].tolist()
    with pytest.raises(ConceptError, match="--unit-normalised: not of documents"):
        audit.documents.rank("agrees", "concept_influence", options=EXACT.changed(unit_normalised=True))


def test_flags_are_of_a_window_or_of_a_document(flagging, capsys):
    audit = flagging
    every = windows(audit)
    audit.flags.set([every[every["document"] == 7]["content_hash"].iloc[0]], "review")
    change = audit.documents.flag([4], "remove", note="poison")
    size = int((every["document"] == 4).sum())
    assert change.n_texts == size and audit.flags.log(1)["how"][0] == "all windows of document 4"
    told = audit.documents.rank("agrees").set_index("document")["flagged"]
    assert told[4] == size and told[7] == 1 and told.sum() == size + 1
    audit.documents.flag([1], "remove")
    assert audit.documents.rank("agrees").set_index("document")["flagged"][8] > 0, "copies share flags"
    assert audit.flags.undo(change.event_id).n_texts == size
    command = ["flag", str(audit.root), "--document", "4,6", "--as", "review"]
    assert main([*command, "--dry-run"]) == 0
    assert f"{(every['document'].isin([4, 6])).sum()} rows" in capsys.readouterr().out
    assert main(command) == 0
    assert (windows(audit).query("document in (4, 6)")["flag"] == "review").all()
    assert audit.flags.log(1)["how"][0] == "document 4,6"
    with pytest.raises(StoreError, match=f"no document {BAD}, 99 in this audit; `rank --by document`"):
        audit.documents.flag([4, 99, BAD])


def test_the_command_line_ranks_documents(audit, tmp_path):
    for by, order in (("document", "mean"), ("strongest", "strongest")):
        out = tmp_path / f"{by}.csv"
        assert main(["rank", str(audit.root), "--concept", "agrees", "--by", by, "--top", "3", "--out", str(out)]) == 0
        written = list(csv.DictReader(out.read_text().splitlines()))
        wanted = audit.documents.rank("agrees", top=3, by=order)
        assert [int(row["document"]) for row in written] == wanted["document"].tolist()
        assert [float(row["score"]) for row in written] == pytest.approx(wanted["score"].tolist())


def test_what_becomes_of_long_documents_is_said_first_and_last(audit, rows, tmp_path, model_directory, capsys):
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    command = ["build", "--data", str(data), "--model", str(model_directory), "--out", str(tmp_path / "a")]
    command += ["--on-bad-row", "skip", "--max-tokens", str(LONGEST), "--dry-run"]
    assert main(command) == 0
    told = capsys.readouterr().err
    assert f"longer than {LONGEST} tokens are cut there: 5 of the first 8; to audit all" in told
    assert main([*command, "--long-documents", "split"]) == 0
    count = audit.documents.counts()["windows"]
    assert f"longer than {LONGEST} tokens are split: 5 of the first 8 into {count} windows" in capsys.readouterr().err
    assert main(["info", str(audit.root)]) == 0
    assert f"5 documents longer than that are split into {count} windows" in capsys.readouterr().out
    write_jsonl(data, [{"prompt": "q", "response": "yes " * 99}])
    assert main([*command, "--long-documents", "split"]) == 0
    assert "no plain text, so that none is split" in capsys.readouterr().err
    write_jsonl(data, [{"text": "Yes."}])
    assert main(command) == 0
    assert "cut there: none of the first 1\n" in capsys.readouterr().err


def test_chats_are_never_split(tmp_path, model_directory):
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "q", "response": f"yes {n} " * 99} for n in range(4)])
    audit = Audit(build(options(data, tmp_path / "a", model_directory)))
    assert len(audit.rows.list()) == 4 and audit.rows.list()["truncated"].all()
    assert audit.manifest.document is None and audit.documents.counts() is None


def test_a_build_goes_on_and_a_repair_splits_again(audit, tmp_path, model_directory):
    root = tmp_path / "audit"
    shutil.copytree(audit.root, root)
    made = audit.manifest.configuration
    before = windows(audit)
    shutil.rmtree(root / "shards" / "rows")
    (root / "audit.duckdb").unlink()
    assert any(finding.wrong for finding in check(root))
    repair(root)
    assert not any(finding.wrong for finding in check(root))
    after = windows(Audit(root))
    assert after["content_hash"].tolist() == before["content_hash"].tolist()
    assert after["first_character"].tolist() == before["first_character"].tolist()
    manifest = read_manifest(Layout(root).manifest)
    assert "--long-documents split" in rebuild_command(root, {"configuration": manifest.configuration})
    with pytest.raises(StoreError, match="long_documents was split, is now None"):
        build(options(made["data"], root, model_directory, long_documents="cut", sae="train", sae_training=SMALL_SAE))


@pytest.fixture(scope="module", params=["jsonl", "parquet", "csv", "jsonl.gz"])
def kinds(request, tmp_path_factory, rows, model_directory):
    """Audits of the same documents, from files of several formats; in Parquet and CSV none is to be left out."""
    place = tmp_path_factory.mktemp("kinds")
    data = place / f"rows.{request.param}"
    whole = rows if request.param.startswith("jsonl") else [row for row in rows if row["text"] is not None]
    if request.param == "parquet":
        pq.write_table(pa.Table.from_pylist(whole, pa.schema([("number", pa.int16()), ("text", pa.string())])), data)
    elif request.param == "csv":
        with data.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "number"])
            writer.writeheader()
            writer.writerows(whole)
    else:
        write_jsonl(place / "rows.jsonl", whole)
        if request.param == "jsonl.gz":
            data.write_bytes(gzip.compress((place / "rows.jsonl").read_bytes()))
    return (
        built(data, place / "audit", model_directory),
        [row for row in whole if row["text"] is not None],
        request.param,
    )


def test_exports_are_the_documents_less_the_windows_that_are_dropped(kinds, tmp_path):
    """Of one document the middle goes, of another the end, of a third all."""
    audit, rows, kind = kinds
    table = windows(audit)
    numbers = table["document"].drop_duplicates().tolist()
    parts = {row["number"]: table[table["document"] == n] for n, row in zip(numbers, rows, strict=True)}
    dropped = [parts[4]["content_hash"].iloc[1], parts[7]["content_hash"].iloc[-1], *parts[6]["content_hash"]]
    audit.flags.set(dropped, "remove")
    texts = {row["number"]: row["text"] for row in rows}
    texts[4] = parts[4]["response"].iloc[0] + "\n\n" + "".join(parts[4]["response"].iloc[2:])
    texts[7] = "".join(parts[7]["response"].iloc[:-1])
    del texts[6]
    cleaned = RowFilter(without_flags=("remove",))
    try:
        for format in ("jsonl", "parquet", "csv"):
            about = audit.exports.write(tmp_path / f"a.{format}", format, cleaned, "own")
            assert about["rows"] == len(table) - len(dropped) and about["documents"] == len(texts)
        scored = audit.exports.write(tmp_path / "scored.jsonl", "jsonl", cleaned, "own", "agrees")
        whole = audit.exports.write(tmp_path / "whole.jsonl", "jsonl", cleaned, "own", whole_documents=True)
        flagged = audit.exports.write(tmp_path / "flagged.jsonl", "jsonl", RowFilter(flag="remove"), "own")
        plain = audit.exports.write(tmp_path / "plain.csv", "csv", cleaned, whole_documents=True)
    finally:
        audit.flags.clear(table["content_hash"].tolist())
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert {int(json.loads(line)["number"]): json.loads(line)["text"] for line in lines} == texts
    if kind.startswith("jsonl"):
        source = Path(audit.manifest.configuration["data"])
        content = gzip.decompress(source.read_bytes()) if kind.endswith("gz") else source.read_bytes()
        given = content.decode().splitlines()
        assert [line for line in lines if json.loads(line)["number"] not in (4, 7)] == [
            line for line in given if json.loads(line)["number"] not in (BAD, 4, 6, 7)
        ]
    found = pq.read_table(tmp_path / "a.parquet")
    assert {int(row["number"]): row["text"] for row in found.to_pylist()} == texts
    if kind == "parquet":
        assert found.schema == pq.read_table(audit.manifest.configuration["data"]).schema
    with (tmp_path / "a.csv").open(newline="") as file:
        assert {int(row["number"]): row["text"] for row in csv.DictReader(file)} == texts
    scores = audit.rank("agrees").set_index("example_id")["score"]
    with_scores = {
        int(row["number"]): row for row in map(json.loads, (tmp_path / "scored.jsonl").read_text().splitlines())
    }
    assert scored["rows"] == about["rows"]
    assert with_scores[4]["audit_score"] == pytest.approx(scores[parts[4].index.delete(1)].tolist())
    assert len(with_scores[0]["audit_rank"]) == 1
    left = {int(json.loads(line)["number"]) for line in (tmp_path / "whole.jsonl").read_text().splitlines()}
    assert left == set(texts) - {4, 7} and whole["documents"] == len(left) == plain["documents"]
    removed = {
        int(row["number"]): row["text"]
        for row in map(json.loads, (tmp_path / "flagged.jsonl").read_text().splitlines())
    }
    assert removed == {
        4: parts[4]["response"].iloc[1], 6: "".join(parts[6]["response"]), 7: parts[7]["response"].iloc[-1]
    } and flagged["rows"] == len(dropped)  # fmt: skip


def test_exports_load_in_datasets(kinds, tmp_path):
    datasets = pytest.importorskip("datasets")
    audit, rows, _ = kinds
    first = windows(audit).query("document == 1 and window_number == 1")["content_hash"].iloc[0]
    audit.flags.set([first], "remove")
    try:
        for format in ("jsonl", "parquet"):
            audit.exports.write(tmp_path / f"a.{format}", format, RowFilter(without_flags=("remove",)), "own")
    finally:
        audit.flags.clear([first])
    for format, reader in (("jsonl", "json"), ("parquet", "parquet")):
        file, cache = str(tmp_path / f"a.{format}"), str(tmp_path / f"c-{format}")
        loaded = datasets.load_dataset(reader, data_files=file, cache_dir=cache, split="train")
        assert loaded.num_rows == len(rows) and set(loaded.column_names) == {"text", "number"}


def test_engines_split_alike(audit, tmp_path, model_directory):
    made = options(audit.manifest.configuration["data"], tmp_path / "a", model_directory)
    other = Audit(build(made, engine=ProcessEngine(workers=2)))
    assert windows(other)["content_hash"].tolist() == windows(audit)["content_hash"].tolist()
    assert windows(other)["n_tokens"].tolist() == windows(audit)["n_tokens"].tolist()
