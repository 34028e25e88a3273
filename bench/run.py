"""The measurements: make bench, or .venv/bin/python bench/run.py [SCENARIO …]

Scenarios, in this order; without a name all run, which takes about 30 minutes:

SCENARIOS

The one under test is pinned to the first core; the load and the backend share the second. Each
run has message ids of its own. At the end stands a table of what was measured and what it must
reach; bench/README.md tells how to read it.
"""

import argparse
import asyncio
import inspect
import os
import shutil
import tempfile
import time
from pathlib import Path

import reliability
import shared
import size
import throughput
import uvloop
from load import Row, machine

SCENARIOS = {
    "forward": throughput.forward,
    "accept": throughput.accept,
    "locks": size.locks,
    "cost": size.cost,
    "start": size.start,
    "ack": reliability.ack,
    "outage": reliability.outage,
    "slow": reliability.slow,
    "waiting": reliability.waiting,
    "growth": reliability.growth,
    "redis": shared.shared,
    "move": shared.move,
}


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=_reported(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenario", nargs="*")
    chosen = parser.parse_args().scenario or list(SCENARIOS)
    if unknown := set(chosen) - set(SCENARIOS):
        parser.error(f"{unknown.pop()!r} is none of {', '.join(SCENARIOS)}")
    os.sched_setaffinity(0, {1})
    print(f"{machine()}, {time.strftime('%Y-%m-%d')}")
    rows: list[Row] = []
    for name in chosen:
        folder = Path(tempfile.mkdtemp(prefix=f"bench-{name}-"))
        print(f"{name}:", flush=True)
        try:
            async for row in SCENARIOS[name](folder):
                rows.append(row)
                print(f"  {row.what}: {row.got}", flush=True)
        finally:
            shutil.rmtree(folder)
    print("\n| measured | must reach | was | met |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row.what} | {row.bar} | {row.got} | {'yes' if row.met else '**no**'} |")


def _reported() -> str:
    modules = dict.fromkeys(inspect.getmodule(one) for one in SCENARIOS.values())
    lists = [inspect.getdoc(one).partition("\n\n")[2] for one in modules]  # type: ignore[union-attr]
    return (__doc__ or "").replace("SCENARIOS", "\n".join(lists))


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
