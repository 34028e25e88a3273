"""How far our clock is off WhatsApp's, by the times of the messages as they come.

Links are judged by the time that WhatsApp has stamped on them, an operator's decision by our clock.
A clock that is ahead makes a client's next link older than the decision before it; one that is
behind (Docker Desktop and WSL after a sleep) lets an old link undo it.
"""

import statistics
import time
from collections import OrderedDict, deque
from collections.abc import Callable

from gateway.domain.model import MESSAGE_EVENTS, InboundMessage, UserId

MIN_SAMPLES = 3  # one message may be late, or its time be odd
_SAMPLES = 9
_SAMPLE_SECONDS = 600.0  # those of before count only while there are too few later ones
_AHEAD_SECONDS = 60.0  # messages may be late, and then all of them for a while
_BEHIND_SECONDS = 30.0  # none can be early
_TOLERANCE_SECONDS = 60.0  # between two messages' differences
_JUMP_SECONDS = 5.0  # of our clock: what was noted before says nothing any more
_MAX_USERS = 10_000  # whose newest time is remembered


class ClockSkew:
    """Fed with every message that comes by webhook; recovered ones are late by nature."""

    def __init__(
        self,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._monotonic = monotonic
        # When each was noted (monotonic), and arrived minus sent, seconds.
        self._samples: deque[tuple[float, float]] = deque(maxlen=_SAMPLES)
        self._started_at = clock() - monotonic()
        self._newest: OrderedDict[UserId, float] = OrderedDict()  # WhatsApp's times, by user

    def note(self, message: InboundMessage) -> None:
        """Compare the times of a message that just came."""
        if message.stamped_at is None or message.own or message.event not in MESSAGE_EVENTS:
            return
        self._forget_after_jump()
        self._samples.append((self._monotonic(), message.arrived - message.stamped_at))
        # As links are judged: a time from the future counts as its arrival.
        sent_at = float(message.sent.second)
        for user in (message.phone, message.lid):
            if user:
                self._newest[user] = max(self._newest.get(user, 0.0), sent_at)
                self._newest.move_to_end(user)
        while len(self._newest) > _MAX_USERS:
            self._newest.popitem(last=False)

    def seconds_ahead(self) -> float | None:
        """Seconds that our clock is ahead of WhatsApp's, negative if it is behind, 0.0 if they
        agree; None while too few messages have come to know."""
        self._forget_after_jump()
        oldest = self._monotonic() - _SAMPLE_SECONDS
        differences = [seconds for noted_at, seconds in self._samples if noted_at >= oldest]
        if len(differences) < MIN_SAMPLES:  # a quiet night: what was known is the best guess
            differences = [seconds for _, seconds in self._samples]
        if len(differences) < MIN_SAMPLES:
            return None
        if (usual := statistics.median_high(differences)) < -_BEHIND_SECONDS:
            return usual
        least = min(differences)
        return least if least > _AHEAD_SECONDS else 0.0

    def latest(self) -> float:
        """The time, by WhatsApp's clock, after which a message is from the future."""
        ahead = self.seconds_ahead() or 0.0
        return self._clock() - ahead + _TOLERANCE_SECONDS if ahead < 0 else self._clock()

    def decided_at(self, user: UserId | None = None) -> float:
        """Now by WhatsApp's clock, and not before the newest message of user: a decision that is
        taken now about user. Unix seconds."""
        now = self._clock() - (self.seconds_ahead() or 0.0)
        newest = self._newest.get(user, 0.0) if user else 0.0
        # Our clock may have been set right since.
        return max(now, newest) if newest <= now + _TOLERANCE_SECONDS else now

    def _forget_after_jump(self) -> None:
        started_at = self._clock() - self._monotonic()
        if abs(started_at - self._started_at) > _JUMP_SECONDS:
            self._samples.clear()
            self._started_at = started_at
