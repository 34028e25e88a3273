"""The short form of the kill campaign. The long one: python -m tests.e2e.campaign --kills 1000."""

import pytest

from tests.e2e.campaign import MUST_BE_ZERO, SCENARIOS, play


@pytest.mark.parametrize(("scenario", "seed"), list(zip(SCENARIOS, (11, 12, 13), strict=True)))
async def test_kills_lose_double_and_invert_nothing(scenario: str, seed: int) -> None:
    counts = await play(4, seed, scenario, print)
    assert counts["acked"] > 50
    assert {name: counts[name] for name in MUST_BE_ZERO} == dict.fromkeys(MUST_BE_ZERO, 0)
