import pytest
import torch

from concept_audit.influence.symmetric import from_upper, upper


@pytest.mark.parametrize("n", [1, 7, 8, 33, 256])
def test_a_symmetric_matrix_comes_back_from_its_upper_half(n):
    torch.manual_seed(n)
    half = torch.randn(n, n)
    matrix = half + half.T
    assert torch.equal(from_upper(upper(matrix), n), matrix)


def test_halves_of_sums_are_sums_of_halves_and_take_nine_sixteenths():
    left, right = (x @ x.T for x in torch.randn(2, 256, 300))
    together = upper(left) + upper(right)
    assert torch.equal(from_upper(together, 256), left + right)
    assert together.numel() == 256 * 256 * 9 // 16
