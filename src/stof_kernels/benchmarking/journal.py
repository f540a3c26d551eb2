"""What a measuring job has finished so far, so that a killed job measures only the rest.

One JSON line per finished cell, appended and flushed to the disk before the next cell starts. The first line says what the
numbers depend on (settings, code, machine); a journal of anything else is started anew.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .measurement import Measurement, MeasurementError

Entry = list[Measurement]


class Journal:
    """Finished cells of one job.

    ``identity`` is a JSON-able dict of all that the numbers depend on. ``about`` is stored beside it when the journal is
    new and read back when the job resumes (run id, date): it does not decide whether the journal still holds.
    """

    def __init__(self, path: Path, identity: dict[str, Any], about: dict[str, Any]):
        self.path = Path(path)
        self.done: dict[str, Entry] = {}
        self.about = about
        self.resumed = False
        self._identity = json.loads(json.dumps(identity))
        good = self._read()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.resumed:
            with open(self.path, "r+b") as file:
                file.truncate(good)
        else:
            self.done = {}
            self.path.unlink(missing_ok=True)
            self._append({"identity": self._identity, "about": about})

    def _read(self) -> int:
        """Take over what an earlier run of the same job finished; returns the length of the readable part in bytes."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return 0
        good = 0
        for line in data.splitlines(keepends=True):
            # A kill can leave half a line at the end. Nothing after the first unreadable line is trusted.
            if not line.endswith(b"\n") or not self._take(line):
                break
            good += len(line)
        return good

    def _take(self, line: bytes) -> bool:
        try:
            entry = json.loads(line)
            if not self.resumed:
                self.resumed = entry["identity"] == self._identity
                self.about = entry["about"] if self.resumed else self.about
                return self.resumed
            self.done[entry["cell"]] = [Measurement(**row) for row in entry["rows"]]
        except (ValueError, KeyError, TypeError, MeasurementError):
            return False
        return True

    def _append(self, entry: dict[str, Any]) -> None:
        with open(self.path, "ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def finish(self, cell: str, rows: Entry) -> None:
        """Record a finished cell; on return it survives a kill and a power cut."""
        self._append({"cell": cell, "rows": [asdict(row) for row in rows]})
        self.done[cell] = rows

    def close(self) -> None:
        """Forget the journal, once the table that it led to is on disk: the next job measures anew."""
        self.path.unlink(missing_ok=True)
