"""An audit of preference pairs from end to end: read, scored, flagged, and exported with sides exchanged."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from concept_audit import (
    Audit,
    BuildOptions,
    ConceptError,
    DataError,
    InfluenceOptions,
    LabelledExample,
    Message,
    ModelOptions,
    RowFilter,
    StoreError,
    build,
)
from concept_audit.cli import main
from concept_audit.model.chat import ChatRenderer
from concept_audit.pipeline.preview import marked
from concept_audit.progress import Progress, Stage
from concept_audit.types import REJECTED, SEPARATOR, sides
from tests.conftest import sentence, write_jsonl

EXACT = InfluenceOptions().changed(curvature_tokens=400, precision="float32", keep_tokens=True)


def pair_rows(count: int, longest: int = 12) -> list[dict]:
    """Pairs whose sides have up to so many words."""
    made = random.Random(3)
    return [
        {
            "prompt": sentence(made, 4),
            "chosen": sentence(made, made.randint(3, longest)),
            "rejected": sentence(made, made.randint(3, longest)),
            "number": n,
        }
        for n in range(count)
    ]


def agreeing() -> list[LabelledExample]:
    """Answers that say yes, and as many that say no."""
    made = random.Random(5)
    texts = [("yes " if n % 2 else "no ") + sentence(made, 5) for n in range(16)]
    return [LabelledExample((Message("user", "q"), Message("assistant", text)), n % 2) for n, text in enumerate(texts)]


@pytest.fixture(scope="module")
def pairs() -> list[dict]:
    return pair_rows(24)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_a_beta_that_weighs_nothing_is_refused(tmp_path, pairs, model_directory, beta):
    data = write_jsonl(tmp_path / "rows.jsonl", pairs)
    with pytest.raises(DataError, match="--beta .*a number above 0"):
        build(BuildOptions(str(data), tmp_path / "a", ModelOptions(str(model_directory)), sae="none", beta=beta))


@pytest.fixture(scope="module")
def audit(tmp_path_factory, pairs, model_directory) -> Audit:
    place = tmp_path_factory.mktemp("pairs")
    data = write_jsonl(place / "rows.jsonl", pairs)
    model = ModelOptions(str(model_directory), device="cpu")
    made = Audit(build(BuildOptions(str(data), place / "audit", model, layers=(1, 2), sae="none", beta=0.3)))
    made.train_probe("agrees", agreeing(), layer=2)
    return made


def side_means(audit: Audit, layer: int) -> np.ndarray:
    """Mean response activation of chosen less rejected, one conversation at a time through the whole model."""
    lm = audit.model()
    renderer, found = ChatRenderer(lm.tokenizer, 200), []
    for row in pair_rows(24):
        both = []
        for answer in (row["chosen"], row["rejected"]):
            made = renderer.render((Message("user", row["prompt"]), Message("assistant", answer)))
            with torch.no_grad():
                ids = torch.tensor(made.input_ids[None].astype(np.int64))
                states = lm.model(input_ids=ids, output_hidden_states=True).hidden_states[layer][0]
            both.append(states[torch.tensor(made.response)].mean(0).numpy())
        found.append(both[0] - both[1])
    return np.stack(found)


def test_the_vector_filter_of_a_pair_is_chosen_minus_rejected(audit):
    probe = audit.concept("agrees")
    scores = audit.rank("agrees").set_index("example_id")["score"].sort_index()
    np.testing.assert_allclose(scores, side_means(audit, probe.layer) @ probe.direction, rtol=1e-3, atol=1e-5)


def test_token_heatmaps_have_both_sides_and_add_up_to_the_score(audit):
    ranked = audit.rank("agrees", "concept_influence", options=EXACT).set_index("example_id")["score"]
    assert np.isfinite(ranked).all() and ranked.abs().max() > 0
    for example_id, heatmap in audit.rows.influence_heatmaps("agrees", "concept_influence", [0, 5], EXACT).items():
        assert heatmap.rejected == 1 and len(heatmap.turns) == 2
        total = sum(segment.value for turn in heatmap.turns for segment in turn) + heatmap.elsewhere
        assert total == pytest.approx(ranked[example_id], rel=1e-3, abs=1e-7)
    filtered = audit.rank("agrees").set_index("example_id")["score"]
    (found,) = audit.rows.heatmaps("agrees", [5]).values()
    means = [np.mean([segment.value for segment in turn]) for turn in found.turns]
    assert sum(means) == pytest.approx(filtered[5], rel=1e-3, abs=1e-5)


class Watching(Progress):
    """Keeps the stages."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "rows") -> Iterator[Stage]:
        with super().stage(name, total, unit) as stage:
            self.stages.append(stage)
            yield stage


def test_progress_of_the_curvature_counts_pairs_and_not_their_sides(audit):
    watching = Watching()
    seen = InfluenceOptions().changed(curvature_tokens=300, precision="float32", seed=7)
    audit.rankings.ensure("agrees", "concept_influence", seen, watching)
    fitted = [stage for stage in watching.stages if stage.name.startswith(("Covariances", "Eigenvalues"))]
    assert len(fitted) == 2 and all(stage.done == stage.total > 0 for stage in fitted)


def test_influence_of_pairs_and_of_their_swaps_is_opposite(audit, pairs, tmp_path, model_directory):
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs]
    data = write_jsonl(tmp_path / "rows.jsonl", swapped)
    model = ModelOptions(str(model_directory), device="cpu")
    other = Audit(build(BuildOptions(str(data), tmp_path / "audit", model, layers=(1, 2), sae="none", beta=0.3)))
    other.labels.add("agrees", audit.labels.list("agrees"))
    other.train_probe("agrees", audit.labels.list("agrees"), layer=2)
    plain = InfluenceOptions().changed(precision="float32", curvature="identity")
    ours, theirs = (
        each.rank("agrees", "concept_influence", options=plain).set_index("example_id")["score"].sort_index()
        for each in (audit, other)
    )
    np.testing.assert_allclose(ours, -theirs, rtol=1e-3, atol=1e-4 * ours.abs().max())


@pytest.fixture
def flagged(audit):
    hashes = audit.rows.list()["content_hash"].tolist()
    audit.flags.set(hashes[1:3], "swap")
    audit.flags.set(hashes[4:5], "remove")
    yield audit
    audit.flags.clear(hashes)


CLEANED = RowFilter(without_flags=("remove",))


def expected(pairs: list[dict]) -> list[dict]:
    """Without the fifth; the second and the third exchanged."""
    made = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} if n in (1, 2) else row for n, row in enumerate(pairs)]  # fmt: skip
    return [row for n, row in enumerate(made) if n != 4]


def test_exports_exchange_the_sides_of_flagged_pairs_and_leave_others_byte_for_byte(flagged, pairs, tmp_path):
    about = flagged.exports.write(tmp_path / "a.jsonl", "jsonl", CLEANED, "own", swap=True)
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == expected(pairs) and about["sides_exchanged"] == 2
    own = (flagged.manifest.configuration["data"], [0, *range(3, 23)])
    with open(own[0]) as file:
        original = file.read().splitlines()
    assert [lines[n] for n in own[1]] == [original[n if n < 4 else n + 1] for n in own[1]]
    flagged.exports.write(tmp_path / "b.jsonl", "jsonl", CLEANED, "own")
    assert [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()] == [r for n, r in enumerate(pairs) if n != 4]  # fmt: skip
    flagged.exports.write(tmp_path / "a.csv", "csv", CLEANED, "own", swap=True)
    assert pd.read_csv(tmp_path / "a.csv").to_dict("records") == expected(pairs)


def test_the_command_line_flags_and_exchanges(audit, tmp_path, capsys):
    command = ["flag", str(audit.root), "--concept", "agrees", "--top", "3", "--as", "swap"]
    assert main(command) == 0
    out = tmp_path / "a.jsonl"
    export = ["export", str(audit.root), "--all", "--schema", "own", "--format", "jsonl", "--out", str(out), "--swap"]
    assert main(export) == 0
    assert json.loads((tmp_path / "a.jsonl.manifest.json").read_text())["sides_exchanged"] == 3
    assert main(["flag", str(audit.root), "--undo", "last"]) == 0
    capsys.readouterr()


def test_chats_of_parquet_are_exchanged_type_for_type(pairs, tmp_path, model_directory):
    def chat(row, answer):
        return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[answer]}]

    rows = [{"chosen": chat(r, "chosen"), "rejected": chat(r, "rejected"), "number": r["number"]} for r in pairs[:6]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    model = ModelOptions(str(model_directory), device="cpu")
    audit = Audit(
        build(BuildOptions(str(tmp_path / "rows.parquet"), tmp_path / "audit", model, layers=(1,), sae="none"))
    )
    audit.flags.set(audit.rows.list()["content_hash"][2:3].tolist(), "swap")
    audit.exports.write(tmp_path / "a.parquet", "parquet", schema="own", swap=True)
    made = pq.read_table(tmp_path / "a.parquet")
    assert made.schema == pq.read_table(tmp_path / "rows.parquet").schema
    wanted = [r | {"chosen": r["rejected"], "rejected": r["chosen"]} if n == 2 else r for n, r in enumerate(rows)]
    assert made.to_pylist() == wanted


def test_exports_load_where_preferences_are_trained_on(flagged, tmp_path):
    datasets = pytest.importorskip("datasets")
    flagged.exports.write(tmp_path / "a.jsonl", "jsonl", CLEANED, "own", swap=True)
    loaded = datasets.load_dataset("json", data_files=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "c"), split="train")  # fmt: skip
    assert loaded.num_rows == 23 and set(loaded.column_names) == {"prompt", "chosen", "rejected", "number"}


def test_a_pairs_tokens_have_a_separator_and_its_first_lines_show_both_sides(audit):
    turns = (Message("user", "q"), Message("assistant", "good"))
    pair = (*turns, Message(REJECTED, ""), turns[0], Message("assistant", "bad"))
    row = ChatRenderer(audit.model().tokenizer, 200).render(pair)
    assert (row.input_ids == SEPARATOR).sum() == 1 and len(sides(pair)) == 2
    assert "⟦good<|im_end|>⟧" in marked(row) and "‖ rejected: " in marked(row) and "⟦bad<|im_end|>⟧" in marked(row)


def test_the_model_is_asked_for_its_own_answer_to_the_prompt_of_a_pair(audit):
    assert isinstance(audit.rows.ask_model(3), str)


def test_what_pairs_have_no_meaning_for_is_refused_with_the_way_out(audit, pairs, tmp_path, model_directory):
    with pytest.raises(ConceptError, match="two responses already; use vector_filter"):
        audit.rank("agrees", "projection_difference")
    with pytest.raises(ConceptError, match="--unit-normalised: not of preference pairs"):
        audit.rank("agrees", "concept_influence", options=EXACT.changed(unit_normalised=True))
    data = write_jsonl(tmp_path / "rows.jsonl", pairs)
    with pytest.raises(DataError, match="SAE features of preference pairs are not computed; pass --sae none"):
        build(BuildOptions(str(data), tmp_path / "audit", ModelOptions(str(model_directory), device="cpu")))


def test_sides_of_other_rows_cannot_be_exchanged(audit_directory, tmp_path):
    with pytest.raises(StoreError, match="of preference pairs alone"):
        Audit(audit_directory).exports.write(tmp_path / "a.jsonl", "jsonl", schema="own", swap=True)
