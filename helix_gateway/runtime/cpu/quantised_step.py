"""A whole step of a Llama or a relative over quantised weights, from token ids to logits, in one parallel region.

The residual stream, attention and all sums are float32; what goes into a product is rounded to int8, row by row, so a
row's bits depend on its own sequence alone.  A step is a row of stages (`NORM_QKV` to `DOWN` for each layer, then
`NORM_HEAD` and `HEAD`), a stage some items (rows, tiles of a product, items of attention), and `_do_items` says what each
is; how threads share them out is `work_sharing.py`'s affair.  What follows the last layer's attention is computed only
for rows whose logits are wanted.  Nothing is allocated on the way but a head's buffer where int8 keys and values are
written.  What a family has that others lack (norms, factors, caps) is data of its layers or of the model: one compiled
step serves all, and asks once a row or an item.  Which models this fits is `structures.py`'s affair.
"""

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, njit, prange, typeof, types
from numba.core.typing import signature
from numba.extending import intrinsic

from helix_gateway.core.inner_functions import INNER
from helix_gateway.core.step import Int32s
from helix_gateway.runtime.cpu.attention_items import attend_item
from helix_gateway.runtime.cpu.attention_kernels import FLOATS
from helix_gateway.runtime.cpu.attention_shape import GROUP, KEY_DIM, KV_HEADS, plan_of, softcapped
from helix_gateway.runtime.cpu.emitter import F32_BYTES
from helix_gateway.runtime.cpu.layers import UniformPages, place_rows
from helix_gateway.runtime.cpu.linking import check_linked, emit_call, link, linked_name
from helix_gateway.runtime.cpu.microkernels import TILE_CHANNELS, float32s_at
from helix_gateway.runtime.cpu.parts import GELU, UNCAPPED
from helix_gateway.runtime.cpu.quantised_kernels import GROUP_INPUTS, INT8_CHANNELS
from helix_gateway.runtime.cpu.quantised_products import multiply_tiles, read_row
from helix_gateway.runtime.cpu.quantised_rows import (
    norm_row,
    quantise_gated_row,
    quantise_gelu_gated_row,
    quantise_normed_row,
    quantise_row,
    sum_rows,
)
from helix_gateway.runtime.cpu.work_sharing import finish_stage, take_share
from helix_gateway.runtime.pages import Int64s

NORM_QKV, QKV, PLACE, ATTEND, QUANTISE, OUT, NORM_GATE, GATE_UP, GATE, DOWN = range(10)
"""The stages of a layer, in their order."""
NORM_HEAD, HEAD = range(10, 12)
"""The stages after the last layer."""
LAYER_STAGES = 10

MATRIX_FIELDS = 6
"""What describes a matrix: format, address of its tiles, bytes of a tile, groups, channels, address of its bias."""
CHANGE_NORMS, NORMS = 4 * MATRIX_FIELDS, 4 * MATRIX_FIELDS + 2
QUERY_NORM, KEY_NORM = NORMS + 2, NORMS + 4
PLAN, ROTARY = NORMS + 6, NORMS + 7
FIELDS = NORMS + 8
"""What describes a layer: its four matrices in their order, then, each two for `NORM_QKV` and `NORM_GATE`, addresses of the
weights of the norms of what is added to the residual stream and of the stream itself; of queries and of keys, the address
of their norm's weights and how many numbers are normed together; its plan and its rotary tables.  No norm has address 0."""
_GROUPS, _CHANNELS, _BIAS = 3, 4, 5

# Shares of a stage for each thread: enough to even out what a thread loses to others, few enough to cost nothing.
_SHARES_A_THREAD = 4


class Model(NamedTuple):
    """What stays the same from step to step."""

    layers: Int64s
    """[num_layers, FIELDS]"""
    embedding_matrix: Int64s
    """[MATRIX_FIELDS], its bias of no meaning."""
    head: Int64s
    """[FIELDS], of which the first matrix and the norms of the first place are its own."""
    kernels: Int64s
    """`quantised_products.tile_kernel` by format; 0 for those that no matrix has."""
    activation: int
    """This and what follows are `structures.Structure`'s."""
    scaling: float
    softcap: np.float32
    eps: np.float32
    residual: np.float32
    embedding: np.float32
    logits_softcap: np.float32


class Rows(NamedTuple):
    """What a step computes."""

    tokens: Int32s
    """[rows], ids."""
    wanted: Int32s
    """Rows whose logits are wanted."""


class Scratch(NamedTuple):
    """Memory of a step, most of it by its address, of float32 unless it says otherwise, for at least its rows; these are
    consecutive.

    Addresses, since slices of arrays in each row's turn add two thirds to what is done to the row (docs/log.md).
    """

    hidden: int
    """[rows, width], the residual stream."""
    chosen: int
    """[wanted rows, width], the same of the last layer's second half."""
    change: int
    """[rows, width], what the last product adds to it."""
    product: int
    """[rows, the most channels of QKV, gate and up]; products leave rows of their own width."""
    attended: int
    """[rows, query heads * head dimension]"""
    quantised: int
    """Bytes: the quantised rows (`quantised_rows.py`)."""
    logits: int
    """[wanted rows, channels of the head]"""
    width: int
    """Of the residual stream."""
    attended_width: int
    """Query heads times head dimension."""
    counts: Int64s
    """Of `work_sharing.new_counts`."""


@njit(inline="always")
def _is_of_chosen(stage, number, num_layers):  # type: ignore[no-untyped-def]
    """Whether a stage is about the rows whose logits are wanted, one after another, and not about all."""
    return stage > ATTEND and number >= num_layers - 1


@njit(cache=True, **INNER)
def _num_rows(stage, number, num_layers, rows):  # type: ignore[no-untyped-def]
    """How many rows a stage is about; where no logits are wanted, the last layer ends with its keys and values."""
    if _is_of_chosen(stage, number, num_layers):
        return len(rows.wanted)
    if stage == ATTEND and number == num_layers - 1 and len(rows.wanted) == 0:
        return 0
    return len(rows.tokens)


@njit(cache=True, **INNER)
def _count_items(stage, fields, rows, items):  # type: ignore[no-untyped-def]
    """How many items a stage over so many rows has; fields: of its layer, items: of attention."""
    if rows == 0:
        return 0
    if stage == ATTEND:
        return items
    matrix = _matrix_of(stage)
    if matrix < 0:
        return rows
    return (fields[matrix * MATRIX_FIELDS + _CHANNELS] + TILE_CHANNELS - 1) // TILE_CHANNELS


@njit(cache=True, **INNER)
def _matrix_of(stage):  # type: ignore[no-untyped-def]
    """Which of the layer's matrices a stage multiplies by; less than 0 where it is another kind of stage."""
    if stage in (QKV, HEAD):
        return 0
    if stage == OUT:
        return 1
    if stage == GATE_UP:
        return 2
    return 3 if stage == DOWN else -1


@njit(cache=True, **INNER)
def _scale(row, factor, out, width):  # type: ignore[no-untyped-def]
    """``row * factor``, addresses of float32 [width]."""
    source, target = carray(float32s_at(row), (width,)), carray(float32s_at(out), (width,))
    for i in range(width):
        target[i] = source[i] * factor


@njit(cache=True, **INNER)
def _add_change(model, norm, hidden, change, out, width):  # type: ignore[no-untyped-def]
    """``hidden + change`` of one row, by addresses; the change is normed or scaled in place before, where a family does that."""
    if norm != 0:
        norm_row(change, width, model.eps, norm, change)
    elif model.residual != 1:
        _scale(change, model.residual, change, width)
    sum_rows(hidden, change, out, width // GROUP_INPUTS)


@njit(inline="always")
def _is_joined(fields, matrix):  # type: ignore[no-untyped-def]
    """Whether rows that go into one of a layer's matrices have their groups joined."""
    return fields[matrix * MATRIX_FIELDS] == INT8_CHANNELS


@njit(cache=True, **INNER)
def _quantise_norm(model, norm, numbers, width, joined, to):  # type: ignore[no-untyped-def]
    """A row's norm quantised, or the row itself where there is none; to: address, row and rows of `quantise_row`."""
    (at, row, rows), groups = to, width // GROUP_INPUTS
    if norm != 0:
        quantise_normed_row(numbers, width, model.eps, norm, at, row, rows, groups, joined)
    else:
        quantise_row(numbers, at, row, rows, groups, joined)


@njit(cache=True, **INNER)
def _norm_stage_row(number, stage, row, is_chosen, model, fields, rows, scratch, to):  # type: ignore[no-untyped-def]
    """The residual stream of one row brought up to date, and its norm quantised."""
    width, place = scratch.width, 1 if stage == NORM_GATE else 0
    step = width * F32_BYTES
    hidden, change = scratch.hidden + row * step, scratch.change + row * step
    out = hidden
    if is_chosen:  # a row may be wanted twice, so it is left as it is
        hidden, out = scratch.hidden + rows.wanted[row] * step, scratch.chosen + row * step
    if stage == NORM_QKV and number == 0:
        matrix = model.embedding_matrix
        weight = (matrix[0], matrix[1], matrix[2], matrix[_GROUPS], matrix[_CHANNELS])
        read_row(weight, rows.tokens[row], width, hidden)
        if model.embedding != 1:
            _scale(hidden, model.embedding, hidden, width)
    else:
        _add_change(model, fields[CHANGE_NORMS + place], hidden, change, out, width)
    _quantise_norm(model, fields[NORMS + place], out, width, _is_joined(fields, 2 * place), to)


@njit(cache=True, **INNER)
def _norm_wanted_row(place, model, fields, scratch, to):  # type: ignore[no-untyped-def]
    """The last norm of a row whose logits are wanted, quantised."""
    width, step = scratch.width, scratch.width * F32_BYTES
    hidden, change = scratch.chosen + place * step, scratch.change + place * step
    _add_change(model, fields[CHANGE_NORMS], hidden, change, hidden, width)
    _quantise_norm(model, fields[NORMS], hidden, width, _is_joined(fields, 0), to)


@njit(cache=True, **INNER)
def _norm_heads(first, last, product, channels, fields, queries, keys, eps):  # type: ignore[no-untyped-def]
    """Queries and keys of some rows normed in place, where a family does that; so many numbers of each a row."""
    for field, begin, end in ((QUERY_NORM, 0, queries), (KEY_NORM, queries, queries + keys)):
        norm, width = fields[field], fields[field + 1]
        if norm != 0:
            for row in range(first, last):
                for place in range(begin, end, width):
                    at = product + (row * channels + place) * F32_BYTES
                    norm_row(at, width, eps, norm, at)


@njit(cache=True, **INNER)
def _gate(model, fields, scratch, to):  # type: ignore[no-untyped-def]
    """``activation(gate) * up`` of a row, quantised."""
    (at, row, rows), channels = to, fields[2 * MATRIX_FIELDS + _CHANNELS]
    address, groups = scratch.product + row * channels * F32_BYTES, channels // 2 // GROUP_INPUTS
    if model.activation == GELU:
        quantise_gelu_gated_row(address, at, row, rows, groups, _is_joined(fields, 3))
    else:
        quantise_gated_row(address, at, row, rows, groups, _is_joined(fields, 3))


@njit(cache=True, **INNER)
def _cap_logits(first, last, rows, channels, logits, cap):  # type: ignore[no-untyped-def]
    """``cap * tanh(logit / cap)`` in some tiles of all rows (Gemma 2)."""
    numbers = carray(float32s_at(logits), (rows, channels))
    for row in range(rows):
        for channel in range(first * TILE_CHANNELS, min(last * TILE_CHANNELS, channels)):
            numbers[row, channel] = softcapped(numbers[row, channel], cap)


@njit(cache=True, **INNER)
def _multiply(kernels, stage, first, last, fields, num_rows, scratch):  # type: ignore[no-untyped-def]
    """Some tiles of a product."""
    place = _matrix_of(stage) * MATRIX_FIELDS
    weight = (fields[place], fields[place + 1], fields[place + 2], fields[place + _GROUPS], fields[place + _CHANNELS])
    if stage == HEAD:
        out = scratch.logits
    elif stage in (OUT, DOWN):
        out = scratch.change
    else:
        out = scratch.product
    kernel, bias = kernels[fields[place]], fields[place + _BIAS]
    multiply_tiles(kernel, first, last, num_rows, scratch.quantised, weight, bias, out)


# What is inlined below would otherwise be compiled once by itself and once more into whoever calls it.


@njit(inline="always")
def _attend(thread, first, last, number, model, plans, pages, fields, scratch):  # type: ignore[no-untyped-def]
    """Some items of attention."""
    plan, shape = plan_of(plans, fields[PLAN]), pages.shapes[fields[PLAN]]
    query = (scratch.product, fields[_CHANNELS], shape[KEY_DIM])
    for item in range(first, last):
        attend_item(
            FLOATS,
            pages.stored,
            shape,
            pages.offsets[number],
            plan,
            item,
            query,
            model.scaling,
            model.softcap,
            scratch.attended,
            pages.works[thread],
        )


@njit(inline="always")
def _place(first, last, number, model, plans, pages, fields, scratch, angles):  # type: ignore[no-untyped-def]
    """Queries and keys of some rows normed and rotated, keys and values written into the layer's pages."""
    product, channels, shape = scratch.product, fields[_CHANNELS], pages.shapes[fields[PLAN]]
    keys = shape[KV_HEADS] * shape[KEY_DIM]
    _norm_heads(first, last, product, channels, fields, keys * shape[GROUP], keys, model.eps)
    cosines, sines = angles.cosines[fields[ROTARY]], angles.sines[fields[ROTARY]]
    plan, layer = plan_of(plans, fields[PLAN]), UniformPages(pages.stored, shape, pages.offsets)
    place_rows(FLOATS, first, last, plan, layer, number, product, channels, cosines, sines)


@njit(inline="always")
def _do_items(thread, stage, number, first, last, model, plans, pages, rows, scratch, angles):  # type: ignore[no-untyped-def]
    """The items first:last of one stage of a layer; the head is the layer after the last."""
    fields = model.head if number == len(model.layers) else model.layers[number]
    is_chosen = _is_of_chosen(stage, number, len(model.layers))
    num_rows = _num_rows(stage, number, len(model.layers), rows)
    if stage == ATTEND:
        _attend(thread, first, last, number, model, plans, pages, fields, scratch)
    elif stage == PLACE:
        _place(first, last, number, model, plans, pages, fields, scratch, angles)
    elif _matrix_of(stage) >= 0:
        _multiply(model.kernels, stage, first, last, fields, num_rows, scratch)
        if stage == HEAD and model.logits_softcap < UNCAPPED:
            _cap_logits(first, last, num_rows, fields[_CHANNELS], scratch.logits, model.logits_softcap)
    else:
        for row in range(first, last):
            to = (scratch.quantised, row, num_rows)
            if stage == QUANTISE:
                width, source = scratch.attended_width, rows.wanted[row] if is_chosen else row
                attended = scratch.attended + source * width * F32_BYTES
                quantise_row(attended, to[0], row, num_rows, width // GROUP_INPUTS, _is_joined(fields, 1))
            elif stage == GATE:
                _gate(model, fields, scratch, to)
            elif stage == NORM_HEAD:
                _norm_wanted_row(row, model, fields, scratch, to)
            else:
                _norm_stage_row(number, stage, row, is_chosen, model, fields, rows, scratch, to)


@njit(cache=True, **INNER)
def _work(thread, threads, model, plans, pages, rows, scratch, angles):  # type: ignore[no-untyped-def]
    """One thread's way through all stages."""
    num_layers = len(model.layers)
    for turn in range(num_layers * LAYER_STAGES + 2):
        number = min(turn // LAYER_STAGES, num_layers)
        stage = turn - number * LAYER_STAGES if number < num_layers else turn - num_layers * LAYER_STAGES + NORM_HEAD
        fields = model.head if number == num_layers else model.layers[number]
        num_rows = _num_rows(stage, number, num_layers, rows)
        items = _count_items(stage, fields, num_rows, plans.bounds[fields[PLAN], -1])
        shares = min(items, threads * _SHARES_A_THREAD) if stage != ATTEND else items
        done = 0
        share = take_share(scratch.counts, turn, thread, shares)
        while share < shares:
            first, last = items * share // shares, items * (share + 1) // shares
            _do_items(thread, stage, number, first, last, model, plans, pages, rows, scratch, angles)
            done += 1
            share = take_share(scratch.counts, turn, thread, shares)
        finish_stage(scratch.counts, turn, done, shares)


@intrinsic
def _call_work(typing_context, thread, threads, model, plans, pages, rows, scratch, angles):  # type: ignore[no-untyped-def]
    """`_work` by its name: numba compiles what a parallel region calls into each of its own functions."""
    taken = (thread, threads, model, plans, pages, rows, scratch, angles)
    name = linked_name("work", taken)
    check_linked(name)

    def emit(context: Any, builder: ir.IRBuilder, called: Any, arguments: Any) -> Any:
        return emit_call(context, builder, name, taken, arguments)

    return signature(types.void, *taken), emit


def link_work(*step: Any) -> None:
    """Have what a thread does compiled; before the first `run_step` of such arguments behind its threads."""
    taken = (types.int64, types.int64, *map(typeof, step))
    link(_work, linked_name("work", taken), taken)


@njit(cache=True, nogil=True, parallel=True)
def run_step(threads, model, plans, pages, rows, scratch, angles):  # type: ignore[no-untyped-def]
    """All of a step; the logits are then in the scratch.  `link_work` must have been called for arguments of these types."""
    for thread in prange(threads):
        # With the sign that it lacks in a thread's own code: what is linked answers to these types alone.
        _call_work(np.int64(thread), threads, model, plans, pages, rows, scratch, angles)
