"""Whether two audits of the same data rank alike, each perhaps made by another version.

python tests/benchmarks/same_rankings.py --before DIR --after DIR

Only the databases are read, and only by DuckDB. Rankings of a concept by a method are paired by the
parameters that both versions know; rows by example id and content hash. Exit status 1 if a Spearman
correlation is below 0.9999, or a ranking is in one audit alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from scipy.stats import spearmanr

LEAST_SPEARMAN = 0.9999
NAMED_ANEW = {"index"}
"""Parameters that every version, or every build, writes in words of its own."""
KEYS = {
    "examples": ("example_id",),
    "sae_features": ("feature_id",),
    "feature_activations": ("feature_id", "example_id"),
}
"""Table → what tells its rows apart."""
SIDES = ("before", "after")


@dataclass(frozen=True)
class Ranking:
    """One ranking of an audit."""

    ranking_id: int
    database: str
    concept: str
    method: str
    parameters: dict[str, Any]


@dataclass
class Compared:
    """What came out for the rankings of one method."""

    pairs: int = 0
    equal: int = 0
    difference: float = 0.0
    spearman: float = 1.0
    rank_difference: int = 0
    rows_differ: int = 0
    worst: str = ""
    missing: dict[str, list[str]] = field(default_factory=lambda: {side: [] for side in SIDES})


def attach(before: Path, after: Path) -> duckdb.DuckDBPyConnection:
    """The four databases, read-only: ``before``, ``before_derived``, ``after``, ``after_derived``."""
    con = duckdb.connect()
    for side, root in zip(SIDES, (before, after), strict=True):
        # Earlier versions kept what is computed on demand in the workspace.
        derived = "derived.duckdb" if (root / "derived.duckdb").exists() else "workspace.duckdb"
        for name, file in ((side, "audit.duckdb"), (f"{side}_derived", derived)):
            path = str(root / file).replace("'", "''")
            con.execute(f"ATTACH '{path}' AS {name} (READ_ONLY)")
    con.execute(
        """CREATE TABLE same_rows AS SELECT example_id FROM before.base.examples b
           JOIN after.base.examples a USING (example_id, content_hash)"""
    )
    return con


def rankings(con: duckdb.DuckDBPyConnection, side: str) -> list[Ranking]:
    """Every ranking of the present build."""
    columns = "ranking_id, concept_id, method, parameters"
    build = f"(SELECT value FROM {side}.base.meta WHERE key = 'build_id')"
    found = []
    for database, where in ((side, ""), (f"{side}_derived", f"WHERE build_id = {build}")):
        rows = con.execute(f"SELECT {columns} FROM {database}.base.rankings {where} ORDER BY concept_id, ranking_id")
        found += [
            Ranking(ranking, database, concept, method, {"engine": "exact", **json.loads(parameters)})
            for ranking, concept, method, parameters in rows.fetchall()
        ]
    return found


def pair(before: list[Ranking], after: list[Ranking]) -> Iterator[tuple[Ranking | None, Ranking | None]]:
    """Rankings of one concept by one method that are of the same parameters; those left over stand alone."""
    left = list(after)
    for ranking in before:
        fitting = [other for other in left if not disagreement(ranking, other)]
        if not fitting:
            yield ranking, None
            continue
        best = max(fitting, key=lambda other: len(ranking.parameters.keys() & other.parameters.keys()))
        left.remove(best)
        yield ranking, best
    for other in left:
        yield None, other


def disagreement(one: Ranking, other: Ranking) -> set[str]:
    """Parameters that both have, with different values."""
    shared = (one.parameters.keys() & other.parameters.keys()) - NAMED_ANEW
    return {name for name in shared if one.parameters[name] != other.parameters[name]}


def paired(con: duckdb.DuckDBPyConnection) -> Iterator[tuple[Ranking | None, Ranking | None]]:
    """All pairs, by method and concept."""
    groups: dict[tuple[str, str], dict[str, list[Ranking]]] = defaultdict(lambda: {side: [] for side in SIDES})
    for side in SIDES:
        for ranking in rankings(con, side):
            groups[ranking.method, ranking.concept][side].append(ranking)
    for _, group in sorted(groups.items()):
        yield from pair(group["before"], group["after"])


def scores(con: duckdb.DuckDBPyConnection, ranking: Ranking) -> dict[str, np.ndarray]:
    """Example id, score and rank of each row that both audits have, by example id."""
    return con.execute(
        f"""SELECT example_id, score, rank FROM {ranking.database}.base.ranking_scores
            JOIN same_rows USING (example_id) WHERE ranking_id = ? ORDER BY example_id""",
        [ranking.ranking_id],
    ).fetchnumpy()


def compare(con: duckdb.DuckDBPyConnection, one: Ranking, other: Ranking, into: Compared) -> None:
    """Count what two rankings have in common."""
    a, b = scores(con, one), scores(con, other)
    into.pairs += 1
    if not np.array_equal(a["example_id"], b["example_id"]):
        into.rows_differ += 1
        return
    if np.array_equal(a["score"], b["score"]) and np.array_equal(a["rank"], b["rank"]):
        into.equal += 1
        return
    largest = np.abs(a["score"]).max()
    correlation = float(spearmanr(a["score"], b["score"]).statistic)
    if not correlation >= into.spearman:
        into.spearman, into.worst = correlation, one.concept
    into.difference = max(into.difference, float(np.abs(a["score"] - b["score"]).max() / largest))
    into.rank_difference = max(into.rank_difference, int(np.abs(a["rank"] - b["rank"]).max()))


def compare_rankings(con: duckdb.DuckDBPyConnection) -> bool:
    """Print what is alike, a method a line; returns whether all of it is."""
    found: dict[str, Compared] = defaultdict(Compared)
    for one, other in paired(con):
        there = one or other
        name = f"{there.method} ({there.parameters['engine']})" if "contrast" in there.parameters else there.method
        if one is not None and other is not None:
            compare(con, one, other, found[name])
        else:
            found[name].missing["after" if other is None else "before"].append(there.concept)
    print(f"{'method':32} pairs  bit for bit  largest difference  least Spearman  largest rank difference")
    alike = True
    for name, each in found.items():
        where = f"  ({each.worst})" if each.worst else ""
        print(
            f"{name:32} {each.pairs:5}  {each.equal:11}  {each.difference:18.2e}  {each.spearman:14.6f}  "
            f"{each.rank_difference:23}{where}"
        )
        for side, concepts in each.missing.items():
            if concepts:
                print(f"    not in {side}: {len(concepts)}, such as {', '.join(concepts[:5])}")
        if each.rows_differ:
            print(f"    of {each.rows_differ} other rows have scores")
        alike &= each.spearman >= LEAST_SPEARMAN and not each.rows_differ and not any(each.missing.values())
    return alike


def compare_table(con: duckdb.DuckDBPyConnection, table: str) -> None:
    """Print whether a table of the build is the same in both audits, and which columns are not."""
    columns = {side: _columns(con, side, table) for side in SIDES}
    shared = [name for name in columns["before"] if name in columns["after"]]
    chosen = ", ".join(shared)
    counts = [con.execute(f"SELECT count(*) FROM {side}.base.{table}").fetchone()[0] for side in SIDES]
    (other,) = con.execute(
        f"""SELECT count(*) FROM (SELECT {chosen} FROM before.base.{table}
            EXCEPT ALL SELECT {chosen} FROM after.base.{table})"""
    ).fetchone()
    equal = not other and counts[0] == counts[1]
    print(f"base.{table}: {counts[0]:,} rows before, {counts[1]:,} after" + (", all equal" if equal else ""))
    keys = ", ".join(KEYS[table])
    (common,) = con.execute(
        f"SELECT count(*) FROM before.base.{table} b JOIN after.base.{table} a USING ({keys})"
    ).fetchone()
    for name in [] if equal else shared:
        differing, largest = con.execute(
            f"""SELECT count(*) FILTER (WHERE b.{name} IS DISTINCT FROM a.{name}), {_difference(columns, name)}
                FROM before.base.{table} b JOIN after.base.{table} a USING ({keys})"""
        ).fetchone()
        if differing:
            told = "" if largest is None else f", by {largest:.2e} of the largest value at most"
            print(f"    {name}: differs in {differing:,} of {common:,} rows{told}")


def _difference(columns: dict[str, dict[str, str]], name: str) -> str:
    numeric = all(columns[side][name] in ("FLOAT", "DOUBLE", "INTEGER", "BIGINT") for side in SIDES)
    return f"max(abs(b.{name} - a.{name})) / max(abs(b.{name}))" if numeric else "NULL"


def _columns(con: duckdb.DuckDBPyConnection, side: str, table: str) -> dict[str, str]:
    found = con.execute(
        """SELECT column_name, data_type FROM duckdb_columns()
           WHERE database_name = ? AND schema_name = 'base' AND table_name = ? ORDER BY column_index""",
        [side, table],
    )
    return dict(found.fetchall())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for side in SIDES:
        parser.add_argument(f"--{side}", type=Path, required=True, metavar="DIR", help="directory of an audit")
    options = parser.parse_args()
    con = attach(options.before, options.after)
    counts = [con.execute(f"SELECT count(*) FROM {side}.base.examples").fetchone()[0] for side in SIDES]
    (same,) = con.execute("SELECT count(*) FROM same_rows").fetchone()
    print(f"{counts[0]:,} rows before, {counts[1]:,} after, {same:,} the same")
    for table in KEYS:
        compare_table(con, table)
    sys.exit(0 if compare_rankings(con) else 1)


if __name__ == "__main__":
    main()
