"""Sampling as its definition says it, one row at a time: sort, cumulate, mask, argmax; and makers of sampling rows."""

from dataclasses import dataclass, field

import numpy as np

from helix_gateway.core.step import LogitEdits, SamplingRows
from helix_gateway.runtime.sampling import noise


@dataclass
class Row:
    """The options of one row, as a client would say them."""

    logits_index: int = 0
    seed: int = 0
    choice: int = 0
    position: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    edits: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Token id to (scale, shift)."""
    allowed: set[int] | None = None


def no_edits():
    return LogitEdits(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.float32))


def mask_of(allowed, vocab_size):
    """Bits of the allowed tokens, uint32 [ceil(vocab / 32)]; all ones where None."""
    words = np.zeros(-(-vocab_size // 32), np.uint32)
    for token in range(vocab_size) if allowed is None else allowed:
        words[token // 32] |= np.uint32(1 << (token % 32))
    return words


def sampling_rows(rows, vocab_size):
    """`SamplingRows` of a list of `Row`."""
    flat = [(r, t, *e) for r, row in enumerate(rows) for t, e in row.edits.items()]
    columns = list(zip(*flat, strict=True)) or [(), (), (), ()]
    masks = any(row.allowed is not None for row in rows)
    return SamplingRows(
        logits_index=np.array([r.logits_index for r in rows], np.int32),
        seed=np.array([r.seed for r in rows], np.uint64),
        choice=np.array([r.choice for r in rows], np.int32),
        position=np.array([r.position for r in rows], np.int32),
        temperature=np.array([r.temperature for r in rows], np.float32),
        top_k=np.array([r.top_k or vocab_size for r in rows], np.int32),
        top_p=np.array([r.top_p for r in rows], np.float32),
        min_p=np.array([r.min_p for r in rows], np.float32),
        edits=LogitEdits(
            np.array(columns[0], np.int32),
            np.array(columns[1], np.int32),
            np.array(columns[2], np.float32),
            np.array(columns[3], np.float32),
        ),
        allowed=np.stack([mask_of(r.allowed, vocab_size) for r in rows]) if masks else None,
    )


def many_rows(count, vocab_size, **options):
    """`count` rows of logits row 0 with the same options and counters of their own; any field may be an array."""
    fields = {
        "logits_index": (0, np.int32),
        "seed": (0, np.uint64),
        "choice": (0, np.int32),
        "position": (np.arange(count), np.int32),
        "temperature": (1.0, np.float32),
        "top_k": (vocab_size, np.int32),
        "top_p": (1.0, np.float32),
        "min_p": (0.0, np.float32),
    }
    arrays = {
        name: np.ascontiguousarray(np.broadcast_to(np.asarray(options.get(name, default)), count).astype(kind))
        for name, (default, kind) in fields.items()
    }
    return SamplingRows(edits=options.get("edits", no_edits()), allowed=options.get("allowed"), **arrays)


def edited(logits, row):
    """The row's logits after edits and mask, NaN as -inf."""
    x = np.where(np.isnan(logits), -np.inf, logits).astype(np.float32)
    for token, edit in row.edits.items():
        scale, shift = (np.float32(number) for number in edit)
        with np.errstate(invalid="ignore"):  # a ban of an infinite logit is NaN, and so -inf below
            x[token] = (x[token] / scale if x[token] > 0 else x[token] * scale) + shift
    if row.allowed is not None:
        x[[t for t in range(x.size) if t not in row.allowed]] = -np.inf
    return np.where(np.isnan(x), np.float32(-np.inf), x)


def kept_tokens(x, row):
    """Ids of the tokens that min-p, top-k and top-p keep, likeliest first, and ``(x - max) / T`` of all."""
    scaled = ((x - x.max()) * (np.float32(1) / np.float32(row.temperature))).astype(np.float64)
    order = np.lexsort((np.arange(x.size), -x))
    order = order[np.isfinite(scaled[order])]
    order = order[np.exp(scaled[order]) >= np.float64(np.float32(row.min_p))]
    order = order[: row.top_k or x.size]
    mass = np.cumsum(np.exp(scaled[order]))
    needed = int(np.searchsorted(mass, np.float64(np.float32(row.top_p)) * mass[-1])) + 1
    return order[:needed], scaled


def reference_token(logits, row):
    """The token that the definition says."""
    x = edited(logits, row)
    if np.isneginf(x.max()):
        return min(row.allowed, default=0) if row.allowed is not None else 0
    if row.temperature == 0 or np.isposinf(x.max()):
        return int(x.argmax())
    kept, scaled = kept_tokens(x, row)
    keys = noise.row_keys(
        np.array([row.seed], np.uint64), np.array([row.choice], np.int32), np.array([row.position], np.int32)
    )
    kept = np.sort(kept)
    scores = scaled[kept] + noise.gumbel(noise.hash_tokens(kept[None].astype(np.int32), keys))[0]
    return int(kept[scores.argmax()])


def probabilities(logits, row):
    """How likely each token is by the definition, float64 [vocab]."""
    x = edited(logits, row)
    kept, scaled = kept_tokens(x, row)
    p = np.zeros(x.size)
    p[kept] = np.exp(scaled[kept])
    return p / p.sum()
