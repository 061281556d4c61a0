"""Progress of long work on standard error: done, rate and time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

_silent = False


def silence() -> None:
    """Say nothing from now on: another process does the same work and says it."""
    global _silent
    _silent = True


class Progress:
    """Counts work and says now and then how far it is: `collect  41%  4,096/10,000 tokens  8,120/s  0:01 left`.

    A terminal gets one line that is rewritten; anything else a line every five seconds. Work that ends within
    a second prints nothing but the closing line.
    """

    def __init__(self, label: str, total: int, unit: str):
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self.stream = sys.stderr
        self._started = time.monotonic()
        self._first_done = 0
        self._is_terminal = self.stream.isatty()
        self._interval_seconds = 0.2 if self._is_terminal else 5.0
        self._last = self._started
        self.note = ""

    def resume_at(self, done: int) -> None:
        """Work that an earlier, interrupted run did: counted as done, not in the rate."""
        self.done = self._first_done = done

    def advance(self, amount: int, note: str = "") -> None:
        """Add work done; note: a few words on how it goes, such as the loss."""
        self.done += amount
        self.note = note
        now = time.monotonic()
        if now - self._last >= self._interval_seconds:
            self._last = now
            self._say(now, end="" if self._is_terminal else "\n")

    def close(self) -> None:
        """The last line: everything done, the rate over all of it and the time it took."""
        self._say(time.monotonic(), end="\n", closing=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        elif self._is_terminal and not _silent:
            self.stream.write("\n")

    def track(self, items: Iterable[T]) -> Iterator[T]:
        """Pass items through, counting one each."""
        for item in items:
            yield item
            self.advance(1)

    def _say(self, now: float, *, end: str, closing: bool = False) -> None:
        if _silent:
            return
        seconds = max(now - self._started, 1e-6)
        rate = (self.done - self._first_done) / seconds
        # The last piece of work may be larger than what was left of it.
        share = f"{min(100 * self.done / self.total, 100):3.0f}%  " if self.total else ""
        of_total = f"/{self.total:,}" if self.total else ""
        if closing:
            tail = f"in {clock(seconds)}"
        elif rate > 0 and self.total:
            tail = f"{clock((self.total - self.done) / rate)} left"
        else:
            tail = ""
        shown_rate = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        note = f"  {self.note}" if self.note else ""
        line = f"{self.label:<9} {share}{self.done:,}{of_total} {self.unit}  {shown_rate}/s  {tail}{note}"
        prefix = "\r\x1b[K" if self._is_terminal else ""
        self.stream.write(f"{prefix}{line}{end}")
        self.stream.flush()


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
