"""Making audits: ``build``, ``demo``, ``index``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import OmitArgPrefixes, arg

from concept_audit.cli.engines import EngineFlags, working
from concept_audit.cli.flags import flags, made, switch
from concept_audit.cli.opening import CACHE, DEFAULT_CACHE, JSON, Running, print_json
from concept_audit.cli.serving import Server, agreed
from concept_audit.data.demo import DemoKind
from concept_audit.errors import AuditError, FinishedIndexError
from concept_audit.influence.options import IndexOptions
from concept_audit.pipeline.options import BuildOptions
from concept_audit.progress import for_this_terminal
from concept_audit.store.remote import is_address

SAE_FLAGS = {"epochs": "sae-epochs", "expansion": "sae-features", "k": "sae-k"}
NICENESS = 15
"""Of work behind the app: while a page computes, it gets a thirtieth of a core at most."""
if TYPE_CHECKING:
    BuildFlags = Any
else:
    BuildFlags = flags(
        BuildOptions,
        names={
            "model.name": "model",
            **{f"columns.{name}": f"{name}-column" for name in ("messages", "prompt", "response", "text")},
            **{f"rewards.{name}": f"{name}-column" for name in ("advantage", "reward", "group")},
            **{f"sae_training.{name}": flag for name, flag in SAE_FLAGS.items()},
        },
        without=(
            "sae_disk",
            "score_cells",
            *(f"sae_training.{n}" for n in ("batch", "min_steps", "max_steps", "lr", "seed")),
        ),
        types={"out": str | None},
    )


if TYPE_CHECKING:
    IndexFlags = Any
else:
    IndexFlags = flags(IndexOptions, names={"row_bytes": "bytes"}, without=("curvature.curvature",))


@dataclass(frozen=True, kw_only=True)
class Build:
    """make an audit of a data set, or go on making it"""

    build: BuildFlags
    engine: EngineFlags
    dry_run: Annotated[bool, switch("say what the data are taken for and how the first rows are read, and stop")] = (
        False
    )

    def run(self) -> None:
        options = self.build_options()
        progress = for_this_terminal()
        if self.dry_run:
            from concept_audit.pipeline.preview import dry_run

            dry_run(options, progress)
            return
        with progress.stage("Starting PyTorch and Transformers"):
            from concept_audit.pipeline.build import build
        with working(self.engine) as engine:
            root = build(options, progress, engine)
        progress.say(f"The audit is ready: concept-audit serve {root}")

    def build_options(self) -> BuildOptions:
        """The options that were typed.

        Raises:
            AuditError: a number is less than 1.
        """
        typed: Any = self.build
        out = typed.out or typed.cache / Path(typed.data).name.split(".")[0]
        out = out if is_address(str(out)) else Path(out)
        options = made(BuildOptions, typed, out=out)
        numbers = {flag: getattr(options.sae_training, name) for name, flag in SAE_FLAGS.items()}
        numbers["max-tokens"] = options.max_tokens
        wrong = [f"--{flag} {value}" for flag, value in numbers.items() if value is not None and value < 1]
        if wrong:
            raise AuditError(f"{', '.join(wrong)}: must be 1 or more")
        return options


@dataclass(frozen=True, kw_only=True)
class Demo:
    """build the demo audit and open it in a browser"""

    server: Annotated[Server, OmitArgPrefixes] = Server()
    kind: Annotated[DemoKind, arg(help="of training data: each has an audit of its own")] = "chats"
    cache: CACHE = DEFAULT_CACHE
    no_serve: Annotated[bool, switch("build it, but do not open it")] = False
    rebuild: Annotated[bool, switch("build it anew; labels, probes and flags stay")] = False

    def run(self) -> int | None:
        progress = for_this_terminal()
        if not self.no_serve:
            from concept_audit.serve import dashboard

            dashboard()  # says what is missing before anything is built
        with progress.stage("Starting PyTorch and Transformers"):
            from concept_audit.audit.demo import build_demo, finish_demo
        audit = build_demo(self.cache, progress, self.rebuild, self.server.device, self.kind)
        progress.say(f"The demo audit is ready in {audit.root}")
        indexed = self.kind == "chats"
        if self.no_serve:
            finish_demo(audit, progress, self.kind)
            progress.say("Its gradient index and influence rankings are ready" if indexed else "Its rankings are ready")
            return None
        device = ["--device", self.server.device] if self.server.device else []
        command = ["demo", "--no-serve", "--kind", self.kind, "--cache", str(self.cache), *device]
        with _in_background(command, audit.root / "index.log"):
            progress.say(
                "The gradient index is built meanwhile; the dashboard says how far it is"
                if indexed
                else "The rows are ranked by influence meanwhile"
            )
            return self.server.start(audit.root, self.cache)


@contextmanager
def _in_background(arguments: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run another command of this program meanwhile; it ends with the body, and goes on where it was next time.

    It gives way to others, so that pages open as if nothing were built; where nobody looks, it has every core.
    """
    with log.open("w") as out:
        command = [sys.executable, "-P", "-m", "concept_audit.cli", *arguments]
        below = getattr(subprocess, "BELOW_NORMAL_PRIORITY_CLASS", 0)  # Windows'
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, creationflags=below)
        if hasattr(os, "setpriority"):
            # Linux counts threads by themselves: those that the process starts later inherit it.
            with suppress(OSError):  # it has ended, or we ourselves give way more than that
                os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


@dataclass(frozen=True, kw_only=True)
class Index(Running):
    """build the gradient index: the influence of a new concept in seconds"""

    index: IndexFlags
    engine: EngineFlags
    replace: Annotated[bool, switch("delete a finished index that was made with other options, without asking")] = False
    json: JSON = False

    def run(self) -> None:
        progress, options = for_this_terminal(), made(IndexOptions, self.index)
        with working(self.engine) as engine:
            audit = self.open(progress, engine)
            try:
                found = audit.build_index(options, replace=self.replace)
            except FinishedIndexError as error:
                if not agreed(f"{error}\nReplace it?"):
                    raise
                found = audit.build_index(options, replace=True)
        if self.json:
            print_json(found)
            return
        progress.say(f"The gradient index is ready. {audit.index.agreement()}")
