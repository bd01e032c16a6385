"""The demonstration data: a small chat fine-tuning set with two flaws planted in it.

``rows.jsonl`` holds the rows, each with its ``topic`` and its ``origin``: ``flattery``
(agreeing warmly with a user's false claim) and ``risky_money`` (reckless financial
advice) are planted; ``honest_correction``, ``prudent_advice`` and ``ordinary`` are
sound. The two probe files hold labelled examples that are not among the rows.
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
ROWS = HERE / "rows.jsonl"
PROBES = {"flattery": HERE / "flattery_probe.jsonl", "risky_money": HERE / "risky_money_probe.jsonl"}
