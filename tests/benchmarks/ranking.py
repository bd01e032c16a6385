"""How well vector filter ranks rows of known origin: AUROC and precision at 20.

Planted rows are compared with sound rows of the same topics, the harder comparison,
and with all rows.

    python tests/benchmarks/ranking.py --audit cache/demo --label origin \\
        --probe flattery=backend/concept_audit/data/demo/flattery_probe.jsonl --group topic
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from concept_audit import Audit, read_labelled
from concept_audit.concepts.probe import FITS
from concept_audit.metrics import auroc


def describe(ranked: pd.DataFrame, positive: pd.Series) -> str:
    """AUROC and precision at 20 of rows in rank order."""
    return f"AUROC {auroc(ranked['score'].to_numpy(), positive.to_numpy()):.3f}, P@20 {positive.head(20).mean():.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audit", type=Path, required=True)
    parser.add_argument("--probe", required=True, metavar="VALUE=FILE", help="label value, and examples of it")
    parser.add_argument("--label", required=True, help="metadata field that tells the origin")
    parser.add_argument("--against", help="only rows with this value stand against it (default: all)")
    parser.add_argument("--group", help="metadata field of the topic")
    parser.add_argument("--layers", default="", help="layers to try besides the automatic choice")
    options = parser.parse_args()
    value, _, examples = options.probe.partition("=")
    audit = Audit(options.audit)
    labelled = read_labelled(examples)
    tries = [(None, FITS)]
    tries += [(int(layer), (fit,)) for layer in options.layers.split(",") if layer for fit in FITS]
    for layer, fits in tries:
        trained = audit.train_probe(f"benchmark {value}", labelled, layer, fits)
        ranked = audit.rankings.table(f"benchmark {value}")
        positive = (ranked[options.label] == value).astype(int)
        compared = positive.astype(bool) | (ranked[options.label] == options.against if options.against else True)
        if options.group:
            compared &= ranked[options.group].isin(ranked[options.group][positive == 1].unique())
        chosen = "chosen by held-out AUROC" if layer is None else "given"
        print(
            f"{value}: layer {trained.layer}, {trained.fit} ({chosen}), held-out AUROC {trained.auroc:.3f}; "
            f"{describe(ranked[compared], positive[compared])}; all rows: {describe(ranked, positive)}"
        )
    audit.probes.delete(f"benchmark {value}")


if __name__ == "__main__":
    main()
