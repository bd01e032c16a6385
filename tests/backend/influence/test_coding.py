"""Numbers in few bits: what is lost, where bits go, and how they lie in bytes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from concept_audit.influence.coding import DISTORTION, allocate, order_and_packing, quantise, steps_and_centres
from concept_audit.influence.options import usual_row_bytes
from concept_audit.store.packing import WIDTHS, Packing


def back(values, scales, spread, packing):
    steps, centres = steps_and_centres(packing)
    return (values - centres) * steps * spread * scales[:, None]


@pytest.mark.parametrize(("place", "width"), enumerate(WIDTHS))
def test_what_a_code_loses_of_a_normal_variable_is_what_bits_are_shared_out_by(place, width):
    random = np.random.default_rng(0)
    counts = [0, 0, 0]
    counts[place] = 4000
    packing = Packing(tuple(counts))
    spread = random.uniform(0.1, 10, 4000).astype(np.float32)
    numbers = (random.normal(size=(20, 4000)) * spread * random.uniform(0.01, 100, (20, 1))).astype(np.float32)
    numbers[3], numbers[4] = np.nan, 0
    values, scales = quantise(numbers, spread, packing)
    assert np.isnan(scales[3]) and scales[4] == 0
    sound = [i for i in range(20) if i not in (3, 4)]
    error = np.square((back(values, scales, spread, packing) - numbers)[sound] / spread).sum(1)
    lost = error / np.square(numbers[sound] / spread).sum(1)
    # Eight bits lose next to nothing, so that their figure need not be exact.
    assert lost.mean() == pytest.approx(DISTORTION[width], rel=0.05) if width < 8 else lost.max() < 1e-3


def test_no_other_way_to_share_bits_out_loses_less():
    importance = torch.tensor([9.0, 3.0, 1.0, 0.8, 0.2, 0.0])

    def lost(bits):
        return sum(float(i) * DISTORTION[int(b)] for i, b in zip(importance, bits, strict=True))

    for budget in (2, 8, 14, 24, 40, 48):
        bits = allocate(importance, budget)
        used = int(bits.sum())
        ways = (way for way in itertools.product(DISTORTION, repeat=6) if sum(way) <= used)
        assert used <= budget and lost(bits) == pytest.approx(min(map(lost, ways)))
    assert allocate(importance, 48).tolist() == [8, 8, 8, 8, 8, 0]
    assert not allocate(importance, 1).any()


def test_more_numbers_in_fewer_bits_keep_more_of_a_score_than_fewer_in_eight():
    """Of scores whose numbers fall off as 1/k: by what is lost, and by random rows and queries."""
    random = np.random.default_rng(0)
    importance = 1 / torch.arange(1, 4001.0)
    order, packing = order_and_packing(allocate(importance, 8 * 200))
    rows = random.normal(size=(300, 4000)).astype(np.float32)
    queries = random.normal(size=(4000, 20)) * importance.sqrt().numpy()[:, None]
    truth = rows @ queries
    ones = np.ones(len(order), np.float32)
    coded = back(*quantise(rows[:, order], ones, packing), ones, packing) @ queries[order]
    eight = rows[:, :200] @ queries[:200]
    assert packing.row_bytes <= 200

    def agreement(guess):
        return np.mean([np.corrcoef(g, t)[0, 1] for g, t in zip(guess.T, truth.T, strict=True)])

    assert agreement(coded) > agreement(eight) + 0.05


def test_packed_numbers_come_out_as_they_went_in():
    random = np.random.default_rng(0)
    bits = torch.tensor([0, 2, 8, 4, 2, 2, 4, 0, 2, 2, 8, 4])
    order, packing = order_and_packing(bits)
    assert order.tolist() == [2, 10, 3, 6, 1, 4, 5, 8] and packing == Packing((2, 2, 4))
    assert packing.row_bytes == 4 and packing.numbers == 8
    packing = Packing((5, 8, 12))
    values = np.concatenate(
        [random.integers(-127, 128, (9, 5)), random.integers(0, 16, (9, 8)), random.integers(0, 4, (9, 12))], axis=1
    ).astype(np.int8)
    packed = packing.pack(values)
    assert packed.shape == (9, packing.row_bytes) == (9, 12)
    for dtype in (torch.int8, torch.float32):
        room = torch.empty(32, packing.numbers, dtype=dtype)
        assert (packing.unpack(torch.from_numpy(packed), room).numpy() == values).all()


def test_an_index_keeps_more_of_each_row_where_rows_are_few():
    assert [usual_row_bytes(rows) for rows in (0, 439, 8_192, 16_384, 32_768, 1_000_000)] == [
        131_072,
        131_072,
        131_072,
        65_536,
        32_768,
        32_768,
    ]
