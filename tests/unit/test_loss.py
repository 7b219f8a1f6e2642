"""Chunked losses against whole logits."""

from __future__ import annotations

import pytest
import torch

from fp_client.loss import chunk_positions, chunked_loss, response_positions, streamed_loss


def case(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((13, 8), generator=generator).to(dtype).requires_grad_()
    return hidden, torch.randn((50, 8), generator=generator).to(dtype), torch.randint(0, 50, (13,), generator=generator)


def whole(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, softcap: float | None) -> torch.Tensor:
    logits = (hidden @ weight.T).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk", [1, 5, 13, 100])
def test_chunked_loss_and_gradient_equal_whole_logits(softcap: float | None, chunk: int) -> None:
    hidden, weight, labels = case()
    found = chunked_loss(hidden, weight, labels, softcap, chunk)
    (3 * found).backward()
    gradient, hidden.grad = hidden.grad, None
    expected = whole(hidden, weight, labels, softcap).sum()
    (3 * expected).backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, hidden.grad)


def test_gradient_is_the_derivative() -> None:
    hidden, weight, labels = case(torch.float64)

    def loss(h: torch.Tensor) -> torch.Tensor:
        return chunked_loss(h, weight, labels, 2.0, 4).double()

    # The logits are fp32 inside, so the step is wide.
    assert torch.autograd.gradcheck(loss, (hidden,), eps=1e-2, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("rows", [1, 7, 50])
def test_streamed_loss_equals_whole_logits(softcap: float | None, rows: int) -> None:
    hidden, weight, labels = case()
    head = [(first, weight[first : first + rows]) for first in range(0, 50, rows)]
    with torch.no_grad():
        torch.testing.assert_close(streamed_loss(hidden, labels, head, softcap), whole(hidden, weight, labels, softcap))


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, labels = case()
    with torch.no_grad():
        found = chunked_loss(1e3 * hidden, weight, labels)
        assert torch.isfinite(found)
        torch.testing.assert_close(found, whole(1e3 * hidden, weight, labels, None).sum())


def test_logits_never_exceed_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = torch.logsumexp

    def spy(logits: torch.Tensor, **kwargs: object) -> torch.Tensor:
        seen.append(logits.shape[0])
        return real(logits, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "logsumexp", spy)
    hidden, weight, labels = case()
    chunked_loss(hidden, weight, labels, chunk=4)
    assert seen == [4, 4, 4, 1]


def test_chunk_is_at_least_one_position() -> None:
    assert chunk_positions(49152) == 85
    assert chunk_positions(1 << 30) == 1


def test_positions_predict_the_next_counted_token() -> None:
    hidden = torch.arange(4.0).reshape(1, 4, 1)
    states, labels = response_positions(hidden, torch.tensor([[-100, -100, 7, 8]]))
    assert states[:, 0].tolist() == [1, 2]
    assert labels.tolist() == [7, 8]
