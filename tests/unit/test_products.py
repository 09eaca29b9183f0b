"""Products by oneDNN: those of `F.linear` within rounding, whatever the shape."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cofiprune.inference import products
from cofiprune.inference.products import onednn_is_faster, product


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the products that oneDNN computes, as on a machine where it is faster."""
    rows: list[int] = []
    stock = products._by_onednn

    def note(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows.append(states.numel() // states.shape[-1])
        return stock(states, weight, bias)

    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "_by_onednn", note)
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    return rows


def pair(*shape: int, outputs: int = 160, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, (outputs, shape[-1]), (outputs,))
    states, weight, bias = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return states, weight, bias


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((1, 128, 256), 128),
        ((3, 43, 256), 160),  # 129 rows, in steps of 32
        ((2, 3, 11, 256), 96),
        ((40, 256), 64),
        ((2, 1200, 256), 2400),  # large enough for its own number of rows
    ],
)
@pytest.mark.parametrize("biased", [True, False])
def test_it_is_the_linear_map(seen: list[int], shape: tuple[int, ...], rows: int, biased: bool) -> None:
    states, weight, bias = pair(*shape)
    given = bias if biased else None
    with torch.inference_mode():
        found, expected = product(states, weight, given), F.linear(states, weight, given)
        turned = product(states.transpose(0, -2).contiguous().transpose(0, -2), weight, given)
    assert seen == [rows, rows]
    for each in (found, turned):
        assert each.shape == expected.shape
        torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 31, 4096), (64, 8), (0, 64, 256), (256,), (2, 0, 256)])
def test_small_products_stay_with_torch(seen: list[int], shape: tuple[int, ...]) -> None:
    states, weight, bias = pair(*shape)
    with torch.no_grad():
        assert torch.equal(product(states, weight, bias), F.linear(states, weight, bias))
    assert not seen


def test_other_precisions_stay_with_torch(seen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        for dtype in (torch.float64, torch.bfloat16):
            states, weight, bias = pair(2, 64, 256, dtype=dtype)
            assert torch.equal(product(states, weight, bias), F.linear(states, weight, bias))
        states, weight, bias = pair(2, 64, 256)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert product(states, weight, bias).dtype == torch.bfloat16
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
        product(states, weight, bias)
    assert not seen


def test_what_is_faster_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "in_turn", lambda passes, device, runs: [[2.0] * runs, [1.0] * runs])
    assert onednn_is_faster.__wrapped__() == torch.backends.mkldnn.is_available()
    monkeypatch.setattr(products, "in_turn", lambda passes, device, runs: [[1.0] * runs, [1.0] * runs])
    assert onednn_is_faster.__wrapped__() is False


def test_another_release_of_torch_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object) -> Tensor:
        raise AttributeError("no _linear_pointwise")

    monkeypatch.setattr(products, "_by_onednn", missing)
    assert onednn_is_faster.__wrapped__() is False
