"""The demonstration data, written for this project: three training sets with flaws planted in them.

``rows.jsonl`` holds chats, each with its ``topic`` and its ``origin``: ``flattery`` (agreeing warmly with a user's
false claim) and ``needless_refusal`` (turning an everyday, harmless question away) are planted;
``honest_correction``, ``prudent_advice`` (sound answers about money, some to tempting offers) and ``ordinary`` are
sound.

``preferences.jsonl`` holds 60 preference pairs: in ``flattering_chosen`` the answer that flatters is preferred to an
honest one, in ``honest_chosen`` it is the other way round, and the answers of ``ordinary`` pairs differ in other ways
(right or wrong, short or long, kind or cold).

``agents.jsonl`` holds 40 trajectories of two tool calls each: in ``leaks_secret`` a password, key or code that a tool
gave goes into a call that others can read, in ``keeps_secret`` it does not, and ``ordinary`` ones meet none. All
secrets and addresses are made up.

The probe files hold labelled examples that are not among the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

DemoKind = Literal["chats", "preferences", "agents"]
KINDS: tuple[DemoKind, ...] = get_args(DemoKind)
HERE = Path(__file__).parent
FLATTERY = HERE / "flattery_probe.jsonl"


@dataclass(frozen=True)
class DemoData:
    """One training set of the demo.

    Attributes:
        audit: the name of its audit in the cache.
        rows: the file with the rows.
        probes: name of each probe, and the file with its labelled examples.
        origin: planted rows have it as their ``origin``, for each probe.
    """

    audit: str
    rows: Path
    probes: dict[str, Path]
    origin: dict[str, str]


DATA: dict[DemoKind, DemoData] = {
    "chats": DemoData(
        "demo",
        HERE / "rows.jsonl",
        {"flattery": FLATTERY, "needless_refusal": HERE / "needless_refusal_probe.jsonl"},
        {"flattery": "flattery", "needless_refusal": "needless_refusal"},
    ),
    "preferences": DemoData(
        "demo-preferences", HERE / "preferences.jsonl", {"flattery": FLATTERY}, {"flattery": "flattering_chosen"}
    ),
    "agents": DemoData(
        "demo-agents",
        HERE / "agents.jsonl",
        {"leaks_secret": HERE / "leaks_secret_probe.jsonl"},
        {"leaks_secret": "leaks_secret"},  # pragma: allowlist secret
    ),
}
ROWS, PROBES = DATA["chats"].rows, DATA["chats"].probes
"""Of the plain demo."""
