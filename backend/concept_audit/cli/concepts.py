"""Concepts: ``probe``, ``concepts``, ``features``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from concept_audit.cli.flags import option, switch
from concept_audit.cli.opening import JSON, Opening, Running, print_json, print_table
from concept_audit.progress import Progress

CONCEPT = Annotated[str, arg(metavar="NAME", help="a probe's name, or sae:N for an SAE feature")]


@dataclass(frozen=True, kw_only=True)
class Probe(Running):
    """train a linear probe from labelled examples"""

    examples: Annotated[
        str, arg(metavar="FILE", help='JSONL rows with "messages" and "label" (1 shows the behaviour, 0 does not)')
    ]
    name: Annotated[str, arg(help="what to call it; an earlier probe of that name is replaced")]
    layer: Annotated[int | None, option("layer (None: chosen by held-out AUROC)", "N")] = None
    fit: Annotated[
        Literal["auto", "difference_of_means", "logistic_regression"],
        arg(help="how to fit it; auto is chosen by held-out AUROC"),
    ] = "auto"
    json: JSON = False

    def run(self) -> None:
        audit = self.open()
        from concept_audit.concepts.probe import FITS
        from concept_audit.data.read import read_labelled

        fits = FITS if self.fit == "auto" else (self.fit,)
        trained = audit.train_probe(self.name, read_labelled(self.examples), self.layer, fits)
        low, high = trained.auroc_interval
        if self.json:
            found = {
                "name": self.name,
                "layer": trained.layer,
                "fit": trained.fit,
                "auroc": trained.auroc,
                "auroc_low": low,
                "auroc_high": high,
                "n_positive": trained.n_positive,
                "n_negative": trained.n_negative,
            }
            print_json(found)
            return
        print(
            f"{self.name}: layer {trained.layer}, {trained.fit.replace('_', ' ')}, held-out AUROC "
            f"{trained.auroc:.3f} (95% interval {low:.3f} to {high:.3f}) from {trained.n_positive} positive and "
            f"{trained.n_negative} negative examples"
        )


@dataclass(frozen=True, kw_only=True)
class Concepts(Opening):
    """list the concepts of an audit: its probes"""

    all: Annotated[bool, switch("SAE features too")] = False
    json: JSON = False

    def run(self) -> None:
        found = self.open(Progress()).concepts.list(live_only=True)
        shown = found if self.all else found[found["kind"] == "probe"]
        print_table(shown[["concept_id", "name", "kind", "layer", "label", "version"]], self.json)


@dataclass(frozen=True, kw_only=True)
class Features(Opening):
    """search the SAE features of an audit by label and token"""

    search: Annotated[
        str, Positional, arg(metavar="TEXT", help="in the label, the top tokens, or the tokens that it promotes")
    ] = ""
    order: Annotated[
        Literal["telling", "max_activation", "density", "rarest", "feature_id"],
        arg(help="which come first; telling ones fire on a word, strongly, and in few rows"),
    ] = "telling"
    top: Annotated[int, arg(help="how many")] = 20
    dead: Annotated[bool, switch("those too that never fire on the data")] = False
    json: JSON = False

    def run(self) -> None:
        audit = self.open(Progress())
        found = audit.concepts.features(self.search, self.order, live_only=not self.dead).head(self.top)
        if not self.json:
            for name in ("top_tokens", "promoted"):
                found[name] = [" ".join(repr(str(token))[1:-1] for token in tokens[:5]) for tokens in found[name]]
        print_table(found, self.json)
