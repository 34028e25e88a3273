"""How many events lack what we read in them: WAHA's engines rename fields now and then.

The share must show before clients notice that their links do nothing.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable

from gateway.domain.model import InboundMessage
from gateway.log import Throttle
from gateway.metrics import Metrics
from gateway.settings import WAHA_EVENTS

_TURN_SECONDS = 1800.0  # of two: what is reported is of the last half hour, and up to an hour

log = logging.getLogger(__name__)


class SchemaDrift:
    def __init__(self, metrics: Metrics, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._monotonic = monotonic
        self._complaints = Throttle(clock=monotonic)
        self._turn = 0
        # (event, part or "") → how many; the empty part counts all of the event
        self._now: Counter[tuple[str, str]] = Counter()
        self._before: Counter[tuple[str, str]] = Counter()

    def see(self, message: InboundMessage) -> None:
        # A caller could make up names without end.
        name = message.event if message.event in WAHA_EVENTS else "other"
        self._metrics.event(name, message.chat.value, message.odd_part)
        self._take_turns()
        self._now[name, ""] += 1
        if message.odd_part is None:
            return
        self._now[name, message.odd_part] += 1
        self._complaints.warn(
            log,
            (name, message.odd_part),
            "🧩 An event %s of session %s has no usable `%s`: has WAHA changed its form?",
            name,
            message.session,
            message.odd_part,
            event="webhook.odd",
            waha_event=name,
            part=message.odd_part,
        )

    def odd(self) -> list[str]:
        """A sentence for each kind of odd event lately, the most frequent first."""
        self._take_turns()
        counts = self._now + self._before
        return [
            f"{count} of {counts[name, '']} {name} events without a usable {part}"
            for (name, part), count in counts.most_common()
            if part
        ]

    def _take_turns(self) -> None:
        turn = int(self._monotonic() // _TURN_SECONDS)
        if turn != self._turn:
            self._before = self._now if turn == self._turn + 1 else Counter()
            self._now = Counter()
            self._turn = turn
