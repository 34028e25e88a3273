"""move: carry all that one store holds into another one."""

from collections.abc import Mapping
from typing import Never

from tqdm import tqdm

from gateway.store.migration import migrate

_TOLD = {
    "lock": "locks",
    "alias": "pairs of ids",
    "history": "lines of the history",
    "help": "help messages",
    "tenant": "delivered so far",
    "heard": "times that WAHA sessions were heard",
    "dead_letter": "dead letters",
    "held": "held messages",
    "unreadable": "messages that could not be read",
    "delivery": "waiting messages",
    "seen": "seen keys",
}


async def move_house(source: str, target: str) -> int:
    """The exit status; StartRefused if it could not be done."""
    bar: tqdm[Never] = tqdm(unit=" rows", disable=None, leave=False)  # on a terminal only

    def begin(counts: Mapping[str, int]) -> None:
        bar.reset(sum(count for table, count in counts.items() if table != "tenant"))

    def show(table: str, rows: int) -> None:
        bar.set_description(_TOLD[table], refresh=False)
        if table != "tenant":
            bar.update(rows)

    with bar:
        arrived = await migrate.move(source, target, begin=begin, show=show)
    for table, count in arrived.items():
        print(f"{count:>12,} {_TOLD[table]}")
    print("all there, and counted: start the routers with the new STORE_URL")
    return 0
