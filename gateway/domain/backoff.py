"""How long to wait after a failed attempt."""

import random
from collections.abc import Callable

Draw = Callable[[], float]


def delay(attempt: int, *, first: float, longest: float, draw: Draw = random.random) -> float:
    """Seconds to wait after failed attempt number attempt, counted from 1.

    Doubles from first up to longest, then takes a uniform share of it, so that users held back by
    one outage do not all come back at once ("full jitter", AWS Architecture Blog, 2015).
    """
    # The exponent is capped: past 1023 the power no longer fits a float.
    return draw() * min(longest, first * 2.0 ** min(attempt - 1, 32))
