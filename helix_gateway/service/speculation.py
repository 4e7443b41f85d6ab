"""Who drafts for an engine, and how deep, from its settings.

Knows which drafters there are; how they work is the engine's affair.
"""

from typing import Any

from helix_gateway.core.errors import OutOfMemoryError
from helix_gateway.core.protocols import ModelRunner
from helix_gateway.engine.depth import AdaptiveDepth, DepthPolicy, FixedDepth
from helix_gateway.engine.drafters.base import Drafter
from helix_gateway.engine.drafters.none import NoDrafter
from helix_gateway.engine.drafters.suffix import SuffixDrafter
from helix_gateway.engine.step_costs import measure_costs
from helix_gateway.service.settings import EngineSettings

PROFILED_ROWS = (1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048)
"""Numbers of rows whose cost is measured at the start, up to where costs are in proportion; the rest is read off between
them."""


def make_speculation(settings: EngineSettings, runner: ModelRunner[Any], max_rows: int) -> tuple[Drafter, DepthPolicy]:
    """The drafter and the depth policy that the settings ask for; the costs of steps are measured for the latter.

    Args:
        max_rows: tokens that a step may compute.
    """
    if settings.speculation == "off" or not settings.max_depth:
        return NoDrafter(), FixedDepth(0)
    try:
        costs = measure_costs(runner, [rows for rows in PROFILED_ROWS if rows <= max_rows])
    except OutOfMemoryError:  # the first request will be told; there is no room for drafts in any case
        return NoDrafter(), FixedDepth(0)
    return SuffixDrafter(), AdaptiveDepth(costs, max_depth=settings.max_depth, min_depth=settings.min_depth)
