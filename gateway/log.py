"""The log: sentences for people, or the same facts as JSON for machines.

Every line has a fixed event name and its facts in `extra`; what a user wrote is in none.
"""

import logging
import re
import sys
import time
from collections.abc import Callable, Hashable
from typing import TextIO

import orjson

from gateway.domain.model import UserId

_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_NUMBER = re.compile(r"[0-9]+([0-9]{4})")
_mask = False


def set_up(level: str, form: str, *, mask_users: bool, stream: TextIO | None = None) -> None:
    """Send every logger's lines to stream (standard error); form is "text" or "json"."""
    global _mask
    _mask = mask_users
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    if stream is None and hasattr(sys.stderr, "reconfigure"):
        # A line must come out wherever it is written to: a C locale knows no emoji.
        sys.stderr.reconfigure(encoding="utf-8", errors="backslashreplace")
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # uvicorn says "Started server process" and the like: of use to its developers.
    logging.getLogger("uvicorn").setLevel("WARNING")
    for name in ("asyncio", "httpx", "aiohttp"):
        logging.getLogger(name).setLevel("WARNING")
    # What no line shows need not be found out for each line.
    logging._srcfile = None  # nor where it was written (Python's logging HOWTO, "Optimization")
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


def shown(user: UserId) -> str:
    """How user may appear in a line: whole, or with LOG_MASK_USERS only the last four digits."""
    if not _mask:
        return user
    number, at, server = user.rpartition("/")[2].partition("@")
    return f"…{number[-4:]}{at}{server}"


def masked(text: str) -> str:
    """Others' words, in which a user's number may appear; with LOG_MASK_USERS its last four
    digits."""
    return _NUMBER.sub(r"…\1", text) if _mask else text


class Throttle:
    """Lets each key through once in `seconds`, and at most `most` keys: who can choose the key
    (an address, say) can fill neither the log nor the memory."""

    def __init__(
        self,
        seconds: float = 60.0,
        *,
        most: int = 1000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds = seconds
        self._most = most
        self._clock = clock
        self._last: dict[Hashable, float] = {}  # in order of time

    def passes(self, key: Hashable) -> bool:
        now = self._clock()
        while self._last and now - next(iter(self._last.values())) >= self._seconds:
            del self._last[next(iter(self._last))]
        if key in self._last or len(self._last) >= self._most:
            return False
        self._last[key] = now
        return True

    def warn(
        self, log: logging.Logger, key: Hashable, sentence: str, *values: object, **facts: object
    ) -> None:
        """Warn, if key passes. facts: the fields of the line, event among them."""
        if self.passes(key):
            often = {60.0: "a minute", 3600.0: "an hour"}.get(self._seconds, "in a while")
            log.warning(f"{sentence} (logged once {often})", *values, extra=facts)

    def forget(self, key: Hashable) -> None:
        """key passes again at once."""
        self._last.pop(key, None)


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__()
        self._second = 0
        self._clock = ""

    def format(self, record: logging.LogRecord) -> str:
        second = int(record.created)
        if second != self._second:  # thousands of lines share one second
            self._clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
            self._second = second
        line = f"{self._clock} {record.levelname} {record.getMessage()}"
        if record.exc_info:
            line = f"{line}\n{self.formatException(record.exc_info)}"
        return line


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": record.created,
            "level": record.levelname,
            "event": getattr(record, "event", record.name),
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _PLAIN}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()
