"""How sure a ratio is that was measured several times.  Knows nothing about what is measured."""

import math
import statistics

STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Its 97.5 % quantiles by degrees of freedom, from 1; with more the last is taken, which is too wide by a little."""


def interval(ratios):
    """95 % interval of the mean of the logarithms, as a ratio; none of a single one."""
    logs = [math.log(ratio) for ratio in ratios]
    if len(logs) < 2:
        return [0.0, math.inf]
    reach = STUDENT[min(len(logs) - 2, len(STUDENT) - 1)] * statistics.stdev(logs) / math.sqrt(len(logs))
    mean = statistics.fmean(logs)
    return [math.exp(mean - reach), math.exp(mean + reach)]
