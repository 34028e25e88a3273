"""migrate: carry all that one store holds into another one."""

from collections.abc import Mapping
from typing import Never

from tqdm import tqdm

from gateway.store.migration import migrate

_PROGRESS = {
    "lock": "locks",
    "alias": "pairs of ids",
    "history": "history entries",
    "person": "records of persons",
    "tenant": "delivered so far",
    "heard": "times of WAHA sessions' last messages",
    "dead_letter": "dead letters",
    "held": "held messages",
    "unreadable": "messages that could not be read",
    "delivery": "waiting messages",
    "seen": "dedup keys",
}


async def migrate_stores(source: str, target: str) -> int:
    """Return the exit status. Raise StartRefused if it could not be done."""
    bar: tqdm[Never] = tqdm(unit=" rows", disable=None, leave=False)  # on a terminal only

    def begin(counts: Mapping[str, int]) -> None:
        bar.reset(sum(count for table, count in counts.items() if table != "tenant"))

    def show(table: str, rows: int) -> None:
        bar.set_description(_PROGRESS[table], refresh=False)
        if table != "tenant":
            bar.update(rows)

    with bar:
        arrived = await migrate.migrate(source, target, begin=begin, show=show)
    for table, count in arrived.items():
        print(f"{count:>12,} {_PROGRESS[table]}")
    print("all there, and counted: start the routers with the new STORE_URL")
    return 0
