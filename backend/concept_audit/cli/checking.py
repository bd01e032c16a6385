"""Is everything still as it was written: ``check``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from concept_audit.cli.flags import AUDIT, switch
from concept_audit.cli.opening import CACHE, DEFAULT_CACHE, DEVICE, JSON, TRUST, existing, print_json
from concept_audit.progress import for_this_terminal


@dataclass(frozen=True, kw_only=True)
class Check:
    """read every file of an audit, and say what is damaged and what makes it anew; exit status 1 if anything is"""

    audit: AUDIT
    cache: CACHE = DEFAULT_CACHE
    repair: Annotated[
        bool, switch("delete what is damaged and make it again, from the data and with the model of the build")
    ] = False
    device: DEVICE = None
    trust_remote_code: TRUST = False
    json: JSON = False

    def run(self) -> int:
        root = _directory(self.audit, self.cache)
        progress = for_this_terminal()
        with progress.stage("Starting PyTorch and Transformers" if self.repair else f"Reading {root}"):
            from concept_audit.audit.repair import RepairOptions, check, repair

            found = [] if self.repair else check(root)
        if self.repair:
            found = repair(root, RepairOptions(self.device, self.trust_remote_code), progress)
        if self.json:
            print_json([{**asdict(finding), "remedy": finding.remedy} for finding in found])
        else:
            width = max(len(finding.part) for finding in found)
            for finding in found:
                way_out = f" → {finding.remedy}" if finding.remedy else ""
                print(f"{finding.part:{width}}  {finding.state:10}  {finding.detail}{way_out}")
        wrong = any(finding.wrong for finding in found)
        if wrong and not self.repair:
            progress.say(f"Damaged: `concept-audit check {root} --repair` makes again what can be")
        return int(wrong)


def _directory(audit: str, cache: Path) -> Path:
    """The directory of an audit, of which nothing but the copy of its manifest may be left."""
    from concept_audit.store.layout import Layout

    for path in (Path(audit).expanduser(), cache / audit):
        if Layout(path).manifest_copy.exists():
            return path
    return existing(audit, cache)
