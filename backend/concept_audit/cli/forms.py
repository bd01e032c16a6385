"""What people type for values that are more than one word or number."""

from __future__ import annotations


def layers(text: str) -> tuple[int, ...]:
    """``8,12,16``."""
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise ValueError(f"{text!r} is not a list of layers such as 8,12,16") from None


def blocks(text: str) -> tuple[int, int]:
    """``10-15``, or ``10`` for one block."""
    first, dash, last = text.partition("-")
    try:
        return int(first), int(last if dash else first)
    except ValueError:
        raise ValueError(f"{text!r} is not a range of blocks such as 10-15") from None


def numbers(text: str) -> tuple[float, ...]:
    """``0.05,0.1``."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r}: write numbers, such as 0.1 or 0.05,0.1,0.2") from None


def listed(text: str) -> tuple[str, ...]:
    """``a,b,c``."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def whole_numbers(text: str) -> tuple[int, ...]:
    """``3,17``."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r}: write numbers such as 3 or 3,17") from None
