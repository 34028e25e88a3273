"""Where webhooks come from: by the path that they are posted to, who reads their bodies.

Another product than WAHA is a folder beside waha/ with its own parse(), and one line here. What
only WAHA has (sessions, LIDs to look up, media) is empty in what it returns.
"""

from collections.abc import Mapping
from typing import Protocol

from gateway.domain.model import InboundMessage
from gateway.settings import WEBHOOK_PATH
from gateway.waha import events


class Parse(Protocol):
    def __call__(
        self,
        body: bytes,
        headers: Mapping[str, str],
        *,
        home_session: str,
        own_ids: frozenset[str],
        now: float,
        latest: float | None = None,
    ) -> InboundMessage:
        """See waha.events.parse()."""


SOURCES: dict[str, Parse] = {WEBHOOK_PATH: events.parse}

# With a slash at the end, too: a redirect would lose the body.
PATHS = frozenset({*SOURCES, *(f"{path}/" for path in SOURCES)})


def parse_of(path: str) -> Parse:
    """Return who reads what is posted to path, one of PATHS."""
    return SOURCES[path.removesuffix("/")]
