"""The cause of a history entry as Redis has it: one text, where files have three columns."""

from typing import NamedTuple

from gateway.domain.lock_events import Kind, Why

_SAYS_WAHA = ", says WAHA"
_TENANT_MOVE = "operator, with all of the tenant"
_IMPORT = "router_mappings.json"


class Cause(NamedTuple):
    """See lock_events.LockEvent; why None: the person was erased."""

    why: str | None
    who: str | None = None
    other: str | None = None


def pack(cause: Cause) -> str:
    source = _SAYS_WAHA if cause.who == "waha" else ""
    match cause.why:
        case Why.MERGED_INTO.value:
            return f"is {cause.other or ''}{source}"
        case Why.MERGED_FROM.value:
            return f"was {cause.other or ''}{source}"
        case Why.OPERATOR.value:
            return "operator"
        case Why.TENANT_MOVE.value:
            return _TENANT_MOVE
        case Why.IMPORT.value:
            return _IMPORT
    return ""


def unpack(text: str, *, user: str, kind: str) -> Cause:
    """user: whose entry it is; kind: lock_events.Kind or model.Note."""
    who = "waha" if text.endswith(_SAYS_WAHA) else None
    verb, _, other = text.removesuffix(_SAYS_WAHA).partition(" ")
    if text in (_TENANT_MOVE, _IMPORT, "operator"):
        codes = {_TENANT_MOVE: Why.TENANT_MOVE, _IMPORT: Why.IMPORT, "operator": Why.OPERATOR}
        return Cause(codes[text].value)
    if verb in ("is", "was"):
        why = Why.MERGED_INTO if verb == "is" else Why.MERGED_FROM
        return Cause(why.value, who, other or None)
    # Of a merge with somebody who was erased since nothing is left.
    is_erased = user.startswith("erased-") or kind == Kind.MERGED.value
    return Cause(None if is_erased else Why.LINK.value)
