"""How the threads of one parallel region go through many short stages together, without one waiting for another's turn.

A stage is a number of shares of work.  Each thread takes shares of its own part first, then whatever others have not
begun, and leaves a stage when all its shares are *done*, not when all threads have arrived: a thread that the system has
taken from its core holds up at most the share that it is at, and finds the stages that it slept through finished.
It is also right, only slower, where one thread runs all turns of the region one after another.

Waiting is a pause, and after many of them the core is offered to others.  (Measured: a barrier that only spins takes
500 ms a step as soon as another process runs.)  Counts lie on cache lines of their own.  Knows nothing about the work.
"""

import os
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from helix_gateway.core.inner_functions import INNER
from helix_gateway.runtime.cpu.arm import is_arm
from helix_gateway.runtime.cpu.emitter import I32, I64, call
from helix_gateway.runtime.cpu.instruction_sets import is_x86

_LINE = 8
"""int64 in a cache line."""
_LINE_BYTES = 64
_WHOLE_SYSTEM = 15
"""The scope of Arm's barriers that is the only one for instructions."""
# Pauses before the core is offered to others, and between two offers after that.
_PAUSES, _PAUSES_BETWEEN = 512, 16


def new_counts(stages: int, threads: int) -> npt.NDArray[np.int64]:
    """Counts for some stages: for each thread how many shares of its part are taken, then how many are done in all.

    They must be zero when a region begins.
    """
    return np.zeros((stages, threads + 1, _LINE), np.int64)


@intrinsic
def _fetch_add(typing_context, address, number):  # type: ignore[no-untyped-def]
    """Add to the int64 at an address, at once for all threads; returns what was there."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        pointer = builder.inttoptr(args[0], I64.as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "acq_rel")

    return types.int64(types.int64, types.int64), emit


def _emit_pause(builder: ir.IRBuilder) -> None:
    """Let some tens of nanoseconds pass without keeping the core's other thread from its work."""
    if is_x86():
        call(builder, "llvm.x86.sse2.pause", ir.VoidType())
    elif is_arm():
        # Arm's own hint to yield does nothing on most cores; an instruction barrier takes about as long as x86's pause.
        call(builder, "llvm.aarch64.isb", ir.VoidType(), ir.Constant(I32, _WHOLE_SYSTEM))


def _emit_yield(builder: ir.IRBuilder) -> None:
    """Offer the core to another thread."""
    call(builder, "SwitchToThread" if os.name == "nt" else "sched_yield", I32)


@intrinsic
def _wait_until(typing_context, address, number):  # type: ignore[no-untyped-def]
    """Return once the int64 at an address is at least a number, and all that was written before is seen."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        pointer = builder.inttoptr(args[0], I64.as_pointer())
        before = builder.block
        look, pause, offer, after = (builder.append_basic_block(name) for name in ("look", "pause", "offer", "after"))
        builder.branch(look)
        builder.position_at_end(look)
        turns = builder.phi(I64)
        turns.add_incoming(ir.Constant(I64, 0), before)
        there = builder.load_atomic(pointer, "acquire", 8)
        builder.cbranch(builder.icmp_signed(">=", there, args[1]), after, pause)
        builder.position_at_end(pause)
        _emit_pause(builder)
        following = builder.add(turns, ir.Constant(I64, 1))
        long_ = builder.icmp_signed(">", following, ir.Constant(I64, _PAUSES))
        due = builder.icmp_signed("==", builder.srem(following, ir.Constant(I64, _PAUSES_BETWEEN)), ir.Constant(I64, 0))
        turns.add_incoming(following, pause)
        builder.cbranch(builder.and_(long_, due), offer, look)
        builder.position_at_end(offer)
        _emit_yield(builder)
        turns.add_incoming(following, offer)
        builder.branch(look)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@njit(cache=True, **INNER)
def take_share(counts, stage, thread, shares):  # type: ignore[no-untyped-def]
    """A share of a stage that nobody has begun, or ``shares`` when there is none: of the thread's own part first."""
    threads = counts.shape[1] - 1
    for step in range(threads):
        owner = (thread + step) % threads
        first, last = shares * owner // threads, shares * (owner + 1) // threads
        place = (stage * (threads + 1) + owner) * _LINE_BYTES
        share = first + _fetch_add(counts.ctypes.data + place, 1)
        if share < last:
            return share
    return shares


@njit(cache=True, **INNER)
def finish_stage(counts, stage, done, shares):  # type: ignore[no-untyped-def]
    """Say how many shares this thread has done, and return when all are."""
    threads = counts.shape[1] - 1
    place = counts.ctypes.data + (stage * (threads + 1) + threads) * _LINE_BYTES
    _fetch_add(place, done)
    _wait_until(place, shares)
