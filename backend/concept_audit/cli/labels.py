"""``concept-audit label``: names for SAE features."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from concept_audit.cli.flags import option, switch
from concept_audit.cli.opening import JSON, Opening, print_json
from concept_audit.cli.serving import confirmed
from concept_audit.errors import AuditError
from concept_audit.progress import for_this_terminal


@dataclass(frozen=True, kw_only=True)
class Label(Opening):
    """give SAE features labels that tell where they fire: by words, by a language model, or from a file"""

    url: Annotated[
        str | None,
        option(
            "an OpenAI-compatible endpoint that is asked for labels, such as http://localhost:8000/v1 (its key: "
            "OPENAI_API_KEY); texts of the data go there. Left out: labels of the words that tell firing from other texts",
            "URL",
        ),
    ] = None
    model: Annotated[str | None, option("the model's name there", "NAME")] = None
    features: Annotated[str | None, option("only these: 3,17,20-29 (None: all that fire)", "N,...")] = None
    budget: Annotated[int, arg(help="requests that may be sent to the endpoint", metavar="N")] = 1000
    again: Annotated[bool, switch("make those anew that have been made")] = False
    yes: Annotated[bool, switch("do not ask before texts of the data go to another machine")] = False
    export: Annotated[Path | None, option("write all labels to this .csv or .jsonl file, and make none", "FILE")] = None
    take: Annotated[
        Path | None,
        arg(
            name="import",
            help="take labels from a file that --export wrote, or from Neuronpedia's (.jsonl, .json, .csv, .gz)",
            metavar="FILE",
            help_behavior_hint="",
        ),
    ] = None
    json: JSON = False

    def run(self) -> None:
        if bool(self.url) != bool(self.model):
            raise AuditError("--url and --model go together: give both, or neither")
        if sum(map(bool, (self.url, self.export, self.take))) > 1:
            raise AuditError("--url, --export and --import are different things to do; choose one of them")
        wanted = numbers(self.features) if self.features else None
        progress = for_this_terminal()
        labels = self.open(progress).feature_labels
        if self.export:
            count = labels.write(self.export)
            self._tell({"labels": count, "file": str(self.export)}, f"{count:,} labels are in {self.export}")
            return
        if self.take:
            taken, left_out = labels.take(self.take)
            more = "".join(f"; left out {count:,}: {reason}" for reason, count in left_out.most_common())
            self._tell({"labels": taken, "left_out": dict(left_out)}, f"{taken:,} labels taken from {self.take}{more}")
            return
        if self.url and self.model:
            from concept_audit.addresses import is_this_machine
            from concept_audit.evidence.endpoint import Endpoint

            progress.say(f"Pieces of the data's texts go to {self.url}, in at most {self.budget:,} requests")
            if not is_this_machine(self.url):
                confirmed(f"send pieces of the data's texts to {self.url}", self.yes)
            found = labels.from_endpoint(Endpoint(self.url, self.model), wanted, self.budget, self.again)
        else:
            found = labels.from_words(wanted, self.again)
        text = f"{found.made:,} features labelled"
        text += f", {found.before:,} had been before" if found.before else ""
        text += f", {found.too_few:,} fire in too few rows" if found.too_few else ""
        text += f"; {found.requests:,} requests" if self.url else ""
        if found.left:
            text += f"; the budget of {self.budget:,} requests is spent, {found.left:,} features are left: run it again"
        self._tell(dict(vars(found)), text)

    def _tell(self, values: dict, text: str) -> None:
        if self.json:
            print_json(values)
        else:
            print(text)


def numbers(text: str) -> tuple[int, ...]:
    """``3,17,20-29``.

    Raises:
        AuditError: it is something else.
    """
    found: list[int] = []
    for part in text.split(","):
        span = re.fullmatch(r"\s*(?:sae:)?([0-9]{1,9})(?:-([0-9]{1,9}))?\s*", part)
        if span is None or int(span[2] or span[1]) - int(span[1]) not in range(1_000_000):
            raise AuditError(f"--features {text}: {part!r} is no number of a feature, nor a span such as 20-29")
        found += range(int(span[1]), int(span[2] or span[1]) + 1)
    return tuple(dict.fromkeys(found))
