"""Attention found among the layers of an audit: two matrix products that follow each other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from spikeloom.analyse.audit.layer import SPIKES, Costs, Layer, Operand


@dataclass(frozen=True)
class Attention:
    """Two products that follow each other in one module: `(Q K^T) V` or `Q (K^T V)`, perhaps transposed.

    Attributes:
        queries, keys, values: what each held.
        scores_first: whether Q K^T ran first. From shapes alone: it did if there are at least as many tokens as
            features in a head, and the intermediate result has an element for each pair of tokens.
        products: (heads, tokens of the queries, features, tokens of the keys, features of the values).
    """

    queries: Operand
    keys: Operand
    values: Operand
    scores_first: bool
    products: tuple[float, int, int, int, int]


def attentions(layers: Sequence[Layer]) -> dict[int, Attention]:
    """The attentions of a network by the place of their first product."""
    found: dict[int, Attention] = {}
    for index, (first, second) in enumerate(itertools.pairwise(layers)):
        if first.shape is None or second.shape is None or first.name.split(":")[0] != second.name.split(":")[0]:
            continue
        batch, n, k, m = first.shape
        _, n2, k2, m2 = second.shape
        on_left = (n2, k2) == (n, m)
        if not on_left and (k2, m2) != (n, m):
            continue
        scores_first = k <= n
        other, e = (second.operands[1], m2) if on_left else (second.operands[0], n2)
        one, two = first.operands
        if scores_first:
            q, key, v = (one, two, other) if on_left else (two, one, other)
            products = (batch, n, k, m, e) if on_left else (batch, m, k, n, e)
        else:
            q, key, v = (other, two, one) if on_left else (other, one, two)
            products = (batch, e, m, k, n) if on_left else (batch, e, n, k, m)
        found[index] = Attention(q, key, v, scores_first, products)
    return found


@dataclass(frozen=True)
class AttentionMap:
    """The product `Q K^T` of an attention for one image, over all its steps.

    Attributes:
        operations: synaptic operations where Q or K is spikes, multiply-accumulates otherwise.
        energy_pj: of these.
    """

    operations: float
    energy_pj: float


def attention_maps(layers: Sequence[Layer], costs: Costs) -> list[AttentionMap]:
    """What the map of each attention costs, in whatever order the products ran (Spikformer, Table 1).

    The published 6.3 M operations of a real-valued map are `T N^2 D`: one product. Those of a softmax are not counted.
    """
    found: list[AttentionMap] = []
    for index, each in attentions(layers).items():
        _, tokens, _, _, width = each.products
        operations = layers[index].operations * (1.0 if each.scores_first else tokens / width)
        rates = [operand.rate for operand in (each.queries, each.keys) if operand.input in SPIKES]
        if rates:
            operations *= min(rates)
        found.append(AttentionMap(operations, operations * (costs.ac if rates else costs.mac)))
    return found


def keys_values_first(layers: Sequence[Layer]) -> list[Layer]:
    """The same layers, the two products of each attention counted as `Q (K^T V)`."""
    reordered = list(layers)
    for index, found in attentions(layers).items():
        if not found.scores_first:
            continue
        first, second = layers[index], layers[index + 1]
        heads, tokens, features, others, width = found.products
        steps = first.operations / (heads * tokens * features * others)
        reordered[index] = replace(
            first, operands=(found.keys, found.values), operations=steps * heads * features * others * width
        )
        # One accumulate per query spike, whatever integer K^T V holds there.
        reordered[index + 1] = replace(
            second, operands=(found.queries,), operations=steps * heads * tokens * features * width
        )
    return reordered
