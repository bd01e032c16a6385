"""An SAE that a build is given: whether it belongs to the model, and how it reads its residual stream."""

from __future__ import annotations

from dataclasses import replace

from concept_audit.concepts.sae import SparseAutoencoder, check_fits, load_sae, read_centred
from concept_audit.concepts.sae_identity import OVERRIDE, check_model, reads_centred
from concept_audit.errors import ConceptError
from concept_audit.model.chat import ChatRenderer
from concept_audit.model.identity import centres_writes, known_names
from concept_audit.model.load import LanguageModel
from concept_audit.pipeline.options import BuildOptions
from concept_audit.progress import Progress
from concept_audit.types import Message


def loaded_sae(options: BuildOptions, lm: LanguageModel, progress: Progress) -> SparseAutoencoder | None:
    """The SAE that a build is given, read as it was trained; None where one is to be trained, or none is wanted.

    Raises:
        ConceptError: it cannot be loaded, or it reads another model, place or residual stream than the one here.
    """
    if options.sae in ("train", "none"):
        return None
    with progress.stage(f"Loading the SAE {options.sae}"):
        sae = load_sae(options.sae, lm.device)
    check_fits(sae, lm.name, lm.d_model, lm.n_layers)
    other, wanted = options.sae_from_other_model, options.sae_layer
    trained_on = None if other else check_model(sae.module, sae.name, known_names(lm), lm.fingerprint)
    if trained_on is None:
        named = sae.module.cfg.metadata.model_name or "no model"
        progress.say(f"The SAE {sae.name} says that it was trained on {named}; it is read on {lm.name} unchecked")
    if sae.layer is None and wanted is None:
        raise ConceptError(f"--sae {options.sae}: its metadata do not say at which layer it reads; pass --sae-layer")
    if sae.layer is not None and wanted not in (None, sae.layer) and not other:
        raise ConceptError(
            f"--sae-layer {wanted}: the SAE {sae.name} was trained on layer {sae.layer}; leave the option out, or "
            f"pass {OVERRIDE} to read it there all the same"
        )
    if reads_centred(sae.module, sae.name, centres_writes(lm), other):
        sae = read_centred(sae)
    if sae.module.cfg.metadata.prepend_bos and not _begins_with_bos(lm):
        progress.say(
            f"The SAE {sae.name} was trained on texts that begin with a token for the beginning; rows of "
            f"{lm.name} are rendered without one, as its chat template has them"
        )
    return replace(sae, layer=wanted or sae.layer)


def _begins_with_bos(lm: LanguageModel) -> bool:
    row = ChatRenderer(lm.tokenizer, 64).render((Message("user", "Hello"), Message("assistant", "Hello")))
    return lm.tokenizer.bos_token_id is not None and int(row.input_ids[0]) == lm.tokenizer.bos_token_id
