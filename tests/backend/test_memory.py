"""Memory does not grow with the data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import chat_rows, write_jsonl

CHILD = """
import resource, sys
from pathlib import Path
from backend import BuildOptions, ModelOptions, build
from backend.concepts.sae_training import SaeTraining

data, model, out = sys.argv[1:]
build(BuildOptions(data=data, out=Path(out), model=ModelOptions(model, device="cpu"), layers=(1, 2),
                   sae_training=SaeTraining(expansion=2, k=4, batch=256, min_steps=100, max_steps=100)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(rows: int, tmp_path: Path, model: Path) -> int:
    data = write_jsonl(tmp_path / f"{rows}.jsonl", chat_rows(rows))
    command = [sys.executable, "-c", CHILD, str(data), str(model), str(tmp_path / str(rows))]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    return int(out.stdout.split()[-1])


def test_a_build_of_four_times_the_rows_takes_no_more_than_a_tenth_more_memory(tmp_path, model_directory):
    small, large = peak(1500, tmp_path, model_directory), peak(6000, tmp_path, model_directory)
    assert large <= 1.1 * small
