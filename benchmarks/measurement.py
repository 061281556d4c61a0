"""Interleaved timing, and the row that every benchmark ends in."""

from __future__ import annotations

import ctypes
import gc
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """One thing measured next to others in the same run.

    seconds: median per call. ratio: seconds over those of `against`.
    """

    benchmark: str
    subject: str
    seconds: float
    ratio: float
    against: str
    note: str = ""


def interleaved(
    subjects: Mapping[str, Callable[[], Any]], *, rounds: int = 7, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each subject, timed in turn A B C A B C, so that a machine that drifts drifts for all.

    clock: `time.process_time` on a machine that is busy with other work; right for one thread only.
    """
    for run in subjects.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, run in subjects.items():
            gc.collect()
            start = clock()
            run()
            times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def compared(
    benchmark: str,
    subjects: Mapping[str, Callable[[], Any]],
    *,
    against: str,
    notes: Mapping[str, str] | None = None,
    rounds: int = 7,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Measurement]:
    """Each subject's median and its ratio to the subject called `against`; clock as for `interleaved`."""
    seconds = interleaved(subjects, rounds=rounds, clock=clock)
    return [
        Measurement(benchmark, name, value, value / seconds[against], against, (notes or {}).get(name, ""))
        for name, value in seconds.items()
    ]


class AnonymousMemory:
    """Peak anonymous memory of this process while the context lasts, above what it was at its start, in bytes.

    Sampled from /proc (Linux, glibc). Mapped file pages don't count: they are the page cache's, not the program's.
    reuses_freed: what was freed before and the allocator kept is used again without being counted.
    """

    def __init__(self, interval_seconds: float = 0.002, *, reuses_freed: bool = False):
        self.peak_bytes = 0
        self._interval_seconds, self._reuses_freed = interval_seconds, reuses_freed
        self._ended = threading.Event()

    def __enter__(self) -> AnonymousMemory:
        gc.collect()
        if not self._reuses_freed:
            ctypes.CDLL(None).malloc_trim(0)
        self._start_bytes = anonymous_bytes()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._take()

    def _take(self) -> None:
        self.peak_bytes = max(self.peak_bytes, anonymous_bytes() - self._start_bytes)

    def _sample(self) -> None:
        while not self._ended.wait(self._interval_seconds):
            self._take()


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not report RssAnon")
