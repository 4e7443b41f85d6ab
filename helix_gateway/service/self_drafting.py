"""The target's own weights at fewer bits as a drafter: made beside serving, and let in when it is there.

Making it takes as long as loading a small model does, and at a first start its kernels are compiled, by a process of their
own; nobody waits for that.  Who asked for this drafter alone does wait.  How it drafts is the engine's affair.
"""

import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import structlog
import torch

from helix_gateway.core.errors import OutOfMemoryError
from helix_gateway.core.protocols import ModelRunner
from helix_gateway.engine.acceptance import AcceptanceModel
from helix_gateway.engine.block_pool import NoFreeBlocksError
from helix_gateway.engine.drafters.chain import CostlyDrafter
from helix_gateway.engine.drafters.self_drafter import SelfDrafter
from helix_gateway.engine.drafting import SELF, AdaptiveDrafting
from helix_gateway.engine.engine import Engine
from helix_gateway.engine.kv_cache import PagedKVCache
from helix_gateway.engine.step_costs import StepCosts, measure_seconds
from helix_gateway.runtime.cpu.compiled import compiling_alone, is_compiled, mark_compiled
from helix_gateway.runtime.cpu.threads import unbind_thread
from helix_gateway.runtime.device import free_memory_bytes
from helix_gateway.runtime.fewer_bits import at_fewer_bits
from helix_gateway.runtime.paged_runner import PagedRunner
from helix_gateway.service.launch import start_compiling

log = structlog.get_logger(__name__)

_MEASURED_ROWS = (1, 2, 4, 8, 16)
"""Sequences that draft at once; with more, costs are taken to be in proportion until they are seen."""
_COMPILED_FOR = "fewer-bits-"
_LOOK_EVERY_S = 0.1
"""At whether the process that compiles has ended."""

Finish = Callable[[ModelRunner[Any]], CostlyDrafter]
"""Makes the drafter of a runner that nobody has used yet, on the engine's own thread."""


class NotMadeError(Exception):
    """It is not made, and the engine serves without; says why."""


def drafting_by(
    runner: ModelRunner[Any],
    cache: PagedKVCache,
    costs: StepCosts,
    acceptance: AcceptanceModel,
    *,
    min_depth: int,
) -> CostlyDrafter:
    """The drafter, and who says when it is asked; what its forwards cost is measured on pages that nobody holds.

    Raises:
        NoFreeBlocksError: there are none at the moment.
        OutOfMemoryError: the device has no room for a forward.
    """
    pages = cache.pool.allocate(len(runner.kv_groups))
    try:
        draft_costs = StepCosts(measure_seconds(runner, _MEASURED_ROWS, pages=pages))
    finally:
        cache.pool.release(pages)
    drafting = AdaptiveDrafting(costs, draft_costs, acceptance, source=SELF, min_depth=min_depth)
    return CostlyDrafter(SelfDrafter(runner, cache, drafting), drafting)


class LateDrafter:
    """Made by a thread of its own, from the first `join` on: whoever loads the engine does not share a core with it.

    Args:
        path: of the target.
        runner: the target.
        finish: makes the drafter of what was made.
    """

    def __init__(self, path: str, runner: PagedRunner, finish: Finish) -> None:
        self._finish = finish
        self._made: Future[PagedRunner] = Future()
        self._closed = threading.Event()
        # Not a pool's: the process does not wait for it at its end.
        self._thread = threading.Thread(target=self._make, args=(path, runner), name="helix-self-drafter", daemon=True)

    def join(self, engine: Engine[Any]) -> bool:
        """Let it draft in an engine, on that one's own thread; False where it is not ready for that yet."""
        try:
            if self._thread.ident is None:
                self._thread.start()
            if not self._made.done():
                return False
            engine.join(self._finish(self._made.result()))
        except NoFreeBlocksError:
            return False
        except Exception as error:  # noqa: BLE001 - whatever it is, the engine serves without
            log.info("no_self_drafter", reason=str(error))
        else:
            log.info("self_drafter_ready")
        return True

    def close(self) -> None:
        """Let it not be made any more: its thread ends after what it is at, and what compiles for it at once."""
        self._closed.set()

    def _make(self, path: str, runner: PagedRunner) -> None:
        try:
            unbind_thread()
            torch.set_num_threads(1)  # this thread's, which would have a team of its own
            _check_room(runner)
            _compile_for(str(runner.kv_dtype).removeprefix("torch."), self._closed)
            _go_on_unless(self._closed)
            self._made.set_result(at_fewer_bits(path, runner))
        except Exception as error:  # noqa: BLE001 - told where it is waited for
            self._made.set_exception(error)


def _check_room(runner: PagedRunner) -> None:
    """Raises OutOfMemoryError where a byte for each weight is more than the half that the KV cache leaves of free memory."""
    parts = runner.parts
    if parts is None:
        return
    linears = [part for layer in parts.layers for together in layer.products for part in together]
    # An embedding of its own is as large as the head.
    tables = [parts.head] if parts.is_tied else [parts.head, parts.head]
    needed = sum(part.in_features * part.out_features for part in [*linears, *tables])
    free = free_memory_bytes(torch.device("cpu"))
    if needed > free // 2:
        raise OutOfMemoryError(f"{needed >> 20} MiB are needed, and {free >> 20} MiB are free, for the KV cache too")


def _compile_for(kv_dtype: str, closed: threading.Event) -> None:
    """Let another process compile what this one would have to stand still for, once for all starts.

    Args:
        kv_dtype: what keys and values are stored in.
        closed: set where nobody waits for it any more.

    Raises:
        NotMadeError: it is not compiled, or nobody waits for it any more.
    """
    what = _COMPILED_FOR + kv_dtype
    if is_compiled(what):
        return
    with compiling_alone(what, partial(_go_on_unless, closed)):
        if is_compiled(what):
            return
        _go_on_unless(closed)
        try:
            returncode = _end_of(start_compiling(kv_dtype), closed)
        except OSError as error:
            raise NotMadeError(f"nothing can be started that compiles its step: {error}") from error
        if not is_compiled(what):
            # Compiled here it would hold Python's lock against everybody who is served.
            raise NotMadeError(f"its step could not be compiled: the process that does so ended with {returncode}")


def _end_of(process: "subprocess.Popen[bytes]", closed: threading.Event) -> int:
    """The process's return code, once it ends; nobody waiting for it any more, it is killed."""
    with process:
        try:
            while (returncode := process.poll()) is None:
                _go_on_unless(closed, _LOOK_EVERY_S)
        except NotMadeError:
            process.kill()
            raise
    return returncode


def _go_on_unless(closed: threading.Event, timeout_s: float = 0.0) -> None:
    if closed.wait(timeout_s):
        raise NotMadeError("the engine has closed")


def mark_compiled_for(kv_dtype: str) -> None:
    """Note that nothing is to be compiled any more."""
    mark_compiled(_COMPILED_FOR + kv_dtype)
