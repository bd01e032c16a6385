"""How influence is computed: the query, the curvature, and the scoring of rows."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from concept_audit.types import LabelledExample

CurvatureKind = Literal["ekfac", "kfac", "identity"]
FisherKind = Literal["sampled", "empirical"]
TargetKind = Literal["direction", "activation"]
Weights = Literal["auto", "linear", "lora"]
Precision = Literal["auto", "float32", "bfloat16"]
Mode = Literal["auto", "token_sum", "forward"]
Engine = Literal["auto", "index", "exact"]

NO_SCORE = {"changes": "no score"}
"""Marks a field that says how scores are computed and not which: it does not tell rankings apart."""
TOLD_APART = {"changes": "what rows weigh"}
"""Marks a field that rankings are told apart by otherwise: those by advantage say so."""


@dataclass(frozen=True)
class QueryOptions:
    """What influence is measured on.

    Attributes:
        queries: the query examples; None takes a probe's labelled examples, or the rows in which an
            SAE feature fires highest. Those labelled 0 count only in a contrast.
        contrast: the positive queries minus the negative ones.
        own_answers: replace the queries' last responses by what the model itself answers.
        layer: read a probe at this layer; None for the layer that it was trained at.
        target: of an SAE feature, the projection onto its decoder ``direction``, or its ``activation``.
        leave_out_own: score a row that is itself a query example by the other queries, so that no row ranks
            high by its likeness to itself.
    """

    queries: tuple[LabelledExample, ...] | None = None
    contrast: bool = False
    own_answers: bool = False
    layer: int | None = None
    target: TargetKind = "direction"
    leave_out_own: bool = True


@dataclass(frozen=True)
class CurvatureOptions:
    """What stands for the Hessian H, and how it is fitted.

    Attributes:
        curvature: ``ekfac``, ``kfac`` or ``identity``.
        fisher: labels of the gradients, ``sampled`` from the model or ``empirical``, the data's.
        curvature_tokens: fit on rows with this many tokens together.
        damping: added to the curvature, as a share of each layer's mean eigenvalue.
        seed: of the labels that are drawn.
    """

    curvature: CurvatureKind = "ekfac"
    fisher: FisherKind = "sampled"
    curvature_tokens: int = 20_000
    damping: float = 10.0
    seed: int = 0


@dataclass(frozen=True)
class ScoringOptions:
    """How rows are met with the query.

    Attributes:
        blocks: first and last block whose weights count; None for all that the target can reach.
        weights: ``linear``, ``lora``, or ``auto`` for what fine-tuning would train.
        rank: reduce the query to this rank in each layer; None keeps it whole.
        unit_normalised: divide by the norm of each row's gradient over the blocks that count.
        precision: of the scoring pass; ``auto`` is bfloat16 where the processor computes in it.
        mode: ``token_sum``, ``forward``, or ``auto`` for the cheaper one. Changes no score.
        keep_tokens: keep the influence of every token of every row. Changes no score.
        engine: ``index`` reads the gradient index, ``exact`` differentiates every row, and ``auto`` takes the
            index for concept influence where there is one that serves these options.
        partial: score by the linear layers alone where the model has much else to learn with (the experts
            of a mixture, an adapter on the embeddings); without it, such scores are refused.
        alike: count rows that are rollouts alike, as fine-tuning on them would, and not by their advantage.
    """

    blocks: tuple[int, int] | None = None
    weights: Weights = "auto"
    rank: int | None = None
    unit_normalised: bool = False
    precision: Precision = "auto"
    mode: Mode = field(default="auto", metadata=NO_SCORE)
    keep_tokens: bool = field(default=False, metadata=NO_SCORE)
    engine: Engine = field(default="auto", metadata=NO_SCORE)
    partial: bool = False
    alike: bool = field(default=False, metadata=TOLD_APART)


@dataclass(frozen=True)
class InfluenceOptions:
    """How influence is computed; each method reads the parts that concern it.

    Attributes:
        query: what influence is measured on.
        curvature: what stands for the Hessian.
        scoring: how rows are met with the query.
    """

    query: QueryOptions = QueryOptions()
    curvature: CurvatureOptions = CurvatureOptions()
    scoring: ScoringOptions = ScoringOptions()

    @classmethod
    def of(cls, **settings: Any) -> InfluenceOptions:
        """Options that differ from the usual ones in some settings, whichever part they belong to.

        Raises:
            TypeError: no part has a setting of that name.
        """
        return cls().changed(**settings)

    def changed(self, **settings: Any) -> InfluenceOptions:
        """These options with other settings; as `of`."""
        unknown = settings.keys() - {setting.name for part in self.parts() for setting in fields(part)}
        if unknown:
            raise TypeError(f"InfluenceOptions has no setting {', '.join(sorted(unknown))}")
        return InfluenceOptions(*(_with(part, settings) for part in self.parts()))

    def parts(self) -> tuple[QueryOptions, CurvatureOptions, ScoringOptions]:
        """Query, curvature and scoring."""
        return self.query, self.curvature, self.scoring


def _with(part: Any, settings: dict[str, Any]) -> Any:
    return replace(part, **{f.name: settings[f.name] for f in fields(part) if f.name in settings})


def content(part: QueryOptions | CurvatureOptions | ScoringOptions) -> dict[str, Any]:
    """The settings of a part that change scores, to tell rankings apart."""
    return {f.name: getattr(part, f.name) for f in fields(part) if f.metadata not in (NO_SCORE, TOLD_APART)}


ROW_BYTES = (32_768, 131_072)
USUAL_BYTES = 1 << 30
WHOLE_BYTES, AGREEMENT = 65_536, 0.95


@dataclass(frozen=True)
class IndexOptions:
    """How a gradient index is built.

    Attributes:
        row_bytes: kept of each row, one to four numbers a byte; more are more faithful. None for `usual_row_bytes`.
        samples: concepts drawn to learn the projection from.
        layers: where concepts may live; the index tracks the blocks up to the deepest. None for the audit's layers.
        curvature: of the whitening, always EK-FAC; the projection is learned for its damping.
        weights: as in `ScoringOptions`.
        precision: in which the model runs; ``auto`` is bfloat16 where the processor computes in it.
        partial: as in `ScoringOptions`.
        agreement: so few layers are kept that their scores still agree to this correlation with those of all; 1 keeps
            numbers of every layer. None for `usual_agreement`.
    """

    row_bytes: int | None = None
    samples: int = 1024
    layers: tuple[int, ...] | None = None
    curvature: CurvatureOptions = CurvatureOptions()
    weights: Weights = "auto"
    precision: Precision = "auto"
    partial: bool = False
    agreement: float | None = None


def usual_row_bytes(rows: int) -> int:
    """Bytes of a row in an index: as many as keep all rows within `USUAL_BYTES`, but no fewer than 32 KiB, no more than 128.

    Up to 128 KiB more bytes are clearly more faithful, and cost a build next to nothing; a sweep takes as long as all
    rows' bytes are many.
    """
    least, most = ROW_BYTES
    return min(most, max(least, USUAL_BYTES // max(rows, 1) // 1024 * 1024))


def usual_agreement(row_bytes: int) -> float:
    """How far the kept layers of an index agree with all: few layers up to `WHOLE_BYTES` a row, all above.

    A few bits of every layer lose more of the first rows than whole numbers of few layers do; with more bytes all
    layers order the other rows better.
    """
    return 1.0 if row_bytes > WHOLE_BYTES else AGREEMENT
