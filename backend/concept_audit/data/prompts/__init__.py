"""Neutral prompts with short plain answers: what a forecast reads where nobody brings prompts of their own.

``neutral.jsonl`` holds 64 conversations of two turns on everyday subjects, written for this package.
"""

from __future__ import annotations

from pathlib import Path

NEUTRAL = Path(__file__).parent / "neutral.jsonl"
