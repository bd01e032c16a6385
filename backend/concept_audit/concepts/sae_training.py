"""Training a BatchTopK SAE (Bussmann et al. 2024, arXiv 2412.06410) with SAELens on the audit's own data.

The trainer is SAELens'; what is here is the feeding: shards of token activations in
an order that depends on seed, epoch and step alone, and checkpoints, so that a
training that is killed goes on to the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from concept_audit.concepts.options import SaeTraining
from concept_audit.concepts.sae import SparseAutoencoder, load_sae
from concept_audit.errors import first_line
from concept_audit.files import atomic_directory, move_files, partial_name, remove, remove_leftovers
from concept_audit.model.exact import in_float64
from concept_audit.model.precision import native_bfloat16
from concept_audit.progress import Stage

BUFFER_TOKENS = 1 << 15
CHECKPOINT_EVERY = 100
REPORT_EVERY = 10
HELD_OUT = 16
"""The last sixteenth of each block is kept from training and measures the result."""

Read = Callable[[], np.ndarray]


@dataclass(frozen=True)
class SaeQuality:
    """How well the SAE reconstructs tokens that it did not train on.

    Attributes:
        explained_variance: 1 − Σ‖x − x̂‖² / Σ‖x − x̄‖².
        l0: features that fire at a token, on average.
        n_tokens: tokens measured on.
    """

    explained_variance: float
    l0: float
    n_tokens: int


class TokenFeed:
    """Batches of tokens in an order that only seed and step decide.

    Blocks are read in a shuffled order into a buffer of bounded size, from which
    batches are drawn; memory is the buffer's, however many the blocks.

    Args:
        blocks: how many tokens each block has, and what reads it: float32 [tokens, d_model].
    """

    def __init__(self, blocks: Sequence[tuple[int, Read]], batch: int, seed: int):
        self._blocks, self._batch, self._seed = [read for _, read in blocks], batch, seed
        self._kept = [size - size // HELD_OUT for size, _ in blocks]
        self.batches_per_epoch = sum(self._kept) // batch

    def from_step(self, step: int) -> Iterator[np.ndarray]:
        """Batches float32 [batch, d_model] from the given step on, without end."""
        epoch, skipped = divmod(step, self.batches_per_epoch)
        while True:
            yield from islice(self._epoch(epoch), skipped, None)
            epoch, skipped = epoch + 1, 0

    def held_out(self) -> Iterator[np.ndarray]:
        """The tokens kept from training, a block at a time."""
        for read, kept in zip(self._blocks, self._kept, strict=True):
            yield read()[kept:]

    def _epoch(self, epoch: int) -> Iterator[np.ndarray]:
        rng = np.random.default_rng([self._seed, epoch])
        buffer: list[np.ndarray] = []
        waiting = 0
        for number in rng.permutation(len(self._blocks)):
            buffer.append(self._blocks[number]()[: self._kept[number]])
            waiting += self._kept[number]
            if waiting >= BUFFER_TOKENS:
                # Half stays behind, so that tokens of blocks far apart meet in a batch.
                tokens = _emptied(buffer)
                order = rng.permutation(waiting)
                drawn = max(waiting // 2 // self._batch, 1) * self._batch
                yield from self._batches(tokens, order[:drawn])
                buffer, waiting = [tokens[order[drawn:]]], waiting - drawn
        tokens = _emptied(buffer)
        yield from self._batches(tokens, rng.permutation(waiting))

    def _batches(self, tokens: np.ndarray, order: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(order) - self._batch + 1, self._batch):
            yield tokens[order[start : start + self._batch]]


def _emptied(buffer: list[np.ndarray]) -> np.ndarray:
    """The blocks as one; the list lets go of them, so that they are not held twice."""
    joined = np.concatenate(buffer)
    buffer.clear()
    return joined


def train_sae(
    feed: TokenFeed,
    steps: int,
    d_model: int,
    layer: int,
    settings: SaeTraining,
    device: torch.device,
    checkpoints: Path,
    out: Path,
    stage: Stage,
    about: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> SaeQuality:
    """Train on token activations and save the SAE for inference to `out`, in one step.

    Args:
        steps: how many batches; see `SaeTraining.steps`.
        layer: where the activations come from, in blocks run.
        checkpoints: directory for the state while training; removed at the end.
        stage: told the steps, with explained variance and L0 of the latest batch.
        about: metadata to save with it: whose activations these are; see `concepts.sae_identity.check_model`.
        say: told in a sentence if the state of an interrupted training cannot be read and it begins anew.
    """

    def anew() -> Any:
        return _trainer(steps, d_model, layer, settings, device)

    trainer = _resumed(anew, checkpoints, say)
    if trainer is not None:
        stage.skip(trainer.n_training_steps)
    else:
        trainer = anew()
        _prepare(trainer, list(islice(feed.from_step(0), 8)))
    batches = feed.from_step(trainer.n_training_steps)
    while trainer.n_training_steps < steps:
        trainer.maybe_reset_sparsity()
        with torch.autocast(device.type, torch.bfloat16, enabled=native_bfloat16(device)):
            output = trainer.step(torch.from_numpy(next(batches)))
        trainer.n_training_steps += 1
        report = trainer.n_training_steps % REPORT_EVERY == 0
        stage.advance(1, _describe(output) if report else None)
        if trainer.n_training_steps % CHECKPOINT_EVERY == 0 and trainer.n_training_steps < steps:
            _save_checkpoint(trainer, checkpoints)
    trainer.sae.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)
    trainer.set_final_sae_metadata()
    for name, value in (about or {}).items():
        trainer.sae.cfg.metadata[name] = value
    partial = partial_name(out)
    partial.mkdir(parents=True)
    trainer.sae.save_inference_model(str(partial))
    quality = _measure(load_sae(str(partial), device), feed)
    move_files(partial, out)
    remove_checkpoints(checkpoints)
    return quality


def _trainer(steps: int, d_model: int, layer: int, settings: SaeTraining, device: torch.device) -> Any:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(settings.seed)
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=d_model,
            d_sae=settings.expansion * d_model,
            k=settings.k,
            device=str(device),
            dtype="float32",
            normalize_activations="expected_average_only_in",
        )
    )
    sae.cfg.metadata.hook_name = f"blocks.{layer - 1}.hook_resid_post"
    configuration = SAETrainerConfig(
        total_training_samples=steps * settings.batch,
        train_batch_size_samples=settings.batch,
        lr=settings.lr,
        lr_end=settings.lr / 10,
        lr_scheduler_name="cosineannealing",
        lr_warm_up_steps=min(50, steps // 10),
        device=str(device),
        dead_feature_window=max(20, steps // 10),
    )
    return SAETrainer(configuration, sae, data_provider=iter(()))


def _resumed(anew: Callable[[], Any], checkpoints: Path, say: Callable[[str], None]) -> Any | None:
    """A trainer in the state that was kept last; None if none is there or it cannot be read, and is then deleted."""
    for path in reversed(_checkpoints(checkpoints)):
        trainer = anew()
        try:
            trainer.sae.load_weights_from_checkpoint(path)
            trainer.load_trainer_state(path)
        except Exception as error:  # SAELens and PyTorch raise whatever their parts do
            # Half an hour of training is no reason to refuse the build: a trainer that half took it is not gone on with.
            say(f"The interrupted training of the SAE cannot go on ({path.name}: {first_line(error)}) and begins anew")
            remove(path)
        else:
            return trainer
    return None


def _prepare(trainer: Any, batches: Sequence[np.ndarray]) -> None:
    """Set the input scale, and let the decoder's bias take the mean off before training begins."""
    tokens = torch.from_numpy(np.concatenate(batches)).to(trainer.sae.W_dec.device)
    trainer.activation_scaler.scaling_factor = (tokens.shape[1] ** 0.5 / tokens.norm(dim=1).mean()).item()
    with torch.no_grad():
        trainer.sae.b_dec.copy_(trainer.activation_scaler(tokens).mean(0))


def _describe(output: Any) -> str:
    with torch.no_grad():
        error = (output.sae_out - output.sae_in).square().sum()
        spread = (output.sae_in - output.sae_in.mean(0)).square().sum()
        l0 = (output.feature_acts > 0).sum(1).float().mean()
    return f"explained variance {1 - (error / spread).item():.2f}, L0 {l0.item():.0f}"


def _measure(sae: SparseAutoencoder, feed: TokenFeed) -> SaeQuality:
    total, squares, errors, firings, count = torch.zeros(()), 0.0, 0.0, 0, 0
    with torch.inference_mode():
        for tokens in feed.held_out():
            inputs = torch.from_numpy(tokens).to(sae.module.W_dec.device)
            features = sae.module.encode(inputs)
            errors += in_float64(sae.module.decode(features) - inputs).square().sum().item()
            firings += int((features > 0).sum())
            wide = in_float64(inputs)
            squares += wide.square().sum().item()
            total = total + wide.sum(0)
            count += len(tokens)
    if not count:
        return SaeQuality(float("nan"), float("nan"), 0)
    spread = squares - (total.square().sum() / count).item()
    return SaeQuality(1 - errors / spread, firings / count, count)


def _save_checkpoint(trainer: Any, checkpoints: Path) -> None:
    name = f"step-{trainer.n_training_steps:08}"
    with atomic_directory(checkpoints / name) as partial:
        trainer.save_checkpoint(partial.name, base_path=checkpoints)
    for other in _checkpoints(checkpoints):
        if other.name != name:
            remove(other)


def remove_checkpoints(checkpoints: Path) -> None:
    """Delete the states of a training; the directory too, if nothing else is in it."""
    for path in _checkpoints(checkpoints):
        remove(path)
    remove_leftovers(checkpoints)
    with suppress(OSError):
        checkpoints.rmdir()


def _checkpoints(checkpoints: Path) -> list[Path]:
    """The states that are kept, the earliest first."""
    return sorted(checkpoints.glob("step-[0-9]*"))
