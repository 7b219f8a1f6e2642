"""Token loss without the logits: never more than a chunk of positions, or of vocabulary rows, at a time.

With a vocabulary of 49k–128k the logits of one batch would be the largest tensor of a training step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from fp_client.template import IGNORE

LOGITS_BYTES = 16 << 20
"""Room for one chunk's fp32 logits; three such blocks live at the peak."""


def chunk_positions(vocabulary: int) -> int:
    """Positions whose fp32 logits fill `LOGITS_BYTES`."""
    return max(1, LOGITS_BYTES // (4 * vocabulary))


def response_positions(hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The states that predict a response token, and those tokens.

    hidden (B, T, d), labels (B, T) -> (N, d), (N,): position t predicts the label at t + 1.
    """
    counted = labels[:, 1:] != IGNORE
    return hidden[:, :-1][counted], labels[:, 1:][counted]


class _ChunkedLoss(torch.autograd.Function):
    """Summed cross entropy; the gradient of each chunk is made in the forward pass, so no logits are kept."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, softcap: float | None, chunk: int
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, hidden.shape[0], chunk):
            part, target = hidden[start : start + chunk], labels[start : start + chunk, None]
            logits = (part @ weight.T).float()  # (n, V)
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            picked = logits.gather(1, target)
            lse = torch.logsumexp(logits, dim=1, keepdim=True)
            total += (lse - picked).sum()
            if gradient is None:
                continue
            # d loss / d logits = softmax − onehot; a cap multiplies by 1 − (capped/c)².
            slope = None if softcap is None else 1 - (logits / softcap).square_()
            delta = logits.sub_(lse).exp_()
            delta.scatter_add_(1, target, torch.full_like(picked, -1.0))
            if slope is not None:
                delta.mul_(slope)
            gradient[start : start + chunk] = delta.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None, None


def chunked_loss(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, softcap: float | None = None, chunk: int | None = None
) -> torch.Tensor:
    """Summed token cross entropy, differentiable in `hidden` alone (the head is frozen).

    hidden (N, d) normed states, weight (V, d), labels (N,) in [0, V) -> fp32 scalar. Twice-differentiating is not supported.
    """
    out: torch.Tensor = _ChunkedLoss.apply(hidden, weight, labels, softcap, chunk or chunk_positions(weight.shape[0]))  # type: ignore[no-untyped-call]
    return out


def streamed_loss(
    hidden: torch.Tensor, labels: torch.Tensor, head: Iterable[tuple[int, torch.Tensor]], softcap: float | None = None
) -> torch.Tensor:
    """Token losses with the head read in blocks of vocabulary rows: an online log-sum-exp over them.

    hidden (N, d), labels (N,), head yields (first row, weight (v, d)) -> (N,) fp32.
    """
    return _streamed(hidden, labels, head, softcap, torch.full(labels.shape, -torch.inf, device=hidden.device))


def _streamed(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    head: Iterable[tuple[int, torch.Tensor]],
    softcap: float | None,
    lse: torch.Tensor,
) -> torch.Tensor:
    """`lse` (N,) begins at −∞ and ends as each position's log-sum-exp."""
    picked = torch.zeros(labels.shape, device=hidden.device)
    for first, weight in head:
        step = chunk_positions(weight.shape[0])
        for start in range(0, hidden.shape[0], step):
            rows = slice(start, start + step)
            logits = (hidden[rows] @ weight.T).float()
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            here = (labels[rows] >= first) & (labels[rows] < first + weight.shape[0])
            local = (labels[rows] - first).clamp(0, weight.shape[0] - 1)
            picked[rows] += torch.where(here, logits.gather(1, local[:, None])[:, 0], 0.0)
            lse[rows] = torch.logaddexp(lse[rows], torch.logsumexp(logits, dim=1))
        del weight  # before the next block is read
    return lse - picked


class _HeadLoss(torch.autograd.Function):
    """Summed cross entropy with the head in blocks of vocabulary rows, read twice: for the log-sum-exp, then for the
    gradient, which is made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        head: Callable[[], Iterable[tuple[int, torch.Tensor]]],
        softcap: float | None,
    ) -> torch.Tensor:
        lse = torch.full(labels.shape, -torch.inf, device=hidden.device)
        losses = _streamed(hidden, labels, head(), softcap, lse)
        if ctx.needs_input_grad[0]:
            gradient = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
            for first, weight in head():
                step = chunk_positions(weight.shape[0])
                for start in range(0, hidden.shape[0], step):
                    rows = slice(start, start + step)
                    logits = (hidden[rows] @ weight.T).float()
                    if softcap is not None:
                        logits.div_(softcap).tanh_().mul_(softcap)
                    slope = None if softcap is None else 1 - (logits / softcap).square_()
                    delta = logits.sub_(lse[rows, None]).exp_()
                    here = (labels[rows] >= first) & (labels[rows] < first + weight.shape[0])
                    at = here.nonzero()[:, 0]
                    delta[at, labels[rows][at] - first] -= 1.0
                    if slope is not None:
                        delta.mul_(slope)
                    gradient[rows] += (delta.to(weight.dtype) @ weight).float()
                del weight
            ctx.save_for_backward(gradient.to(hidden.dtype))
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None


def head_loss(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    head: Callable[[], Iterable[tuple[int, torch.Tensor]]],
    softcap: float | None = None,
) -> torch.Tensor:
    """`chunked_loss` without the head in memory: `head()` yields (first row, weight (v, d)), and is called twice.

    hidden (N, d), labels (N,) -> fp32 scalar, differentiable in `hidden` alone.
    """
    out: torch.Tensor = _HeadLoss.apply(hidden, labels, head, softcap)  # type: ignore[no-untyped-call]
    return out
