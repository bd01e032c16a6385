"""What is added to the residual stream of the runs that steer: the concept that rows are ranked by, and how far rows spread."""

from __future__ import annotations

from concept_audit.errors import ConceptError
from concept_audit.evidence.steering import Steering, spread
from concept_audit.influence.vector_filter import vector_filter
from concept_audit.pipeline.sources import Sources
from concept_audit.pipeline.validation.setting import Setting
from concept_audit.store.activations import read_means


def steering_of(sources: Sources, setting: Setting) -> Steering:
    """The direction that rows are ranked by, no part of what measures, and its spread over the rows to train on.

    Raises:
        ConceptError: the audit does not keep the concept's layer, or all rows are alike in the concept.
    """
    concept = setting.concept
    if concept.layer not in sources.layers:
        raise ConceptError(
            f"--steer: how far rows spread along {concept.name} is read from activations at layer {concept.layer}, and "
            f"this audit keeps layers {', '.join(map(str, sources.layers))}; build it with this layer, or leave --steer out"
        )
    means = read_means(sources.shards("activations"), concept.layer)
    unit = spread(vector_filter(means, concept.direction[:, None])[setting.ids, 0])
    if not unit > 0:
        raise ConceptError(f"--steer: all rows are alike in {concept.name}, so it has no unit; leave --steer out")
    return Steering(concept.direction, unit)
