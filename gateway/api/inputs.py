"""What the endpoints of /router take, checked and in our types; and times as they answer them."""

from datetime import UTC, datetime
from typing import Annotated

from fastapi import HTTPException, Path, Query

from gateway.domain import phone_numbers
from gateway.domain.model import LARGEST_TENANT, SESSION_NAME, UserId, scoped

LARGEST_ID = 2**63 - 1

Session = Annotated[
    str | None,
    Query(pattern=f"^{SESSION_NAME}$", description="another WAHA session than WAHA_SESSION"),
]
TenantNumber = Annotated[int, Path(ge=1, le=LARGEST_TENANT, description="the tenant's number")]
Limit = Annotated[int, Query(ge=1, le=100_000)]
Before = Annotated[int | None, Query(ge=1, le=LARGEST_ID, description="`next` of the page before")]


class Users:
    """Reads users as people write them, for a gateway with that home session and phone."""

    def __init__(self, *, home_session: str, gateway_phone: str) -> None:
        self._home_session = home_session
        self._gateway_phone = gateway_phone

    def named(self, text: str, session: str | None) -> UserId:
        """The user that text names, in any usual spelling; 422 if it names none."""
        if known := phone_numbers.person(text, gateway_phone=self._gateway_phone):
            return scoped(session or self._home_session, known, self._home_session)
        raise HTTPException(
            422,
            f"{text[:60]!r} is no user: 5-20 digits with the country code in any usual spelling,"
            " …@c.us or …@lid",
        )


def time_text(seconds: float) -> str:
    """A Unix time as people and programs read it: 2026-07-01T08:00:00Z."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def time_or_null(seconds: float | None) -> str | None:
    return None if seconds is None else time_text(seconds)
