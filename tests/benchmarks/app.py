"""Server time and bytes of what people do in the app.

python tests/benchmarks/app.py generate --out DIR --rows 100000 --concepts 200
python tests/benchmarks/app.py time --audit AUDIT [--times 20]
python tests/benchmarks/app.py bytes --audit AUDIT            # what a page of 25 rows with heatmaps sends
python tests/benchmarks/app.py heatmaps --audit AUDIT         # of a probe never seen before
"""

from __future__ import annotations

import argparse
import base64
import logging
import os
import sys
import time
import zlib
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

sys.path.insert(0, str(Path(__file__).parents[2]))

import concept_audit_app
from concept_audit import Audit
from concept_audit.store import schema
from concept_audit.store.activations import write_firings
from concept_audit.store.assemble import limit
from concept_audit.store.examples import ROWS, TOKENS
from concept_audit.store.layout import Layout
from concept_audit.store.manifest import Manifest
from concept_audit.store.rankings import insert_scores, ranking_id
from concept_audit.types import CONTENT, PROMPT

MAIN = str(Path(concept_audit_app.__file__).parent / "main.py")
WORDS = 4000
PROMPT_WORDS, RESPONSE_WORDS = 20, 60
FIRING = 6
MEMORY = 6 << 30
"""Bytes that DuckDB may take while it makes a synthetic audit."""
LIMITS = "limits: 150 ms on the demo, 300 ms at 100,000 rows x 200 concepts, 1,000 ms at 1,000,000 x 50"


def shard_tables(rng: np.random.Generator, words: np.ndarray, span: range) -> tuple[pa.Table, pa.Table]:
    """Rows of random words, a token each: as they were read, and as a model would read them."""
    count, length = len(span), PROMPT_WORDS + RESPONSE_WORDS
    chosen = rng.zipf(1.3, (count, length)) % WORDS
    ends = np.cumsum(np.char.str_len(words)[chosen] + 1, axis=1)
    starts = np.c_[np.zeros(count, np.int64), ends[:, :-1]]
    parts = np.r_[np.full(PROMPT_WORDS, PROMPT), np.full(RESPONSE_WORDS, CONTENT)].astype(np.uint8)
    examples = np.arange(span.start, span.stop)

    def lists(values: np.ndarray) -> pa.Array:
        return pa.ListArray.from_arrays(np.arange(count + 1) * values.shape[1], values.ravel())

    def joined(ids: np.ndarray) -> pa.Array:
        return pc.binary_join(lists(words[ids]).cast(pa.list_(pa.string())), " ")

    def around(*texts: object) -> pa.Array:
        return pc.binary_join_element_wise(*texts, "")

    prompt, response = joined(chosen[:, :PROMPT_WORDS]), joined(chosen[:, PROMPT_WORDS:])
    # The words are of plain letters: their JSON is themselves.
    said = ('[{"role": "user", "content": "', '"}, {"role": "assistant", "content": "', '"}]')
    columns = {
        "example_id": examples,
        "content_hash": [f"{example:032x}" for example in span],
        "source": ["synthetic.jsonl"] * count,
        "source_row": examples + 1,
        "messages": around(said[0], prompt, said[1], response, said[2]),
        "prompt": prompt,
        "response": response,
        "metadata": [f'{{"topic": "topic {i % 12}", "origin": "{"ab"[i % 7 == 0]}"}}' for i in span],
        "truncated": np.zeros(count, bool),
        "n_tokens": np.full(count, length),
        "n_response_tokens": np.full(count, RESPONSE_WORDS),
        "text": around(prompt, " ", response, " "),
        "input_ids": lists(chosen),
        "starts": lists(starts),
        "ends": lists(ends),
        "parts": lists(np.tile(parts, (count, 1))),
    }
    read, tokenized = (
        pa.table([pa.array(columns[field.name]).cast(field.type) for field in of], schema=of) for of in (ROWS, TOKENS)
    )
    return read, tokenized


def synthetic_manifest(out: Path, rows: int) -> Manifest:
    configuration = {
        "data": "synthetic.jsonl",
        "model": "none",
        "dtype": "float32",
        "layers": [12],
        "max_tokens": 1024,
        "sae": "train",
        "sae_layer": 12,
        "split": "train",
        "cache": str(out.parent),
        "trust_remote_code": False,
    }
    names = ("rows", "tokens", "activations", "sae", "features", "store")
    stages = {name: {"key": name, "done": True, "report": {}} for name in names}
    stages["rows"]["report"] = {"rows": rows}
    return Manifest(configuration, {"data": "d", "model": "m", "sae": "s"}, stages)


def generate(out: Path, rows: int, concepts: int) -> None:
    """An audit of random words, with SAE features as concepts and all their rankings."""
    layout, rng = Layout(out), np.random.default_rng(0)
    out.mkdir(parents=True, exist_ok=True)
    manifest = synthetic_manifest(out, rows)
    shards = {kind: manifest.shards(layout, kind) for kind in ("rows", "tokens", "features")}
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(["".join(rng.choice(letters, rng.integers(3, 9))) for _ in range(WORDS)])
    for number in range(len(shards["rows"].partition)):
        span, units = shards["rows"].partition.span(number), list(shards["rows"].partition.units(number))
        read, tokenized = shard_tables(rng, words, span)
        shards["rows"].write_table(number, [read], ROWS)
        about = {"tokens": len(span) * (PROMPT_WORDS + RESPONSE_WORDS), "content": len(span) * RESPONSE_WORDS}
        # Unit by unit, as a build does: what is read for the rows of a page depends on it.
        shards["tokens"].write_table(number, [tokenized[unit] for unit in units], TOKENS, about)
        fired = len(span) * FIRING
        firings = {
            "example_id": np.repeat(np.arange(span.start, span.stop), FIRING),
            "token_position": rng.integers(PROMPT_WORDS, PROMPT_WORDS + RESPONSE_WORDS, fired).astype(np.int32),
            "token_id": np.zeros(fired, np.int32),
            "feature_id": rng.integers(0, concepts, fired).astype(np.int32),
            "activation": rng.gamma(2, 1, fired).astype(np.float32),
        }
        fired_in = [slice(unit.start * FIRING, unit.stop * FIRING) for unit in units]
        write_firings(
            shards["features"], number, [{name: column[part] for name, column in firings.items()} for part in fired_in]
        )
        if number % 100 == 0:
            print(f"{span.start:,} rows", flush=True)
    con = duckdb.connect(str(layout.audit))
    limit(con, MEMORY)
    con.execute("SET temp_directory = ?", [str(out / "spill")])
    con.execute(schema.AUDIT_TABLES)
    con.execute(
        "INSERT INTO base.meta VALUES ('format', ?), ('build_id', 'synthetic'), ('sae', 's')", [str(schema.FORMAT)]
    )
    con.execute(
        """INSERT INTO base.examples SELECT example_id, r.content_hash, source, source_row, prompt, response, n_tokens,
           metadata, messages, n_response_tokens, truncated, NULL
           FROM read_parquet(?) r JOIN read_parquet(?) t USING (example_id) ORDER BY example_id""",
        [str(shards[kind].file("*.parquet")) for kind in ("rows", "tokens")],
    )
    con.execute(
        "INSERT INTO base.metadata_fields VALUES ('topic', ?, 12, ?), ('origin', ?, 2, ['a', 'b'])",
        [rows, [f"topic {i}" for i in range(12)], rows],
    )
    con.execute(
        """INSERT INTO base.feature_activations SELECT feature_id, example_id, max(activation), avg(activation),
           arg_max(token_position, activation) FROM read_parquet(?) GROUP BY 1, 2 ORDER BY 1, 2""",
        [str(shards["features"].file("*.parquet"))],
    )
    con.execute(
        """INSERT INTO base.sae_features SELECT f, 'feature ' || f, 0.01, 9.0, 1.0, 100, ['a', 'b'], 12,
           list_transform(range(64), lambda i: 0.125::FLOAT), ['c'], ['d'], [1, 2, 3] FROM range(?) t(f)""",
        [concepts],
    )
    for concept in range(concepts):
        one = ranking_id("synthetic", f"sae:{concept}", 1, "vector_filter", {})
        con.execute("INSERT INTO base.rankings VALUES (?, ?, 1, 'vector_filter', '{}')", [one, f"sae:{concept}"])
        insert_scores(con, np.array([one]), rng.normal(size=(rows, 1)))
        if concept % 20 == 0:
            print(f"{concept} concepts", flush=True)
    con.execute(schema.AUDIT_VIEWS)
    con.execute("CHECKPOINT")
    con.close()
    manifest.write(layout)


def opened(audit: Path, concept: str):
    """The Audit page in Streamlit's harness."""
    from streamlit.testing.v1 import AppTest

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("streamlit"):
            logging.getLogger(name).setLevel(logging.ERROR)
    os.environ["CONCEPT_AUDIT_CACHE"], os.environ["CONCEPT_AUDIT_NAME"] = str(audit.parent), audit.name
    page = AppTest.from_file(MAIN, default_timeout=300)
    page.query_params["concept"] = concept
    page.run()
    return page.switch_page("app_pages/ranking.py").run()


def timings(root: Path, times: int) -> None:
    """Seconds of the script for each interaction, without model work: rows of an SAE feature.

    Processor time is told too: where other work shares the machine, it is what the script itself needs.
    """
    audit = Audit(root)
    features = [f"sae:{f}" for f in audit.concepts.features(order="telling")["feature_id"][: times + 2]]
    page = opened(root, features[0])
    assert not page.exception, page.exception
    low, high = np.quantile(audit.rank(features[0], top=2000)["score"], [0.2, 0.8])
    audit_words = audit.rows.list(limit=50)["response"].str.split().explode().tolist()

    def state(key: str, values):
        def act(i: int) -> None:
            page.session_state[key] = values[i % len(values)]
            page.run()

        return act

    def flag(i: int) -> None:
        next(b for b in page.button if b.key and b.key.startswith("remove-")).click().run()

    span = (f"{low:.6g}..{high:.6g}",)
    topic = audit.rows.metadata_fields().iloc[0]
    acts = {
        "next page": state("page-value", [(str(number),) for number in range(2, times + 2)]),
        "text filter": state("find", audit_words[:: max(len(audit_words) // times, 1)]),
        "no text": state("find", [""]),
        "metadata filter": state(f"where_{topic.field}", [[v] for v in topic.top_values[:times]]),
        "no metadata": state(f"where_{topic.field}", [[]]),
        "brush": state("scores-value", [span, ()]),
        "no brush": state("scores-value", [()]),
        "flags filter": state("flag", ["none", ""]),
        "flag a row": flag,
        "undo": lambda i: next(b for b in page.button if b.key == "undo").click().run(),
        "open another concept": state("concept-box", features[1:]),
        "one row alone": state("row-value", [(str(i * 7),) for i in range(times)]),
    }
    every: list[tuple[float, float]] = []
    print(f"{audit.overview().n_rows:,} rows, {len(audit.concepts.list()):,} concepts; {LIMITS}")
    for name, act in acts.items():
        seconds = []
        for i in range(1 if name.startswith("no ") else times):
            started = time.perf_counter(), time.process_time()
            act(i)
            seconds.append((time.perf_counter() - started[0], time.process_time() - started[1]))
            assert not page.exception, page.exception
        if not name.startswith("no "):
            every += seconds
            _tell(name, seconds)
    _tell("all", every)


def _tell(name: str, seconds: list[tuple[float, float]]) -> None:
    """Print median and 95th percentile of seconds, and of processor time."""
    p50, p95 = np.quantile(seconds, [0.5, 0.95], axis=0) * 1000
    print(
        f"{name:22} median {p50[0]:6.0f} ms   p95 {p95[0]:6.0f} ms   processor {p50[1]:6.0f}, {p95[1]:6.0f} ms",
        flush=True,
    )


def sent_bytes(root: Path) -> None:
    """What the server sends for a page of 25 rows with heatmaps: on the wire, and as the browser sees it."""
    from playwright import sync_api

    from tests.app.browser import FLAGS, chromium, coloured_tokens, dashboard, settle

    probes = Audit(root).probes.list()
    concepts = [
        *(f"probe:{p.name}" for p in probes[:1]),
        f"sae:{Audit(root).concepts.features(order='telling')['feature_id'][0]}",
    ]
    with dashboard(root.parent, root.name) as url, sync_api.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=chromium(), args=FLAGS)
        for concept in concepts:
            for warm in (False, True):
                context = browser.new_context(viewport={"width": 1400, "height": 1000})
                page = context.new_page()
                page.goto(f"{url}/audit?concept={concept}" if warm else url)
                settle(page)
                if warm:
                    coloured_tokens(page).first.wait_for()
                session = context.new_cdp_session(page)
                session.send("Network.enable")
                frames: list[bytes] = []
                session.on("Network.webSocketFrameReceived", lambda e, f=frames: f.append(_payload(e["response"])))
                page.goto(f"{url}/audit?concept={concept}&size=25")
                settle(page)
                coloured_tokens(page).first.wait_for()
                page.wait_for_timeout(1500)
                # The server compresses each message with the window of those before (RFC 7692).
                wire = zlib.compressobj(6, zlib.DEFLATED, -15)
                sent = sum(len(wire.compress(frame) + wire.flush(zlib.Z_SYNC_FLUSH)) for frame in frames)
                print(
                    f"{concept}, {'again' if warm else 'first visit'}: {sent / 1024:,.0f} KiB on the wire, "
                    f"{sum(map(len, frames)) / 1024:,.0f} KiB before compression (limit 200 KiB)",
                    flush=True,
                )
                context.close()
        browser.close()


def _payload(frame: dict) -> bytes:
    """What a WebSocket message holds: text, or binary in base64."""
    return frame["payloadData"].encode() if frame["opcode"] == 1 else base64.b64decode(frame["payloadData"])


def heatmap_seconds(root: Path) -> None:
    """Heatmaps of 10 rows of about 150 tokens, for a probe that has none yet, and again."""
    audit = Audit(root)
    audit.model()
    rows = audit.rows.list(limit=400)
    rows = rows.iloc[(rows["n_tokens"] - 150).abs().argsort()[:10]]
    rng = np.random.default_rng(int(time.time()))
    from concept_audit.types import Concept

    for layer in audit.layers:
        direction = rng.normal(size=audit.model().d_model).astype(np.float32)
        concept = Concept("probe:new", "new", "probe", layer, direction / np.linalg.norm(direction))
        for when in ("first", "again"):
            started = time.perf_counter()
            audit.rows.probe_heatmaps(concept, rows["example_id"].tolist())
            print(
                f"layer {layer}, {when}: {time.perf_counter() - started:.3f} s "
                f"({int(rows['n_tokens'].sum()):,} tokens; limit 3 s)",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["generate", "time", "bytes", "heatmaps"])
    parser.add_argument("--audit", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--concepts", type=int, default=200)
    parser.add_argument("--times", type=int, default=20)
    options = parser.parse_args()
    if options.part == "generate":
        generate(options.out, options.rows, options.concepts)
    elif options.part == "time":
        timings(options.audit, options.times)
    elif options.part == "bytes":
        sent_bytes(options.audit)
    else:
        heatmap_seconds(options.audit)


if __name__ == "__main__":
    main()
