"""What of an audit is as it was written, what is damaged, and who makes it anew."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from concept_audit.errors import StoreError, first_line
from concept_audit.files import digest, is_leftover
from concept_audit.store.database_files import opening_error, opens
from concept_audit.store.index import INDEX, present_index
from concept_audit.store.layout import Layout
from concept_audit.store.manifest import ON_REQUEST, STAGE_OF, Manifest, read_manifest
from concept_audit.store.partition import RowPartition
from concept_audit.store.shard_files import lies_in_storage
from concept_audit.store.shard_store import COMMITTED, TENSORS, RowShards, is_as_written, open_tensors, read_about

State = Literal["right", "damaged", "absent", "unfinished"]
Maker = Literal["copy", "build", "index", "request", "nobody"]
REMEDIES: dict[Maker, str] = {
    "copy": "its copy takes its place",
    "build": "the build makes it again, and nothing else",
    "index": "`concept-audit index` makes it again",
    "request": "made again when it is next asked for",
    "nobody": "put a backup of it in its place; nothing here touches it",
}
UNSUMMED = {"sae": ("cfg.json", "sae_weights.safetensors"), "store": ("audit.duckdb",)}
"""Stage → the files that it makes, where the manifest does not name them."""
SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """The state of one part of an audit.

    Attributes:
        part: what it is, such as ``rows`` or ``gradient index``.
        state: whether it is as it was written.
        detail: how much there is of it, or what is wrong.
        maker: who makes it again.
        files: the damaged ones, which may be deleted.
    """

    part: str
    state: State
    detail: str
    maker: Maker
    files: tuple[Path, ...] = ()

    @property
    def wrong(self) -> bool:
        """Whether something is to be done about it."""
        return self.state in ("damaged", "absent")

    @property
    def remedy(self) -> str:
        """What makes it anew; empty if nothing is to be done."""
        return REMEDIES[self.maker] if self.wrong else ""


def examine(layout: Layout) -> list[Finding]:
    """Read every file of an audit, and compare it with what its description or the manifest says of it.

    Raises:
        StoreError: neither the manifest nor its copy can be read, or another version wrote them.
    """
    found = []
    try:
        manifest = read_manifest(layout.manifest)
        found.append(Finding("manifest", "right", f"begun {manifest.created}", "copy"))
    except StoreError as error:
        try:
            manifest = read_manifest(layout.manifest_copy)
        except StoreError:
            raise error from None
        state: State = "damaged" if layout.manifest.exists() else "absent"
        found.append(Finding("manifest", state, f"{layout.manifest}: cannot be read", "copy"))
    found += _stages(layout, manifest)
    if manifest.configuration.get("sae") == "train":
        found.append(_recorded("SAE", layout.sae, manifest, "sae"))
    found.append(_recorded("store", layout.root, manifest, "store"))
    if manifest.report("rows"):
        found += _index(layout, RowPartition(manifest.report("rows")["rows"]))
    found += _on_demand(layout)
    found.append(_workspace(layout))
    return found


def damage(path: Path) -> str | None:
    """What is wrong with a file that the shard store commits; None if nothing is."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text("utf-8"))
        elif not is_as_written(path):
            return "its content is not what was written"
    except FileNotFoundError:
        return "absent"
    except StoreError:
        if path.exists():
            return "cut off, or its description is damaged"
        return "its content in object storage is not what was put there" if lies_in_storage(path) else "absent"
    except (OSError, ValueError) as error:
        return first_line(error)
    return None


def _stages(layout: Layout, manifest: Manifest) -> Iterator[Finding]:
    """The shards of each stage, in the order in which the build came to them."""
    for stage, entry in manifest.stages.items():
        for kind in (kind for kind, of in STAGE_OF.items() if of == stage):
            if not manifest.report("rows"):
                yield Finding(kind, "unfinished", "the rows are still to be read", "build")
                continue
            shards = manifest.shards(layout, kind)
            asked_for = kind in ON_REQUEST
            if asked_for and not shards.file("").is_dir():
                continue
            yield _shards(kind, shards, "request" if asked_for else "build", entry["done"] and not asked_for)


def _shards(part: str, shards: RowShards, maker: Maker, complete: bool) -> Finding:
    """Shards of rows.

    Args:
        complete: there is to be every one.
    """
    damaged, absent = {}, []
    for number in range(len(shards.partition)):
        path = shards.path(number)
        wrong = damage(path)
        if wrong is None and read_about(path).get("rows") != shards.partition.size(number):
            wrong = f"it holds other than {shards.partition.size(number)} rows"
        if wrong == "absent":
            absent.append(path)
        elif wrong:
            damaged[path] = wrong
    if damaged:
        return _damaged(part, damaged, maker)
    there = len(shards.partition) - len(absent)
    told = f"{there:,} of {len(shards.partition):,} shards, {shards.partition.rows:,} rows"
    if absent and complete:
        return Finding(part, "absent", f"{told}; the first that is not there: {absent[0]}", maker)
    return Finding(part, "unfinished" if absent else "right", told, maker)


def _recorded(part: str, directory: Path, manifest: Manifest, stage: str) -> Finding:
    """Files whose checksums are in the manifest: of the SAE, and of the store."""
    if not manifest.stages.get(stage, {}).get("done"):
        return Finding(part, "unfinished", "the build has not come to it yet", "build")
    # Earlier versions kept no checksums; whether the files are there, and can be opened, is told all the same.
    names: dict[str, Any] = manifest.report(stage).get("files") or dict.fromkeys(UNSUMMED[stage])
    damaged = {}
    for name, written in names.items():
        path = directory / name
        if not path.is_file():
            return Finding(part, "absent", f"{path}", "build")
        if (written and digest(path) != written) or not _opens(path):
            damaged[path] = "its content is not what was written"
    if damaged:
        return _damaged(part, damaged, "build")
    return Finding(part, "right", ", ".join(names), "build")


def _opens(path: Path) -> bool:
    if path.suffix != f".{TENSORS}":
        return path.suffix != ".duckdb" or opens(path)
    try:
        with open_tensors(path, "pt") as file:
            return bool(file.keys())
    except StoreError:
        return False


def _index(layout: Layout, partition: RowPartition) -> Iterator[Finding]:
    files = present_index(layout, partition)
    if files is None:
        return
    part = "gradient index"
    try:
        about = files.describe() or {}
    except StoreError:
        yield _damaged(part, {files.description: "cannot be read"}, "index")
        return
    if not about.get("done"):
        yield Finding(part, "unfinished", "`concept-audit index` goes on with it", "index")
        return
    projections = (files.sides, *(files.projection(block) for block in range(1, about["blocks"][1] + 1)))
    broken = {path: wrong for path in projections if (wrong := damage(path))}
    if broken:
        # Another projection may differ in its last digits: rows are coded again with the one that they are read with.
        rows = {files.rows.path(n): "coded with it" for n in range(len(partition)) if files.rows.path(n).exists()}
        yield _damaged(part, {**broken, **rows}, "index")
    else:
        yield _shards(part, files.rows, "index", True)


def _on_demand(layout: Layout) -> Iterator[Finding]:
    """What is computed when it is asked for: curvature factors, rankings' queries, runs of validations."""
    root = layout.shards.root
    for kind in sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else ():
        if kind.name in STAGE_OF or kind.name == INDEX:
            continue
        paths = sorted(p for p in kind.rglob("*") if p.suffix in COMMITTED and not is_leftover(p.name))
        damaged = {path: wrong for path in paths if (wrong := damage(path))}
        if damaged:
            yield _damaged(kind.name, damaged, "request")
        elif paths:
            yield Finding(kind.name, "right", f"{len(paths):,} files", "request")


def _workspace(layout: Layout) -> Finding:
    path = layout.workspace
    if not path.exists():
        return Finding("workspace", "right", "none yet", "nobody")
    wrong = opening_error(path)
    if wrong:
        return Finding("workspace", "damaged", f"{path}: {wrong}", "nobody")
    return Finding("workspace", "right", f"{path.stat().st_size:,} bytes; it opens", "nobody")


def _damaged(part: str, files: dict[Path, str], maker: Maker) -> Finding:
    shown = [f"{path}: {wrong}" for path, wrong in list(files.items())[:SHOWN]]
    more = [f"and {len(files) - SHOWN:,} more"] if len(files) > SHOWN else []
    return Finding(part, "damaged", "; ".join(shown + more), maker, tuple(files))


def delete_damaged(layout: Layout, findings: Sequence[Finding]) -> None:
    """Delete damaged files that can be made again, and put the manifest's copy in its place.

    Hold the audit's locks meanwhile.
    """
    for finding in findings:
        if finding.part == "manifest" and finding.wrong:
            read_manifest(layout.manifest_copy).write(layout)
        if finding.maker != "nobody":
            layout.shards.delete(path for path in finding.files if layout.shards.root in path.parents)
            for path in finding.files:
                path.unlink(missing_ok=True)
