import pytest

from gateway.domain.backoff import delay


@pytest.mark.parametrize(
    ("attempt", "longest_wait"),
    [(1, 1), (2, 2), (3, 4), (9, 256), (10, 300), (33, 300), (2000, 300)],
)
def test_the_wait_doubles_up_to_the_longest(attempt: int, longest_wait: float) -> None:
    assert delay(attempt, first=1, longest=300, draw=lambda: 1.0) == longest_wait


def test_a_draw_takes_its_share_of_the_wait() -> None:
    assert delay(3, first=1, longest=300, draw=lambda: 0.25) == 1.0
    assert delay(3, first=1, longest=300, draw=lambda: 0.0) == 0.0
