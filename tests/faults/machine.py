"""What may be on a disk after a crash, made from the record of a process's calls (disk.c).

The model is as unkind as POSIX allows, but for two things that ext4, XFS and btrfs all do: fsync
of a new file keeps its name, too, and a sector of 512 bytes is written whole or not at all. A write
that no fsync followed may be on the disk, wholly, in part, or not; so may a rename, an unlink or a
new name that no fsync of the folder followed. Writes that a failed fsync was to make durable never
are, though whoever reads the file is shown them (Rebello et al., "Can Applications Recover from
fsync Failures?", USENIX ATC 2020).
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

SECTOR = 512


class Call(NamedTuple):
    name: str  # of the file; "." is the folder
    what: str
    where: int
    data: bytes


def calls(trace: Path) -> Iterator[Call]:
    with trace.open("rb") as file:
        while head := file.readline():
            name, what, where, size = head.decode().split("\t")
            yield Call(name, what, int(where), file.read(int(size)))


@dataclass
class File:
    shown: bytearray = field(default_factory=bytearray)  # to who reads it
    durable: bytearray = field(default_factory=bytearray)
    pending: list[Call] = field(default_factory=list)  # on their way to the disk


class Machine:
    def __init__(self) -> None:
        self.shown: dict[str, File] = {}
        self.durable: dict[str, File] = {}

    def apply(self, call: Call) -> None:
        if call.what == "create":
            self.shown[call.name] = File()
        elif call.what == "unlink":
            del self.shown[call.name]
        elif call.what == "rename":
            self.shown[call.name] = self.shown.pop(call.data.decode())
        elif call.name == ".":
            if call.what == "fsync":
                self.durable = dict(self.shown)
        elif call.what in ("write", "truncate"):
            file = self.shown[call.name]
            _change(file.shown, call)
            file.pending.append(call)
        else:  # fsync, or one that failed
            file = self.shown[call.name]
            if call.what == "fsync":
                for one in file.pending:
                    _change(file.durable, one)
                if file not in self.durable.values():
                    self.durable[call.name] = file
            file.pending.clear()

    def after_a_kill(self) -> dict[str, bytes]:
        return {name: bytes(file.shown) for name, file in self.shown.items()}

    def after_a_power_cut(self, dice: random.Random | None = None) -> dict[str, bytes]:
        """Only what was synced; with dice also some of the rest."""
        names = self.shown if dice and dice.random() < 0.5 else self.durable
        return {name: _after_a_power_cut(file, dice) for name, file in names.items()}


def _after_a_power_cut(file: File, dice: random.Random | None) -> bytes:
    content = bytearray(file.durable)
    for call in file.pending if dice else ():
        assert dice
        if dice.random() < 0.5:
            whole = dice.random() < 0.5
            stored = len(call.data) if whole else dice.randrange(0, len(call.data) + 1, SECTOR)
            _change(content, call._replace(data=call.data[:stored]))
    return bytes(content)


def _change(content: bytearray, call: Call) -> None:
    if call.what == "truncate":
        del content[call.where :]
        content.extend(bytes(call.where - len(content)))
        return
    end = call.where + len(call.data)
    content.extend(bytes(max(0, end - len(content))))
    content[call.where : end] = call.data
