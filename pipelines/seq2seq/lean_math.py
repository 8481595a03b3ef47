"""The layers of a T5 as functions with gradients of their own, for training on a CPU.

N = B·L rows of states of width H run through each of them; a head has width D and there are A of them. Heads are the
outermost axis of all that belongs to them, (A, B, L, D): so the projections write, and the products of attention read,
what they need as it lies, and nothing is copied into another order on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

# Scores of one part, in numbers: 4 MiB of fp32 stay in the cache of today's processors.
_PART = 2**20


class RootMeanSquareNorm(torch.autograd.Function):
    """y = x·r·w with r = (mean(x²) + ε)^(−1/2) (Zhang and Sennrich 2019, eq. 4).

    dx = r·(g·w − x̂·mean(g·w·x̂)) with x̂ = x·r, dw = Σ g·x̂.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Normalize.

        Args:
            ctx: of autograd.
            states: (…, H).
            weight: (H,), of the same type.
            epsilon: ε > 0.

        Returns:
            (…, H).
        """
        normal, rate = _normalized(states, epsilon)
        ctx.save_for_backward(normal, rate, weight)
        return (normal * weight).view(states.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of states and weight."""
        normal, rate, weight = ctx.saved_tensors
        given = gradient.reshape(normal.shape)
        product = given * normal
        of_weight = product.sum(0)
        mean = torch.mv(product, weight).div_(normal.shape[-1])[:, None]
        of_states = torch.mul(given, weight, out=product).addcmul_(normal, mean, value=-1).mul_(rate)
        return of_states.view(gradient.shape), of_weight, None


class FeedForwardLayer(torch.autograd.Function):
    """y = x + max(0, norm(x)·Wᵢᵀ)·Wₒᵀ (Vaswani et al. 2017, eq. 2, without biases, the norm in front)."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, norm: Tensor, inner: Tensor, outer: Tensor, epsilon: float) -> Tensor:
        """Two matrices with a rectifier between them.

        Args:
            ctx: of autograd.
            states: (…, H).
            norm: (H,) the norm's weights.
            inner: Wᵢ (F, H).
            outer: Wₒ (H, F).
            epsilon: of the norm.

        Returns:
            (…, H).
        """
        normal, rate = _normalized(states, epsilon)
        hidden = torch.mm(normal, (inner * norm).t()).relu_()
        ctx.save_for_backward(normal, rate, hidden, norm, inner, outer)
        return torch.addmm(states.reshape(normal.shape), hidden, outer.t()).view(states.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of states, the norm's weights and both matrices."""
        normal, rate, hidden, norm, inner, outer = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        given = gradient.reshape(normal.shape)
        of_outer = torch.mm(given.t(), hidden) if wanted[3] else None
        of_hidden = torch.mm(given, outer)
        torch.ops.aten.threshold_backward.grad_input(of_hidden, hidden, 0, grad_input=of_hidden)
        of_norm, of_inner = _of_weights(of_hidden, normal, norm, inner, wanted[1] or wanted[2])
        of_states = _of_states(given, of_hidden, inner * norm, normal, rate) if wanted[0] else None
        return None if of_states is None else of_states.view(gradient.shape), of_norm, of_inner, of_outer, None


class Layout(NamedTuple):
    """What an attention layer's tensors do not say.

    Args:
        heads: A.
        scale: of the scores.
        epsilon: of the norm.
        sample_major: how R = K·B rows belong to B others: r mod B, or r div K.
    """

    heads: int
    scale: float
    epsilon: float
    sample_major: bool = False


class AttentionLayer(torch.autograd.Function):
    """y = x + softmax(s·QKᵀ + b)·V·Wₒᵀ with Q, K and V of norm(x), or K and V of other states.

    Vaswani et al. 2017, eq. 1, with the learned bias b of Raffel et al. 2020, section 2.1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        others: Tensor | None,
        norm: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        outer: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        layout: Layout,
    ) -> Tensor:
        """Attend.

        Args:
            ctx: of autograd.
            states: (R, L, H) of which the queries are made, and the keys and values where there are no others.
            others: (B, S, H) with R a multiple of B, whose keys and values serve R/B rows each; or None: S = L, B = R.
            norm: (H,) the norm's weights.
            query: (A·D, H), as ``key`` and ``value``.
            key: its rows are those of head 0, then of head 1 …
            value: as ``key``.
            outer: Wₒ (H, A·D).
            bias: (1, A, L, S) or None.
            mask: (B or 1, 1, 1 or L, S), False where nothing is to be attended to; one line of it where R > B; or None.
            layout: the rest.

        Returns:
            (R, L, H).
        """
        size, rows = len(query) // layout.heads, len(states)
        normal, rate = _normalized(states, layout.epsilon)
        if others is None:
            flat, sources = normal, rows
            queries, keys, values = _by_head(normal, torch.cat((query, key, value)) * norm, size).chunk(3)
        else:
            flat, sources = others.reshape(-1, others.shape[-1]), len(others)
            queries = _by_head(normal, query * norm, size)
            keys, values = _by_head(flat, torch.cat((key, value)), size).chunk(2)
        shape = layout.heads * sources, len(flat) // sources, size
        keys, values = keys.view(shape), values.view(shape)
        queries = _folded(queries, rows, sources, layout)
        probabilities, found = attend(queries, keys, values, bias, mask, layout.scale, layout.heads)
        joined = _joined(found, rows, sources, layout)
        ctx.save_for_backward(
            normal, rate, flat, queries, keys, values, probabilities, joined, norm, query, key, value, outer
        )
        ctx.layout, ctx.itself = layout, others is None
        return torch.addmm(states.reshape(normal.shape), joined, outer.t()).view(states.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of states, other states, the norm's weights, the four matrices and the bias."""
        normal, rate, flat, queries, keys, values, probabilities, joined, *weights = ctx.saved_tensors
        norm, query, key, value, outer = weights
        layout, wanted, rows = ctx.layout, ctx.needs_input_grad, len(gradient)
        given = gradient.reshape(normal.shape)
        of_outer = torch.mm(given.t(), joined) if wanted[6] else None
        sources = len(keys) // layout.heads
        of_found = _folded(_by_head(given, outer.t(), queries.shape[-1]), rows, sources, layout)
        # One piece, so that what belongs to keys and values, or to all three, is one matrix afterwards.
        of_all = queries.new_empty(queries.numel() + 2 * keys.numel())
        of_queries = of_all[: queries.numel()].view(queries.shape)
        of_keys, of_values = of_all[queries.numel() :].view(2, *keys.shape)
        of_each = of_queries, of_keys, of_values
        of_bias = attend_backward(
            of_found, queries, keys, values, probabilities, layout.scale, layout.heads, of_each, wanted[7]
        )
        of_matrices = any(wanted[2:6])
        if ctx.itself:
            matrix = torch.cat((query, key, value))
            of_heads = of_all.view(3, layout.heads, len(normal), -1).permute(2, 0, 1, 3).reshape(len(normal), -1)
            of_norm, of_matrix = _of_weights(of_heads, normal, norm, matrix, of_matrices)
            of_query, of_key, of_value = (None,) * 3 if of_matrix is None else of_matrix.split(len(query))
            of_others = None
        else:
            matrix = query
            of_heads = _joined(of_queries, rows, sources, layout)
            of_norm, of_query = _of_weights(of_heads, normal, norm, query, of_matrices)
            both = of_all[queries.numel() :].view(2, layout.heads, len(flat), -1)
            both = both.permute(2, 0, 1, 3).reshape(len(flat), -1)
            of_key, of_value = torch.mm(both.t(), flat).split(len(key)) if of_matrices else (None, None)
            of_others = torch.mm(both, torch.cat((key, value))).view(sources, -1, flat.shape[1]) if wanted[1] else None
        of_states = _of_states(given, of_heads, matrix * norm, normal, rate).view(gradient.shape) if wanted[0] else None
        return of_states, of_others, of_norm, of_query, of_key, of_value, of_outer, of_bias, None, None


def attention_without_gradient(
    states: Tensor,
    others: Tensor | None,
    norm: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    outer: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    layout: Layout,
) -> Tensor:
    """``AttentionLayer`` where no gradient is wanted: the same arguments and numbers, by PyTorch's fused attention."""
    normal, _ = _normalized(states, layout.epsilon)
    (rows, length, _), heads = states.shape, layout.heads
    if others is None:
        together = torch.mm(normal, (torch.cat((query, key, value)) * norm).t())
        queries, keys, values = together.view(rows, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    else:
        sources, wide, _ = others.shape
        together = torch.mm(others.reshape(sources * wide, -1), torch.cat((key, value)).t())
        keys, values = together.view(sources, wide, 2, heads, -1).permute(2, 0, 3, 1, 4)
        queries = torch.mm(normal, (query * norm).t())
        if layout.sample_major:
            queries = queries.view(-1, sources, length, heads, keys.shape[-1]).permute(1, 3, 0, 2, 4).flatten(2, 3)
        else:
            queries = queries.view(sources, -1, heads, keys.shape[-1]).transpose(1, 2)
    allowed = bias
    if mask is not None:
        lowest = torch.finfo(states.dtype).min
        allowed = torch.where(mask, states.new_zeros(()) if bias is None else bias, lowest)
    found = scaled_dot_product_attention(queries, keys, values, attn_mask=allowed, scale=layout.scale).transpose(1, 2)
    if layout.sample_major and others is not None:
        found = found.unflatten(1, (-1, length)).transpose(0, 1)
    return torch.addmm(states.reshape(normal.shape), found.reshape(len(normal), -1), outer.t()).view(states.shape)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, heads: int
) -> tuple[Tensor, Tensor]:
    """softmax(s·QKᵀ + b) and its product with V, a few rows at a time, while their scores are in the cache.

    Args:
        queries: (A·B, L, D), in one piece of memory, as ``keys`` and ``values``.
        keys: (A·B, S, D).
        values: (A·B, S, D).
        bias: (1, A, L, S) or None.
        mask: (B or 1, 1, 1 or L, S), False where nothing is to be attended to; or None.
        scale: s.
        heads: A.

    Returns:
        Probabilities (A·B, L, S) and the product (A·B, L, D).
    """
    probabilities = queries.new_empty(*queries.shape[:2], keys.shape[1])
    found = torch.empty_like(queries)
    transposed = keys.transpose(1, 2)
    for part, of_heads, of_rows in _parts(probabilities, heads):
        scores = probabilities[part]
        torch.bmm(queries[part], transposed[part], out=scores)
        if scale != 1.0:
            scores.mul_(scale)
        if bias is not None or mask is not None:
            by_head = scores.view(of_heads.stop - of_heads.start, -1, *scores.shape[1:])
            if bias is not None:
                by_head.add_(bias[0, of_heads, None])
            if mask is not None:
                allowed = (mask[of_rows] if len(mask) > 1 else mask).transpose(0, 1)
                by_head.masked_fill_(~allowed, torch.finfo(scores.dtype).min)
        torch.softmax(scores, -1, out=scores)
        torch.bmm(scores, values[part], out=found[part])
    return probabilities, found


def attend_backward(
    given: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    probabilities: Tensor,
    scale: float,
    heads: int,
    of_each: tuple[Tensor, Tensor, Tensor],
    bias_wanted: bool,
) -> Tensor | None:
    """Gradients of ``attend``: dV = PᵀG, dS = P∘(GVᵀ − rowsum(P∘GVᵀ)), dQ = s·dS·K, dK = s·dSᵀQ, db = Σ_B dS.

    Args:
        given: G (A·B, L, D), that of the product.
        queries: as ``attend`` was given them, with ``keys``, ``values``, ``scale`` and ``heads``.
        keys: (A·B, S, D).
        values: (A·B, S, D).
        probabilities: P (A·B, L, S).
        scale: s.
        heads: A.
        of_each: written to: the gradients of queries, keys and values, of their shapes.
        bias_wanted: whether that of the bias is.

    Returns:
        The gradient of the bias (1, A, L, S), or None.
    """
    of_queries, of_keys, of_values = of_each
    of_bias = probabilities.new_zeros(heads, *probabilities.shape[1:]) if bias_wanted else None
    transposed = values.transpose(1, 2)
    for part, of_heads, _ in _parts(probabilities, heads):
        chosen, of_part = probabilities[part], given[part]
        torch.bmm(chosen.transpose(1, 2), of_part, out=of_values[part])
        scores = torch.bmm(of_part, transposed[part])
        torch.ops.aten._softmax_backward_data.out(scores, chosen, -1, chosen.dtype, grad_input=scores)
        if of_bias is not None:
            of_bias[of_heads] += scores.view(of_heads.stop - of_heads.start, -1, *scores.shape[1:]).sum(1)
        torch.bmm(scores, keys[part], out=of_queries[part])
        torch.bmm(scores.transpose(1, 2), queries[part], out=of_keys[part])
    if scale != 1.0:
        of_queries.mul_(scale)
        of_keys.mul_(scale)
    return None if of_bias is None else of_bias[None]


def _normalized(states: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(N, H) rows of root mean square 1, and (N, 1) what they were multiplied by."""
    flat = states.reshape(-1, states.shape[-1])
    rate = torch.linalg.vector_norm(flat, dim=-1, keepdim=True)
    rate = torch.addcmul(rate.new_tensor(epsilon), rate, rate, value=1 / flat.shape[-1]).rsqrt_()
    return flat * rate, rate


def _of_weights(
    given: Tensor, normal: Tensor, norm: Tensor, matrix: Tensor, wanted: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a norm's weights w (H,) and of a matrix W (M, H) behind it, from that of its product (N, M)."""
    if not wanted:
        return None, None
    of_both = torch.mm(given.t(), normal)
    return (of_both * matrix).sum(0), of_both.mul_(norm)


def _of_states(residual: Tensor, given: Tensor, matrix: Tensor, normal: Tensor, rate: Tensor) -> Tensor:
    """Gradient of a layer's states (N, H): that of the residual, and that which comes back through matrix and norm."""
    of_normal = torch.mm(given, matrix)
    total = (of_normal * normal).sum(-1, keepdim=True)
    of_normal.addcmul_(normal, total, value=-1 / normal.shape[-1])
    return torch.addcmul(residual, of_normal, rate, out=of_normal)


def _by_head(states: Tensor, matrix: Tensor, size: int) -> Tensor:
    """(N, H) times the matrix (M·D, H), transposed: (M, N, D), D being ``size``."""
    by_head = matrix.unflatten(0, (-1, size)).transpose(1, 2)
    return torch.bmm(states.expand(len(by_head), -1, -1), by_head)


def _folded(heads: Tensor, rows: int, sources: int, layout: Layout) -> Tensor:
    """(A, R·L, D) of R = K·B rows as (A·B, K·L, D): all queries of a source beside each other."""
    if layout.sample_major and rows != sources:
        apart = heads.view(layout.heads, rows // sources, sources, -1, heads.shape[-1])
        return apart.transpose(1, 2).reshape(layout.heads * sources, -1, heads.shape[-1])
    return heads.view(layout.heads * sources, -1, heads.shape[-1])


def _joined(folded: Tensor, rows: int, sources: int, layout: Layout) -> Tensor:
    """(A·B, K·L, D) as (R·L, A·D), rows in their own order again."""
    size = folded.shape[-1]
    if layout.sample_major and rows != sources:
        apart = folded.view(layout.heads, sources, rows // sources, -1, size)
        return apart.permute(2, 1, 3, 0, 4).reshape(-1, layout.heads * size)
    return folded.view(layout.heads, -1, size).transpose(0, 1).reshape(-1, layout.heads * size)


def _parts(scores: Tensor, heads: int) -> Iterator[tuple[Any, slice, slice]]:
    """Parts of scores (A·B, L, S) to be worked on at once, with their heads and rows: several heads, or rows of one."""
    rows = len(scores) // heads
    if scores.numel() <= _PART:
        yield ..., slice(0, heads), slice(0, rows)
        return
    size = max(1, _PART // scores[0].numel())
    together, step = max(1, size // rows), min(size, rows)
    for head in range(0, heads, together):
        end = min(head + together, heads)
        for row in range(0, rows, step):
            stop = min(row + step, rows)
            yield slice(head * rows + row, (end - 1) * rows + stop), slice(head, end), slice(row, stop)
