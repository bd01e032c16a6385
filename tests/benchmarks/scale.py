"""What grows with the rows: each query behind the app's pages, files that are taken away, and the store's build.

python tests/benchmarks/app.py generate --out AUDIT --rows 1000000 --concepts 200
python tests/benchmarks/scale.py queries --audit AUDIT [--times 10]      # seconds of each query, nothing remembered
python tests/benchmarks/scale.py rank --audit AUDIT [--top N]            # seconds and peak memory, as the command
python tests/benchmarks/scale.py export --audit AUDIT
python tests/benchmarks/scale.py bm25 --audit AUDIT                      # a ranking by lexical match, from nothing
python tests/benchmarks/scale.py store --audit AUDIT --out SCRATCH       # audit.duckdb anew from the shards of AUDIT
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from concept_audit import Audit, RowFilter
from concept_audit.progress import Progress
from concept_audit.store import queries
from concept_audit.store.assemble import SaeDirections, assemble
from concept_audit.store.cursor import only_row
from concept_audit.store.layout import Layout
from concept_audit.store.manifest import read_manifest

LIMIT_MS = 1000
METHOD = "vector_filter"


def actions(audit: Audit) -> dict[str, Callable[[int], object]]:
    """What pages ask, by what people do; each is given the number of the time that it is asked."""
    opened = audit.opened
    features = audit.concepts.features(order="telling")["feature_id"].tolist()
    words = [text.split()[0] for text in audit.rows.list(limit=100)["response"]]
    rankings = opened.read(
        lambda c: [r for (r,) in c.execute("SELECT ranking_id FROM main.rankings ORDER BY concept_id").fetchall()]
    )
    hashes = audit.rows.list(limit=100)["content_hash"].tolist()

    def name(i: int) -> str:
        return f"sae:{features[i % len(features)]}"

    def asked(i: int) -> tuple:
        return name(i), METHOD, audit_defaults()

    def queue(kind: str, ranked: bool, where: Callable[[int], RowFilter]) -> Callable[[int], object]:
        def ask(i: int) -> object:
            ranking = rankings[i % len(rankings)] if ranked else None
            wanted = opened.searched(where(i))
            return opened.read(lambda c: queries.unlabelled(c, f"probe {i}", wanted, ranking, kind, 0.0))

        return ask

    def everything(_: int) -> RowFilter:
        return RowFilter()

    found = {
        "overview: counts": lambda i: audit.overview(),
        "overview: lengths and sources": lambda i: (audit.rows.lengths(), audit.rows.sources(), audit.rows.longest()),
        "overview: what tells rows apart": lambda i: audit.concepts.separating("metadata", "topic", f"topic {i % 12}"),
        "concepts: features": lambda i: audit.concepts.features(words[i][:3], "telling"),
        "concepts: strongest rows": lambda i: audit.concepts.strongest_rows(features[i % len(features)], 8),
        "concepts: rows by quantile": lambda i: audit.concepts.rows_by_quantile(features[i % len(features)], 5),
        "concepts: most spread": lambda i: audit.concepts.spread(24),
        "queue: before training": queue("shuffled", False, everything),
        "queue: likely": queue("likely", True, everything),
        "queue: uncertain": queue("uncertain", True, everything),
        "queue: unlikely": queue("unlikely", True, everything),
        "queue: with a word": queue("uncertain", True, lambda i: RowFilter(text=words[i])),
        "search for rows to label": lambda i: audit.rows.sample(RowFilter(text=words[i]), str(i), 10),
        "ranking: first page": lambda i: audit.rank(name(i), METHOD, 25),
        "ranking: page 1,000": lambda i: audit.rank(name(i), METHOD, 25, offset=25_000),
        "ranking: not flagged, a page": lambda i: audit.rank(name(i), METHOD, 25, RowFilter(flag="none")),
        "ranking: of a topic, a page": lambda i: audit.rank(
            name(i), METHOD, 25, RowFilter(metadata={"topic": (f"topic {i % 12}",)})
        ),
        "ranking: histogram of a topic": lambda i: audit.rankings.histogram(
            name(i), METHOD, RowFilter(metadata={"topic": (f"topic {i % 12}",)})
        ),
        "ranking: summary": lambda i: audit.rankings.summary(name(i)),
        "ranking: rows' other ranks": lambda i: audit.rankings.scores_elsewhere(name(i), list(range(i, i + 25))),
        "groups: features": lambda i: audit.groups(name(i), METHOD, "sae_feature"),
        "groups: topics": lambda i: audit.groups(name(i), METHOD, "topic"),
        "groups: sources": lambda i: audit.groups(name(i), METHOD, "source"),
        "compare: agreement": lambda i: audit.comparisons.agreement(asked(i), asked(i + 1)),
        "compare: points": lambda i: audit.comparisons.points(asked(i), asked(i + 1)),
        "compare: disagreements": lambda i: audit.comparisons.disagreements(asked(i), asked(i + 1)),
        "evidence: against a topic": lambda i: audit.comparisons.against_group(
            name(i), "metadata", "topic", f"topic {i % 12}"
        ),
        "flags: a row": lambda i: audit.flags.set([hashes[i]], "remove"),
        "flags: the first 1,000": lambda i: audit.flags.set_matching(RowFilter(), "review", name(i), METHOD, top=1000),
        "flags: undo": lambda i: audit.flags.undo(audit.flags.latest()[0]),
        "export: who is in it": lambda i: audit.rows.list(RowFilter(flag="any"), 10),
    }
    return found


def audit_defaults():
    from concept_audit import InfluenceOptions

    return InfluenceOptions()


def time_queries(root: Path, times: int, only: str) -> None:
    """Seconds of each query, with nothing remembered but what DuckDB keeps of the file.

    Processor time is told too: where other work shares the machine, it is what the query itself needs.
    """
    audit = Audit(root)
    print(f"{audit.overview().n_rows:,} rows; limit of each p95: {LIMIT_MS:,} ms")
    for name, act in actions(audit).items():
        if only not in name:
            continue
        seconds = []
        for i in range(times):
            audit.opened.forget()
            audit.opened._memory_of_build.forget()
            started = time.perf_counter(), time.process_time()
            act(i)
            seconds.append((time.perf_counter() - started[0], time.process_time() - started[1]))
        p50, p95 = np.quantile(seconds, [0.5, 0.95], axis=0) * 1000
        print(
            f"{name:34} median {p50[0]:7.0f} ms   p95 {p95[0]:7.0f} ms   processor {p50[1]:7.0f}, {p95[1]:7.0f} ms"
            f"{'   OVER' if p95[0] > LIMIT_MS else ''}",
            flush=True,
        )


def rank(root: Path, top: int | None) -> None:
    """The first rows, or all, as `concept-audit rank` writes them."""
    from concept_audit.cli.main import main as command

    with tempfile.TemporaryDirectory(dir=root.parent) as place, measured("rank"):
        words = ["rank", str(root), "--concept", "sae:0", "--out", str(Path(place) / "ranked.csv")]
        command([*words, *(["--top", str(top)] if top is not None else [])])


def export(root: Path) -> None:
    """Every row in the audit's columns."""
    audit = Audit(root)
    for format in ("csv", "parquet"):
        with tempfile.TemporaryDirectory(dir=root.parent) as place, measured(f"export, {format}"):
            print(audit.exports.write(Path(place) / f"rows.{format}", format)["rows"], "rows")


def lexical(root: Path) -> None:
    """A ranking by BM25 that is not there yet."""
    audit = Audit(root)
    with measured("bm25"):
        audit.rankings.ensure("sae:1", "bm25")


def store(root: Path, out: Path) -> None:
    """Write ``audit.duckdb`` from the shards of another audit, with no ranking computed beforehand."""
    source = Layout(root)
    manifest = read_manifest(source.manifest)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "shards").exists():
        (out / "shards").symlink_to(source.shards.root.resolve())
    import duckdb

    with duckdb.connect(str(source.audit), read_only=True) as con:
        (count,) = only_row(con.execute("SELECT count(*) FROM base.sae_features"))
    names = [["word"]] * count
    sae = SaeDirections(
        12, np.eye(count, 64, dtype=np.float32), "s", names, names, lambda token: f"t{token}", lambda v: v, 0
    )
    with measured("store"):
        assemble(Layout(out), manifest, "synthetic", (), sae, Progress())
    print(f"{(out / 'audit.duckdb').stat().st_size / 2**20:,.0f} MiB")


@contextmanager
def measured(what: str) -> Iterator[None]:
    """Print the seconds of the body, and the most memory that this process has had."""
    started = time.perf_counter()
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"{what}: {time.perf_counter() - started:,.1f} s, peak {peak:,.0f} MiB", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["queries", "rank", "export", "bm25", "store"])
    parser.add_argument("--audit", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--top", type=int)
    parser.add_argument("--only", default="", help="queries whose name has this in it")
    options = parser.parse_args()
    if options.part == "queries":
        time_queries(options.audit, options.times, options.only)
    elif options.part == "rank":
        rank(options.audit, options.top)
    elif options.part == "export":
        export(options.audit)
    elif options.part == "bm25":
        lexical(options.audit)
    else:
        store(options.audit, options.out)


if __name__ == "__main__":
    main()
