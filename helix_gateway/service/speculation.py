"""Who drafts for an engine, and how deep, from its settings.

Knows which drafters there are; how they work is the engine's affair.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import structlog

from helix_gateway.core.errors import ModelLoadError, OutOfMemoryError
from helix_gateway.core.protocols import ModelRunner, VocabularyTranslation
from helix_gateway.engine.acceptance import AcceptanceModel
from helix_gateway.engine.depth import AdaptiveDepth, DepthPolicy, FixedDepth
from helix_gateway.engine.drafters.base import Drafter
from helix_gateway.engine.drafters.chain import CostlyDrafter
from helix_gateway.engine.drafters.model import ModelDrafter
from helix_gateway.engine.drafters.none import NoDrafter
from helix_gateway.engine.drafters.suffix import SuffixDrafter
from helix_gateway.engine.drafting import AdaptiveDrafting
from helix_gateway.engine.kv_cache import PagedKVCache
from helix_gateway.engine.step_costs import KNOTS, StepCosts, measure_seconds, rescaled
from helix_gateway.runtime.paged_runner import PagedRunner
from helix_gateway.runtime.remembered import NothingRemembered, Remembered
from helix_gateway.service.self_drafting import Finish, drafting_by
from helix_gateway.service.settings import EngineSettings

log = structlog.get_logger(__name__)

PROFILED_ROWS = (1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048)
"""Numbers of rows whose cost is measured at the start, up to where costs are in proportion; the rest is read off between
them."""
_REMEMBERED_AS = "step_seconds"
_LEAST_CATCH_UP = 16
_MOST_CATCH_UP = 256


@dataclass(frozen=True, slots=True)
class DraftModel:
    """A draft model on its device, and how its tokens are the target's."""

    runner: ModelRunner[Any]
    context_length: int
    translation: VocabularyTranslation | None
    remembered: Remembered = field(default_factory=NothingRemembered)
    """What is known of it."""


@dataclass(frozen=True, slots=True)
class Speculation:
    """All that an engine needs to speculate."""

    drafter: Drafter
    depth_policy: DepthPolicy
    costly_drafter: CostlyDrafter | None = None
    finish_self: Finish | None = None
    """Makes a drafter of the target at fewer bits, which may come later; None: drafts are not wanted."""


_NONE = Speculation(NoDrafter(), FixedDepth(0))


def wants_draft_model(settings: EngineSettings) -> bool:
    """Whether a draft model is to be loaded.

    Raises:
        ModelLoadError: it is, but none is named; or one is named that cannot draft.
    """
    if settings.speculation == "model" and settings.draft_model_path is None:
        raise ModelLoadError("--speculation model needs a draft model: name it with --draft-model.")
    if settings.speculation == "self" and settings.draft_model_path is not None:
        raise ModelLoadError("--speculation self drafts without a draft model: leave --draft-model out.")
    usable = settings.speculation in {"auto", "model"} and settings.max_depth > 0
    return usable and settings.draft_model_path is not None


def wants_self_drafter(settings: EngineSettings, runner: PagedRunner) -> bool:
    """Whether the target may draft for itself at fewer bits, as far as is known before that is tried.

    Raises:
        ModelLoadError: that alone is asked for, and cannot be had.
    """
    if settings.speculation == "self" and runner.is_quantised:
        raise ModelLoadError(
            "--speculation self drafts by the weights at fewer bits, and these are quantised already: "
            "add --dtype float32 or bfloat16, or leave it out."
        )
    can = settings.draft_model_path is None and runner.parts is not None and not runner.is_quantised
    return settings.max_depth > 0 and (settings.speculation == "self" or (settings.speculation == "auto" and can))


def make_speculation(
    settings: EngineSettings,
    runner: ModelRunner[Any],
    max_rows: int,
    *,
    cache: PagedKVCache | None = None,
    draft_model: DraftModel | None = None,
    remembered: Remembered | None = None,
) -> Speculation:
    """The drafters and the policies that the settings ask for; what steps and drafts cost is measured for the latter.

    Args:
        max_rows: tokens that a step may compute.
        cache: of the pool that both models' pages are from, where there is a draft model.
        remembered: what is known of the target; None: nothing.
    """
    if settings.speculation == "off" or not settings.max_depth:
        return _NONE
    row_counts = [rows for rows in PROFILED_ROWS if rows <= max_rows]
    acceptance = AcceptanceModel()
    costs = _costs(runner, row_counts, remembered or NothingRemembered(), whose="model")
    if costs is None:  # the first request will be told; there is no room for drafts in any case
        return _NONE
    draft_costs = (
        None
        if draft_model is None
        else _costs(draft_model.runner, row_counts, draft_model.remembered, whose="draft model")
    )
    policy = AdaptiveDepth(costs, max_depth=settings.max_depth, min_depth=settings.min_depth, acceptance=acceptance)
    free = NoDrafter() if settings.speculation in {"model", "self"} else SuffixDrafter()
    if cache is None:
        return Speculation(free, policy)
    if draft_model is None or draft_costs is None:
        finish = partial(drafting_by, cache=cache, costs=costs, acceptance=acceptance, min_depth=settings.min_depth)
        return Speculation(free, policy, finish_self=finish)
    drafting = AdaptiveDrafting(costs, draft_costs, acceptance, min_depth=settings.min_depth)
    drafter = ModelDrafter(
        draft_model.runner,
        cache,
        drafting,
        context_length=draft_model.context_length,
        target_vocab_size=runner.vocab_size,
        translation=draft_model.translation,
        catch_up_tokens=_catch_up_tokens(costs, draft_costs),
    )
    return Speculation(free, policy, CostlyDrafter(drafter, drafting))


def _costs(runner: ModelRunner[Any], row_counts: list[int], remembered: Remembered, *, whose: str) -> StepCosts | None:
    """What its forwards cost; None where the device has no room for a single row, which is told once."""
    try:
        return StepCosts(_known_seconds(runner, row_counts, remembered) or _measured(runner, row_counts, remembered))
    except OutOfMemoryError as error:
        log.warning("no_memory_to_measure_speculation", whose=whose, reason=str(error))
        return None


def _known_seconds(runner: ModelRunner[Any], row_counts: list[int], remembered: Remembered) -> dict[int, float] | None:
    known = remembered.get(_REMEMBERED_AS)
    if known is None or known["row_counts"] != row_counts:
        return None
    return rescaled({int(rows): seconds for rows, seconds in known["seconds"].items()}, runner)


def _measured(runner: ModelRunner[Any], row_counts: list[int], remembered: Remembered) -> dict[int, float]:
    seconds = measure_seconds(runner, row_counts)
    remembered.put(_REMEMBERED_AS, {"row_counts": row_counts, "seconds": seconds})
    return seconds


def _catch_up_tokens(costs: StepCosts, draft_costs: StepCosts) -> int:
    """As many as the draft model reads while the target makes a plain step, so that no step takes much over two."""
    readable: list[int] = [int(rows) for rows in KNOTS if draft_costs.seconds_for(rows) <= costs.seconds_for(1)]
    return min(max([_LEAST_CATCH_UP, *readable]), _MOST_CATCH_UP)
