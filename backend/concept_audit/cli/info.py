"""What an audit holds, in words and as JSON values."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from concept_audit.audit.audit import Audit
from concept_audit.audit.index import agreement_in_words, index_in_words
from concept_audit.errors import StoreError
from concept_audit.pipeline.preview import groups_in_words
from concept_audit.store.layout import Layout
from concept_audit.store.manifest import read_manifest
from concept_audit.store.under_way import reported


def gather(audit: Audit) -> dict[str, Any]:
    """Everything `info` tells, as JSON values."""
    manifest = audit.manifest
    return {
        "audit": str(audit.root),
        "created": manifest.created,
        "configuration": manifest.configuration,
        "fingerprints": manifest.fingerprints,
        "versions": manifest.versions,
        "counts": asdict(audit.overview()),
        "skipped": manifest.report("rows").get("skipped", 0),
        "rollouts": manifest.report("store").get("rollouts"),
        "split": audit.documents.counts(),
        "sae": manifest.report("sae"),
        "index": audit.index.describe(),
        "index_under_way": audit.index.progress(),
        "probes": [
            {"name": p.name, "layer": p.layer, "fit": p.fit, "version": p.version, **p.details}
            for p in audit.probes.list()
        ],
    }


def words(found: dict[str, Any]) -> str:
    """What `gather` found, for people."""
    made, counts, sae = found["configuration"], found["counts"], found["sae"]
    lines = [
        f"{Path(found['audit']).resolve().name} ({found['audit']}), begun {found['created']}",
        f"  data     {made['data']}",
        f"           {counts['n_rows']:,} rows, {counts['n_tokens']:,} tokens, "
        f"{counts['n_response_tokens']:,} of them in responses",
        f"           {counts['n_duplicates']:,} duplicates, {counts['n_truncated']:,} cut at "
        f"{made['max_tokens']:,} tokens, {counts['n_unscored']:,} without a response left to score",
        f"  model    {made['model']} ({made['dtype']}), layers {', '.join(map(str, made['layers']))}",
    ]
    if found["skipped"]:
        lines.insert(3, f"           {found['skipped']:,} rows left out, as they cannot be used (--skipped lists them)")
    if split := found["split"]:
        lines.insert(
            3,
            f"           {split['documents']:,} documents longer than that are split into {split['windows']:,} windows",
        )
    if groups := found["rollouts"]:
        lines.insert(3, f"           {groups_in_words(groups)}")
    if date := made.get("template_date"):
        lines.append(f"           its chat template asks for the day, and was told {date}")
    if made["sae"] == "none":
        lines.append("  SAE      none")
    else:
        lines.append(f"  SAE      {counts['n_features']:,} features that fire, layer {made['sae_layer']}")
    if sae:
        lines.append(f"           held-out explained variance {sae['explained_variance']:.3f}, L0 {sae['l0']:.1f}")
    for probe in found["probes"]:
        lines.append(
            f"  probe    {probe['name']}: layer {probe['layer']}, held-out AUROC {probe['auroc']:.3f} "
            f"({probe['auroc_low']:.3f} to {probe['auroc_high']:.3f})"
        )
    if not found["probes"]:
        lines.append("  probes   none yet; train one with `concept-audit probe` or in the dashboard")
    if under_way := found["index_under_way"]:
        lines.append(f"  index    being built: {under_way['stage']}: {under_way['state']}")
    elif index := found["index"]:
        lines += [f"  index    {index_in_words(index)}", f"           {agreement_in_words(index.get('fidelity'))}"]
    else:
        lines.append("  index    none; `concept-audit index` makes influence of a new concept a matter of seconds")
    lines.append(f"  flags    {counts['n_flagged']:,} rows")
    return "\n".join(lines)


def printable(text: str) -> str:
    """Text of data on one line, without what would move a terminal's cursor."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


def building(root: Path) -> dict[str, Any] | None:
    """How far a build is, as `concept_audit.store.under_way.report`; None if none is at work."""
    layout = Layout(root)
    return reported(layout.shards, layout.progress)


def entry(root: Path) -> dict[str, Any]:
    """What a list of audits says of one."""
    try:
        manifest = read_manifest(Layout(root).manifest)
    except StoreError as error:
        return {"audit": str(root), "state": str(error), "data": "?", "model": "?"}
    now = building(root)
    state = (
        "finished" if manifest.complete else f"being built ({now['stage']}: {now['state']})" if now else "unfinished"
    )
    made = manifest.configuration
    return {"audit": str(root), "state": state, "data": made.get("data"), "model": made.get("model")}
