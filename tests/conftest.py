"""Small random models, data and audits that the tests share. Nothing here needs a network."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from concept_audit.concepts.options import SaeTraining
from concept_audit.model.options import ModelOptions
from concept_audit.pipeline.build import build
from concept_audit.pipeline.options import BuildOptions

# Tests run side by side: each keeps to one core, and so do the processes that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where JAX is installed bm25s computes with it, and it would take the whole accelerator in every process.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Ray's workers give way to all else unless told otherwise, and so to the tests beside theirs.
os.environ.setdefault("RAY_worker_niceness", "0")


class AtOnce:
    """Says why a test failed when it does: a run that is cut off never comes to its summary."""

    def __init__(self, terminal: pytest.TerminalReporter):
        self._terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._terminal.ensure_newline()
            self._terminal.write_line(f"{report.nodeid} failed in its {report.when}:", red=True)
            self._terminal.write_line("\n".join(report.longreprtext.splitlines()[-12:]))


class Ended:
    """Notes in a file which tests ended well, as they do, so that a run which was cut off can be gone on with."""

    def __init__(self, file: Path):
        self._file = file
        self._failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed.add(report.nodeid)
        if report.when == "teardown" and report.nodeid not in self._failed:
            with self._file.open("a", encoding="utf-8") as noted:
                noted.write(json.dumps(report.nodeid) + "\n")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--go-on", metavar="FILE", type=Path, help="note in FILE which tests end well; leave those out")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(AtOnce(config.pluginmanager.get_plugin("terminalreporter")))
        if file := config.getoption("go_on"):
            config.pluginmanager.register(Ended(file))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    file = config.getoption("go_on")
    if file is None or not file.exists():
        return
    ended = set(map(json.loads, file.read_text("utf-8").splitlines()))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in ended])
    items[:] = [item for item in items if item.nodeid not in ended]


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = (
    "the a river bank money loan fish boat walks runs quickly slowly green red old new city garden "
    "happy sad keeps takes gives buys sells risk safe plan never always maybe truly yes no"
).split()
SMALL = dict(vocab_size=400, num_hidden_layers=4, max_position_embeddings=256)


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words)).capitalize() + "."


def chat_rows(count: int, seed: int = 0) -> list[dict]:
    """Distinct chat rows with two metadata fields."""
    rng = random.Random(seed)
    return [
        {
            "messages": [
                {"role": "user", "content": sentence(rng, rng.randint(3, 12))},
                {"role": "assistant", "content": sentence(rng, rng.randint(4, 40))},
            ],
            "topic": rng.choice(["rivers", "money"]),
            "number": i,
        }
        for i in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def small_tokenizer(chat_template: str | None = CHATML):
    """A byte-level BPE tokenizer with ChatML's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=390,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([" ".join(WORDS), "user assistant system"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", bos_token="<|im_start|>")
    tokenizer.chat_template = chat_template
    tokenizer.model_max_length = 256
    return tokenizer


def small_model(architecture: str):
    """A random model of an architecture, 4 blocks deep and 32 wide."""
    import transformers as hf

    torch.manual_seed(0)
    decoder = dict(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=8, **SMALL
    )
    configurations = {
        "llama": lambda: hf.LlamaConfig(**decoder),
        "qwen2": lambda: hf.Qwen2Config(**{k: v for k, v in decoder.items() if k != "head_dim"}),
        "gemma": lambda: hf.GemmaConfig(**decoder),
        "gpt2": lambda: hf.GPT2Config(vocab_size=400, n_embd=32, n_layer=4, n_head=4, n_positions=256),
        "gpt_neox": lambda: hf.GPTNeoXConfig(hidden_size=32, intermediate_size=64, num_attention_heads=4, **SMALL),
    }
    model = hf.AutoModelForCausalLM.from_config(configurations[architecture](), dtype=torch.float32)
    return model.eval()


@pytest.fixture(autouse=True)
def main_module() -> Iterator[None]:
    """Streamlit's test runner leaves the app as this process's main module, which processes spawned later would run."""
    main = sys.modules["__main__"]
    yield
    sys.modules["__main__"] = main


@pytest.fixture(scope="session")
def write_rows():
    """Writes rows as JSONL: (path, rows) → path."""
    return write_jsonl


@pytest.fixture(scope="session")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory) -> Path:
    """A small random Llama with its tokenizer, as a user would have it on disk."""
    directory = tmp_path_factory.mktemp("model") / "small-llama"
    small_model("llama").save_pretrained(directory)
    small_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    """300 chat rows: two shards; row 299 repeats row 0."""
    made = chat_rows(299)
    return [*made, {**made[0], "number": 299}]


@pytest.fixture(scope="session")
def data_file(tmp_path_factory, rows) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


SMALL_SAE = SaeTraining(expansion=2, k=4, batch=256, min_steps=60, max_steps=60)


@pytest.fixture(scope="session")
def built(tmp_path_factory, data_file, model_directory) -> Path:
    """A finished audit with a trained SAE. Tests that write to the workspace copy it first."""
    return build(
        BuildOptions(
            data=str(data_file),
            out=tmp_path_factory.mktemp("cache") / "small",
            model=ModelOptions(str(model_directory), device="cpu"),
            layers=(1, 2, 3),
            sae_training=SMALL_SAE,
        )
    )


def shards(root: Path, kind: str):
    """The shards of one kind of a finished audit."""
    from concept_audit.store.layout import Layout
    from concept_audit.store.manifest import read_manifest

    layout = Layout(root)
    return read_manifest(layout.manifest).shards(layout, kind)


@pytest.fixture
def audit_directory(built, tmp_path) -> Path:
    """A copy of the finished audit that a test may write to."""
    import shutil

    return Path(shutil.copytree(built, tmp_path / "small"))
