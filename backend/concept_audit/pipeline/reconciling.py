"""Whether a build goes on with what an earlier one made, or takes its place."""

from __future__ import annotations

from contextlib import suppress

from concept_audit.errors import StoreError
from concept_audit.pipeline.place import idle
from concept_audit.store.layout import Layout
from concept_audit.store.manifest import BESIDE, Manifest, read_manifest

UNCOUNTED = ("data", "model", "cache", "device", "threads", BESIDE)
"""Settings that may change: of names of data and model their content counts, and where it runs changes nothing."""


def reconciled(layout: Layout, wanted: Manifest, rebuild: bool) -> Manifest:
    """The manifest to go on with, where there is one: the earlier build's if it is the same, else the wanted one.

    Args:
        rebuild: replace an audit that was made with other settings.

    Raises:
        StoreError: there is one that was made with other settings, and it is not to be replaced.
    """
    if rebuild:
        earlier = _earlier(layout)
        if earlier is None:
            with idle(layout, "its shards are of another version"):
                layout.shards.remove_all()
            return wanted
        wanted.stages = earlier.stages
        if (earlier.configuration, earlier.fingerprints) != (wanted.configuration, wanted.fingerprints):
            # From here on it is not the audit that these settings made.
            wanted.stages.get("store", {})["done"] = False
        return wanted
    found = read_manifest(layout.manifest)
    before = {**found.configuration, **{f"{k} (content)": v for k, v in found.fingerprints.items()}}
    after = {**wanted.configuration, **{f"{k} (content)": v for k, v in wanted.fingerprints.items()}}
    names = [name for name in {**before, **after} if name not in UNCOUNTED]
    ours = [name for name in names if before.get(name) != after.get(name)]
    if ours:
        was = {n: _short(before[n]) if n in before else "not recorded" for n in ours}
        changes = "; ".join(f"{n} was {was[n]}, is now {_short(after.get(n))}" for n in ours)
        raise StoreError(
            f"{layout.root}: an audit made with other settings ({changes}). Choose another --out, or "
            "pass --rebuild to replace what the build found; labels, probes and flags are kept"
        )
    for name in ("device", "threads"):
        found.configuration[name] = wanted.configuration[name]
    return found


def _earlier(layout: Layout) -> Manifest | None:
    """The manifest or, if that is damaged, its copy; None where this version can read neither."""
    for path in (layout.manifest, layout.manifest_copy):
        with suppress(StoreError):
            return read_manifest(path)
    return None


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
