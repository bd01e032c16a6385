"""The command line: ``concept-audit``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from concept_audit import cli_validate
from concept_audit.errors import AuditError, StoreError
from concept_audit.progress import Progress, for_this_terminal
from concept_audit.store.layout import audit_names
from concept_audit.types import METHODS

DEFAULT_CACHE = Path("cache")
FLAG_HELP = "rows with any flag (any), with none (none), or with the flag of this name"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    # The libraries' own bars would write across ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    options = parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except AuditError as error:
        print(f"concept-audit: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nconcept-audit: interrupted; the same command goes on where this one was", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has gone; keep Python from complaining when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = argparse.ArgumentParser(
        prog="concept-audit",
        description="See which rows of a training set push a language model towards a concept, and take them out.",
        epilog="Start with `concept-audit demo`. Each command has its own --help.",
    )
    top.add_argument("--version", action="version", version=_version())
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_build(commands)
    _add_probe(commands)
    _add_index(commands)
    _add_rank(commands)
    cli_validate.add(_add(commands, "validate", cli_validate.run, cli_validate.SUMMARY, "required"))
    _add_export(commands)
    _add_serve(commands)
    _add_info(commands)
    return top


def _add(
    commands, name: str, run: Callable, summary: str, audit: Literal["", "required", "optional"] = ""
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=summary)
    command.set_defaults(run=run)
    if audit:
        nargs = "?" if audit == "optional" else None
        command.add_argument(
            "audit", metavar="AUDIT", nargs=nargs, help="directory of the audit, or its name within the cache"
        )
    command.add_argument(
        "--cache",
        type=Path,
        default=DEFAULT_CACHE,
        metavar="DIR",
        help="where audits and built-in models are kept (default: %(default)s)",
    )
    return command


def _add_demo(commands) -> None:
    demo = _add(commands, "demo", _demo, "build the demo audit and open it in a browser")
    demo.add_argument("--no-serve", action="store_true", help="build it, but do not open it")
    demo.add_argument("--rebuild", action="store_true", help="build it anew; labels, probes and flags stay")
    _add_server_options(demo)


def _add_build(commands) -> None:
    build = _add(commands, "build", _build, "make an audit of a data set, or go on making it")
    build.add_argument(
        "--data",
        required=True,
        metavar="DATA",
        help="a JSONL, JSON, CSV, TSV or Parquet file, a directory saved by `datasets`, or a data set's "
        "name on the Hugging Face hub",
    )
    build.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help="smollm2-135m-instruct (built in), a model directory, a name on the Hugging Face hub, or a "
        "PEFT adapter in either place",
    )
    build.add_argument("--out", type=Path, metavar="DIR", help="directory of the audit (default: CACHE/DATA's name)")
    build.add_argument(
        "--layers",
        type=_layers,
        metavar="8,12,16",
        help="layers to keep, each counted in blocks run (default: three around the middle)",
    )
    build.add_argument(
        "--sae",
        default="train",
        metavar="train|none|PATH|RELEASE:ID",
        help="train a sparse autoencoder on this data (default), do without, load one from a directory, or "
        "load one that SAELens knows on the hub",
    )
    build.add_argument("--sae-layer", type=int, metavar="N", help="layer of the SAE (default: the middle one)")
    build.add_argument("--sae-epochs", type=int, metavar="N", help="passes over the tokens in SAE training")
    build.add_argument("--sae-features", type=int, metavar="N", help="features per dimension of the model (default: 4)")
    build.add_argument("--sae-k", type=int, metavar="N", help="features that fire at a token, on average (default: 24)")
    build.add_argument(
        "--max-tokens", type=int, metavar="N", help="cut rows at this length (default: the context, 2048 at most)"
    )
    build.add_argument("--split", default="train", help="split of a saved or hub data set (default: train)")
    build.add_argument("--messages-column", metavar="NAME", help="column with the list of turns")
    build.add_argument("--prompt-column", metavar="NAME", help="column with the prompt")
    build.add_argument("--response-column", metavar="NAME", help="column with the response")
    build.add_argument("--text-column", metavar="NAME", help="column with plain text, all of it to be learnt")
    build.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the fastest there is)")
    build.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16 (default: by device)")
    build.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    build.add_argument(
        "--rebuild",
        action="store_true",
        help="replace an audit made with other settings; labels, probes and flags stay",
    )


def _add_probe(commands) -> None:
    probe = _add(commands, "probe", _probe, "train a linear probe from labelled examples", "required")
    probe.add_argument(
        "--examples",
        metavar="FILE",
        required=True,
        help='JSONL rows with "messages" and "label" (1 shows the behaviour, 0 does not)',
    )
    probe.add_argument("--name", required=True, help="what to call it; an earlier probe of that name is replaced")
    probe.add_argument("--layer", type=int, metavar="N", help="layer (default: chosen by held-out AUROC)")
    probe.add_argument(
        "--fit",
        choices=["auto", "difference_of_means", "logistic_regression"],
        default="auto",
        help="how to fit it (default: chosen by held-out AUROC)",
    )


def _add_index(commands) -> None:
    index = _add(
        commands, "index", _index, "build the gradient index: the influence of a new concept in seconds", "required"
    )
    index.add_argument(
        "--bytes",
        type=int,
        dest="numbers",
        metavar="N",
        help="of each row, a number a byte (default: 32768); more are more faithful",
    )
    index.add_argument(
        "--samples", type=int, metavar="N", help="concepts drawn to learn the projection from (default: 1024)"
    )
    index.add_argument(
        "--layers",
        type=_layers,
        metavar="8,12,16",
        help="where concepts may live; the index tracks the blocks up to the deepest (default: the audit's layers)",
    )
    index.add_argument("--fisher", choices=["sampled", "empirical"], help="as in rank")
    index.add_argument("--curvature-tokens", type=int, metavar="N", help="as in rank (default: 20000)")
    index.add_argument(
        "--damping", type=float, metavar="X", help="that the projection is learned for (default: as in rank)"
    )
    index.add_argument("--weights", choices=["auto", "linear", "lora"], help="as in rank")
    index.add_argument("--precision", choices=["auto", "float32", "bfloat16"], help="as in rank")
    index.add_argument("--seed", type=int, help="of what is drawn (default: 0)")


def _add_rank(commands) -> None:
    rank = _add(commands, "rank", _rank, "write the rows in order of their influence on a concept", "required")
    rank.add_argument("--concept", required=True, metavar="NAME", help="a probe's name, or sae:N for an SAE feature")
    rank.add_argument(
        "--method",
        default="vector_filter",
        metavar="METHOD",
        help=f"how to score rows: {', '.join(METHODS)} (default: %(default)s)",
    )
    rank.add_argument("--top", type=int, metavar="N", help="only the first N rows (default: all)")
    _add_output(rank)
    queries = rank.add_argument_group("queries", "the examples that influence is measured on")
    queries.add_argument(
        "--queries",
        metavar="FILE",
        help='rows with "messages", and "label" 0 for negative ones (default: the probe\'s labelled examples, '
        "or the rows in which an SAE feature fires highest)",
    )
    queries.add_argument("--contrast", action="store_true", help="the positive queries minus the negative ones")
    queries.add_argument("--own-answers", action="store_true", help="let the model itself answer the queries' prompts")
    influence = rank.add_argument_group("influence", "how concept_influence and its kin are computed")
    influence.add_argument(
        "--curvature", choices=["ekfac", "kfac", "identity"], default="ekfac", help="default: %(default)s"
    )
    influence.add_argument(
        "--layer", type=int, metavar="L", help="read a probe at this layer (default: where it was trained)"
    )
    influence.add_argument(
        "--target",
        choices=["direction", "activation"],
        default="direction",
        help="of an SAE feature: the projection onto its decoder direction, or its activation (default: %(default)s)",
    )
    influence.add_argument(
        "--fisher",
        choices=["sampled", "empirical"],
        default="sampled",
        help="labels of the curvature: drawn from the model, or the data's (default: %(default)s)",
    )
    influence.add_argument(
        "--curvature-tokens",
        type=int,
        default=20_000,
        metavar="N",
        help="fit the curvature on rows with this many tokens together (default: %(default)s)",
    )
    influence.add_argument(
        "--damping",
        type=float,
        default=10.0,
        metavar="X",
        help="added to the curvature, as a share of its mean eigenvalue (default: %(default)s)",
    )
    influence.add_argument(
        "--blocks", type=_block_range, metavar="A-B", help="only the weights of these blocks count (default: all)"
    )
    influence.add_argument(
        "--weights",
        choices=["auto", "linear", "lora"],
        default="auto",
        help="every linear layer, or an adapter's LoRA weights (default: what fine-tuning would train)",
    )
    influence.add_argument(
        "--rank", type=int, metavar="R", help="reduce the query to this rank in each layer (default: keep it whole)"
    )
    influence.add_argument("--unit-normalised", action="store_true", help="divide by the norm of each row's gradient")
    influence.add_argument(
        "--precision",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="of the scoring pass (default: bfloat16 where the processor computes in it)",
    )
    influence.add_argument(
        "--mode",
        choices=["auto", "token_sum", "forward"],
        default="auto",
        help="differentiate backward or forward (default: the cheaper; the scores are the same)",
    )
    engine = influence.add_mutually_exclusive_group()
    engine.add_argument(
        "--exact",
        dest="engine",
        action="store_const",
        const="exact",
        default="auto",
        help="differentiate every row, though there is a gradient index",
    )
    engine.add_argument(
        "--index",
        dest="engine",
        action="store_const",
        const="index",
        help="read the gradient index, or say why that cannot be (default: read it where it serves the options)",
    )
    influence.add_argument("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")
    influence.add_argument("--keep-tokens", action="store_true", help="keep the influence of every token of every row")


def _add_export(commands) -> None:
    export = _add(
        commands, "export", _export, "write the flagged rows, or those that a filter lets through", "required"
    )
    export.add_argument("--flag", default="any", metavar="any|none|NAME", help=FLAG_HELP + " (default: any)")
    export.add_argument("--all", action="store_true", help="every row, flagged or not")
    export.add_argument("--text", default="", help="only rows with this text in prompt or response")
    export.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        type=_condition,
        help="only rows with this metadata value; may be repeated",
    )
    export.add_argument(
        "--schema",
        choices=["audit", "own"],
        default="audit",
        help="columns: audit (prompt, response, flag, metadata; the default) or own (those of the input, as they were)",
    )
    export.add_argument("--concept", metavar="NAME", help="put the scores of this concept beside each row")
    export.add_argument(
        "--method", default="vector_filter", choices=METHODS, help="of these scores (default: vector_filter)"
    )
    export.add_argument(
        "--exact-csv",
        action="store_true",
        help="CSV that reads back as it was; without it, cells that a spreadsheet would take for a formula begin "
        "with an apostrophe",
    )
    _add_output(export)


def _add_serve(commands) -> None:
    serve = _add(commands, "serve", _serve, "open the dashboard in a browser", "optional")
    _add_server_options(serve)


def _add_info(commands) -> None:
    info = _add(commands, "info", _info, "say what an audit holds; without AUDIT, list those in the cache", "optional")
    info.add_argument("--json", action="store_true", help="write it as JSON")


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--format", choices=["csv", "jsonl", "parquet"], default="csv", help="default: %(default)s")
    command.add_argument("--out", metavar="FILE", help="write to this file (default: standard output)")


def _add_server_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--port", type=int, help="port of the dashboard (default: 8501, or the next free one)")
    command.add_argument(
        "--address",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s, this machine only; the dashboard has no password)",
    )
    command.add_argument("--no-browser", action="store_true", help="print the address instead of opening a browser")
    command.add_argument(
        "--read-only", action="store_true", help="offer nothing that changes an audit: no flags, labels or names"
    )


def _demo(options: argparse.Namespace) -> int:
    progress = _started()
    with progress.stage("Starting PyTorch and Transformers"):
        from concept_audit.audit.demo import build_demo, finish_demo
    audit = build_demo(options.cache, progress, options.rebuild)
    progress.say(f"The demo audit is ready in {audit.root}")
    if options.no_serve:
        finish_demo(audit, progress)
        progress.say("Its gradient index and influence rankings are ready")
        return 0
    with _in_background(["demo", "--no-serve", "--cache", str(options.cache)], audit.root / "index.log"):
        progress.say("The gradient index is built meanwhile; the dashboard says how far it is")
        return _run_app(audit.root, options)


@contextmanager
def _in_background(arguments: Sequence[str], log: Path) -> Iterator[None]:
    """Run another command of this program meanwhile; it ends with the body, and goes on where it was next time."""
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "concept_audit.cli", *arguments], stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
        try:
            yield
        finally:
            process.terminate()
            process.wait()


def _build(options: argparse.Namespace) -> int:
    progress = _started()
    with progress.stage("Starting PyTorch and Transformers"):
        from concept_audit import BuildOptions, Columns, ModelOptions, build
        from concept_audit.concepts.options import SaeTraining
    chosen = {"epochs": options.sae_epochs, "expansion": options.sae_features, "k": options.sae_k}
    settings = {name: value for name, value in chosen.items() if value is not None}
    wrong = [f"--sae-{name} {value}" for name, value in settings.items() if value < 1]
    if wrong or (options.max_tokens is not None and options.max_tokens < 1):
        raise AuditError(f"{', '.join(wrong) or f'--max-tokens {options.max_tokens}'}: must be 1 or more")
    root = build(
        BuildOptions(
            data=options.data,
            out=options.out or options.cache / Path(options.data).name.split(".")[0],
            model=ModelOptions(options.model, options.device, options.dtype, options.trust_remote_code),
            cache=options.cache,
            columns=Columns(
                options.messages_column, options.prompt_column, options.response_column, options.text_column
            ),
            split=options.split,
            layers=options.layers,
            sae=options.sae,
            sae_layer=options.sae_layer,
            sae_training=SaeTraining(**settings),
            max_tokens=options.max_tokens,
            rebuild=options.rebuild,
        ),
        progress,
    )
    progress.say(f"The audit is ready: concept-audit serve {root}")
    return 0


def _probe(options: argparse.Namespace) -> int:
    progress = _started()
    audit = _open(options.audit, options.cache, progress)
    from concept_audit import read_labelled
    from concept_audit.concepts.probe import FITS

    fits = FITS if options.fit == "auto" else (options.fit,)
    trained = audit.train_probe(options.name, read_labelled(options.examples), options.layer, fits)
    low, high = trained.auroc_interval
    print(
        f"{options.name}: layer {trained.layer}, {trained.fit.replace('_', ' ')}, held-out AUROC "
        f"{trained.auroc:.3f} (95% interval {low:.3f} to {high:.3f}) from {trained.n_positive} positive and "
        f"{trained.n_negative} negative examples"
    )
    return 0


def _index(options: argparse.Namespace) -> int:
    progress = _started()
    audit = _open(options.audit, options.cache, progress)
    from concept_audit import IndexOptions

    names = ("numbers", "samples", "fisher", "curvature_tokens", "damping", "weights", "precision", "seed")
    chosen = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    told = audit.build_index(IndexOptions(**chosen), options.layers)["fidelity"]
    progress.say(
        f"The gradient index is ready. Against exact scores of {told['rows']} rows and {told['concepts']} new "
        f"concepts: Spearman {told['spearman']:.3f} (least {told['spearman_least']:.3f}), overlap of the top "
        f"{told['top']} rows {told['overlap']:.0%} (least {told['overlap_least']:.0%})"
    )
    return 0


def _rank(options: argparse.Namespace) -> int:
    if options.top is not None and options.top < 1:
        raise AuditError(f"--top {options.top}: must be 1 or more")
    progress = _started()
    audit = _open(options.audit, options.cache, progress)
    from concept_audit import InfluenceOptions, read_prompts, read_queries
    from concept_audit.export import write

    read = read_prompts if options.own_answers else read_queries
    names = (
        "contrast",
        "own_answers",
        "layer",
        "target",
        "curvature",
        "fisher",
        "curvature_tokens",
        "damping",
        "blocks",
        "weights",
        "rank",
        "unit_normalised",
        "precision",
        "seed",
        "mode",
        "keep_tokens",
        "engine",
    )
    influence = InfluenceOptions.of(
        queries=tuple(read(options.queries)) if options.queries else None,
        **{name: getattr(options, name) for name in names},
    )
    table = audit.rankings.table(options.concept, options.method, options.top, options=influence)
    write(table, options.format, options.out)
    return 0


def _export(options: argparse.Namespace) -> int:
    audit = _open(options.audit, options.cache, Progress())
    from concept_audit import RowFilter

    metadata: dict[str, tuple[str, ...]] = {}
    known = set(audit.rows.metadata_fields()["field"])
    for name, value in options.where:
        if name not in known:
            raise AuditError(
                f"--where {name}=...: no such metadata field; there are {', '.join(sorted(known)) or 'none'}"
            )
        metadata[name] = (*metadata.get(name, ()), value)
    where = RowFilter(text=options.text, metadata=metadata, flag="" if options.all else options.flag)
    out = Path(options.out) if options.out and options.out != "-" else None
    told = audit.exports.write(
        out, options.format, where, options.schema, options.concept, options.method, exact=options.exact_csv
    )
    if out is not None:
        print(f"{told['rows']:,} rows in {out}, and how they came about in {out}.manifest.json", file=sys.stderr)
    elif not told["rows"]:
        print("concept-audit: no rows pass; flag some in the dashboard, or pass --all", file=sys.stderr)
    return 0


def _serve(options: argparse.Namespace) -> int:
    root = _existing(options.audit, options.cache) if options.audit else None
    if root is None and not audit_names(options.cache):
        raise StoreError(f"{options.cache}: no audits there yet; make one with `concept-audit demo` or `build`")
    return _run_app(root, options)


def _info(options: argparse.Namespace) -> int:
    from concept_audit import info

    if options.audit is None:
        print(info.listing(options.cache, audit_names(options.cache), options.json))
    else:
        audit = _open(options.audit, options.cache, Progress())
        print(info.as_json(audit) if options.json else info.as_text(audit))
    return 0


def _find(audit: str, cache: Path) -> Path:
    """The directory of an audit given by path or by name."""
    path = Path(audit).expanduser()
    if not (path / "manifest.json").exists() and (cache / audit / "manifest.json").exists():
        return cache / audit
    return path


def _existing(audit: str, cache: Path) -> Path:
    """As `_find`; refuses a place where there is no audit."""
    root = _find(audit, cache)
    if not (root / "manifest.json").exists():
        known = audit_names(cache)
        there = (
            f"; {cache} has {', '.join(known)}"
            if known
            else f"; {cache} has none yet, make one with `concept-audit demo`"
        )
        raise StoreError(f"{audit}: no audit there{there}")
    return root


def _open(audit: str, cache: Path, progress: Progress):
    root = _existing(audit, cache)
    from concept_audit import Audit

    return Audit(root, progress)


def _run_app(root: Path | None, options: argparse.Namespace) -> int:
    from concept_audit.serve import serve

    return serve(root, options.cache, options.address, options.port, options.no_browser, options.read_only)


def _started() -> Progress:
    return for_this_terminal()


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers such as 8,12,16") from None


def _block_range(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    try:
        return int(first), int(last if dash else first)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a range of blocks such as 10-15") from None


def _condition(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=VALUE")
    return name, value


def _version() -> str:
    import importlib.metadata

    try:
        return f"concept-audit {importlib.metadata.version('concept-audit')}"
    except importlib.metadata.PackageNotFoundError:
        return "concept-audit (not installed)"


if __name__ == "__main__":
    sys.exit(main())
