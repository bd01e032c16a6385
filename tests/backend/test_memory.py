"""Memory does not grow with the data."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import sentence, small_tokenizer, write_jsonl

WIDTH = 256
"""Wide and shallow: the tokens of 3,000 rows more would take 250 MB, were they held at once."""

CHILD = """
import resource, sys
from pathlib import Path
from concept_audit import BuildOptions, ModelOptions, build
from concept_audit.concepts.options import SaeTraining

data, model, out = sys.argv[1:]
build(BuildOptions(data=data, out=Path(out), model=ModelOptions(model, device="cpu"), layers=(1,),
                   sae_training=SaeTraining(expansion=1, k=4, batch=256, min_steps=100, max_steps=100)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory) -> Path:
    import transformers as hf

    torch.manual_seed(0)
    configuration = hf.LlamaConfig(
        vocab_size=400,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    directory = tmp_path_factory.mktemp("wide")
    hf.AutoModelForCausalLM.from_config(configuration).save_pretrained(directory)
    small_tokenizer().save_pretrained(directory)
    return directory


def peak(rows: int, tmp_path: Path, model: Path) -> int:
    """The most memory that a build of so many rows, with an SAE, takes at any time."""
    rng = random.Random(0)
    made = [{"prompt": sentence(rng, 3), "response": sentence(rng, 60)} for _ in range(rows)]
    data = write_jsonl(tmp_path / f"{rows}.jsonl", made)
    command = [sys.executable, "-c", CHILD, str(data), str(model), str(tmp_path / str(rows))]
    # One thread: small steps on many threads crawl where other processes want the same cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, env=environment)
    return int(out.stdout.split()[-1])


def test_a_build_of_four_times_the_rows_takes_no_more_than_a_tenth_more_memory(tmp_path, wide_model):
    small, large = peak(1000, tmp_path, wide_model), peak(4000, tmp_path, wide_model)
    assert large <= 1.1 * small
