"""Make ``audit.tar.xz`` once more: a small audit of the version before manifests of format 2.

git worktree add /tmp/previous 9d863bc
PYTHONPATH=/tmp/previous python tests/data/previous_version/make.py

There is no need to: what lies here is what that version left.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

import duckdb

connect = duckdb.connect


def portable(*arguments, **options):
    """A connection whose new files the oldest DuckDB that may be installed reads."""
    options["config"] = {**options.get("config", {}), "storage_compatibility_version": "v1.4.0"}
    return connect(*arguments, **options)


duckdb.connect = portable

from backend.concepts.sae_training import SaeTraining  # noqa: E402

from backend import Audit, BuildOptions, LabelledExample, Message, ModelOptions, Recipe, ValidateOptions, build  # noqa: E402
from tests.conftest import chat_rows, small_model, small_tokenizer, write_jsonl  # noqa: E402

OUT = Path(__file__).with_name("audit.tar.xz")
CACHE = "/home/ada/cache"
VALIDATION = ValidateOptions(
    methods=("vector_filter", "bm25"),
    removed=("vector_filter",),
    seeds=2,
    subsets=4,
    recipe=Recipe(rank=2, learning_rate=1e-2, max_steps=2, batch=4, max_tokens=40, precision="float32"),
    answer_tokens=3,
    draws=2,
    natural_rows=4,
    origin="topic",
    positive=("money",),
)
KEPT = ("rows.jsonl", "model", "sae", "audit/manifest.json", "audit/audit.duckdb", "audit/workspace.duckdb")


def made(sae: str, out: str) -> Path:
    """Build an audit of the rows here."""
    return build(
        BuildOptions(
            data="rows.jsonl",
            out=Path(out),
            model=ModelOptions("model", device="cpu"),
            layers=(1, 2),
            sae=sae,
            sae_layer=2,
            sae_training=SaeTraining(expansion=1, k=4, batch=64, min_steps=40, max_steps=40),
            max_tokens=200,
        )
    )


def work(audit: Audit) -> None:
    """What people leave: labels, a probe, a skipped row, flags and their log, a view, a label, rankings, evidence."""
    rows = audit.rows()
    texts = [tuple(Message(m["role"], m["content"]) for m in json.loads(text)) for text in rows["messages"]]
    hashes = rows["content_hash"].tolist()
    outside = (Message("user", "Is it safe?"), Message("assistant", "Truly, always."))
    examples = [LabelledExample(text, i % 2) for i, text in enumerate(texts[:18])]
    audit.train_probe("first", [*examples, LabelledExample(outside, 1)], layer=1)
    audit.train_probe("first", layer=2)
    audit.label("untrained", [LabelledExample(texts[18], 1), LabelledExample(texts[19], 0)])
    audit.skip("first", hashes[20:22])
    audit.set_threshold("first", 0.25)
    audit.flag(hashes[3:5], "remove", "asks for it", by="Ada")
    audit.flag([hashes[5]], "review", "odd", by="Ben")
    audit.undo_flags(int(audit.flag_log()["event_id"].max()), by="Ben")
    audit.flag([hashes[22]], "keep", "", by="Ben")
    audit.save_view("first rows", "audit", "concept=probe:first", by="Ada")
    audit.label_feature(int(audit.features()["feature_id"][0]), "my own name", by="Ada")
    for method in ("vector_filter", "bm25", "concept_influence"):
        audit.ranking("first", method)
    audit.validate("first", VALIDATION)


def main() -> None:
    rows = chat_rows(23, seed=7)
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        write_jsonl(Path("rows.jsonl"), [*rows, {**rows[0], "number": 23}])
        small_model("llama").save_pretrained("model")
        small_tokenizer().save_pretrained("model")
        shutil.move(made("train", "training") / "sae", "sae")
        root = made("sae", "audit")
        work(Audit(root))
        manifest = json.loads((root / "manifest.json").read_text())
        manifest["configuration"]["cache"] = CACHE
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        assert place not in text, "no path of this machine is kept"
        (root / "manifest.json").write_text(text)
        with tarfile.open(OUT, "w:xz") as archive:
            for name in KEPT:
                archive.add(name, filter=anonymous)
    print(f"{OUT}: {OUT.stat().st_size / 1024:,.0f} KiB")


def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Nothing of the machine or of the moment."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.mode = 0o755 if entry.isdir() else 0o644
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    main()
