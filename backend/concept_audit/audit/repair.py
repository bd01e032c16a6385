"""Finding what is damaged in an audit, and having it made again."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

from concept_audit.audit.audit import Audit
from concept_audit.concepts.options import SaeTraining
from concept_audit.data.conversation import Columns
from concept_audit.data.rollouts import RewardColumns
from concept_audit.errors import StoreError
from concept_audit.influence.options import CurvatureOptions, IndexOptions
from concept_audit.model.options import ModelOptions
from concept_audit.pipeline.build import build
from concept_audit.pipeline.options import BuildOptions
from concept_audit.pipeline.place import building, idle
from concept_audit.progress import Progress
from concept_audit.store.health import Finding, delete_damaged, examine
from concept_audit.store.index import present_index
from concept_audit.store.layout import Layout
from concept_audit.store.manifest import Manifest, read_manifest
from concept_audit.store.partition import RowPartition


@dataclass(frozen=True)
class RepairOptions:
    """How a repair runs the model.

    Attributes:
        device: where the model runs; None for where the audit was built.
        trust_remote_code: run the code that comes with a model; what the audit's manifest says of it does not count.
    """

    device: str | None = None
    trust_remote_code: bool = False


def check(root: str | Path) -> list[Finding]:
    """The state of each part of an audit; every file is read.

    Raises:
        StoreError: there is no audit, or not even its manifest can be read.
    """
    return examine(Layout(Path(root)))


def repair(root: str | Path, options: RepairOptions | None = None, progress: Progress | None = None) -> list[Finding]:
    """Delete what is damaged and can be made again, and have the stages make what is missing, and nothing else.

    Labels, probes, flags and the rest of the workspace are not touched.

    Returns:
        the state afterwards.

    Raises:
        StoreError: another process is at work on the audit, or it is beyond repair.
        AuditError: the data or the model are not there any more, or have changed.
    """
    layout, options, progress = Layout(Path(root)), options or RepairOptions(), progress or Progress()
    found = [finding for finding in examine(layout) if finding.wrong]
    if not found:
        return examine(layout)
    index = _index_options(layout)
    with building(layout), idle(layout, "damaged files are to be deleted"):
        delete_damaged(layout, found)
    makers = {finding.maker for finding in found}
    if "build" in makers:
        build(_build_options(layout, read_manifest(layout.manifest), options), progress)
    if "index" in makers and index is not None:
        audit = Audit(layout.root, progress, device=options.device, trust_remote_code=options.trust_remote_code)
        audit.build_index(index, progress, replace=True)
    return examine(layout)


def _build_options(layout: Layout, manifest: Manifest, options: RepairOptions) -> BuildOptions:
    """The options that an audit was built with."""
    made, usual = manifest.configuration, BuildOptions("", layout.root, ModelOptions(""))
    return replace(
        usual,
        data=made["data"],
        model=ModelOptions(
            made["model"], options.device or made.get("device", "auto"), made["dtype"], options.trust_remote_code
        ),
        cache=Path(made["cache"]),
        columns=Columns(**made["columns"]),
        split=made["split"],
        # None where they are as usual; earlier versions did not know them.
        turns=made.get("turns") or usual.turns,
        on_bad_row=made.get("on_bad_row") or usual.on_bad_row,
        long_documents=made.get("long_documents") or usual.long_documents,
        beta=made.get("beta") or usual.beta,
        rewards=RewardColumns(**made["rewards"]) if made.get("rewards") else usual.rewards,
        layers=tuple(made["layers"]),
        sae=made["sae"],
        sae_layer=made["sae_layer"],
        sae_from_other_model=bool(made.get("sae_from_other_model")),
        sae_training=SaeTraining(**made["sae_training"]) if made["sae_training"] else usual.sae_training,
        max_tokens=made["max_tokens"],
        sae_disk=manifest.report("activations").get("sae_disk", usual.sae_disk),
        score_cells=manifest.report("store").get("score_cells", usual.score_cells),
    )


def _index_options(layout: Layout) -> IndexOptions | None:
    """The options that the index was built with; None if there is none that tells them."""
    try:
        rows = read_manifest(layout.manifest).report("rows")["rows"]
        files = present_index(layout, RowPartition(rows))
        about = files.describe() if files else None
    except (StoreError, KeyError):
        return None
    if not about:
        return None
    # Those of later versions are left at their defaults.
    curvature = {f.name: about[f.name] for f in fields(CurvatureOptions) if f.name in about}
    kept = {f.name: about[f.name] for f in fields(IndexOptions) if f.name in about}
    return IndexOptions(**{**kept, "layers": tuple(about["layers"]), "curvature": CurvatureOptions(**curvature)})
