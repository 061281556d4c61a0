"""Which implementation does a part of the work: the first of a list that works on the device, unless one is forced.

The parts are `decode`, `experts` and `attention`. An environment variable per part, such as NEXUS_GPT_OSS_DECODE=torch,
forces one by name; a name that is not known, or that does not work on this machine, is then an error. What was chosen,
and why what stands before it in the list was not, is remembered: `in_use()` tells.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from nexus_core.errors import UsageError, is_out_of_memory

PARTS = ("decode", "experts", "attention")

Implementation = TypeVar("Implementation")


class Unavailable(Exception):
    """An implementation cannot be used here; says why."""


@dataclass(frozen=True)
class Choice:
    """What was chosen for a part. passed_over: why each implementation that was tried first is not the one."""

    part: str
    where: str
    name: str
    is_forced: bool
    passed_over: Mapping[str, str]

    def __str__(self) -> str:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.passed_over.items())
        notes = [f"by {variable(self.part)}"] * self.is_forced + [f"not {reasons}"] * bool(reasons)
        return self.name + (f" ({', '.join(notes)})" if notes else "")


_chosen: dict[tuple[str, Hashable], tuple[Any, Choice]] = {}


def variable(part: str) -> str:
    """The environment variable that forces an implementation of a part."""
    return f"NEXUS_GPT_OSS_{part.upper()}"


def forced(part: str, names: tuple[str, ...]) -> str | None:
    """The name that the environment forces, or None. Raises UsageError if it is not one of names."""
    name = os.environ.get(variable(part))
    if not name:
        return None
    if name not in names:
        raise UsageError(f"{variable(part)}={name}: not one of {', '.join(names)}; correct it or unset it")
    return name


def choose(
    part: str,
    key: Hashable,
    where: str,
    candidates: Mapping[str, Callable[[], Implementation]],
    *,
    is_forced: bool = False,
    seconds: Callable[[Implementation], float] | None = None,
) -> Implementation:
    """The first candidate that can be made, or of all that can the fastest; chosen once for a key.

    candidates: by name, best first, functions that make and check one, and raise Unavailable, or whatever goes wrong,
    if it cannot be used. where: what the choice holds for, such as "cpu". is_forced: candidates are what the
    environment left. seconds: times one. Raises UsageError if none can be made, that memory ran out if it did, and what
    a candidate says of how it was asked for.
    """
    remembered = _chosen.get((part, key))
    if remembered is not None:
        made: Implementation = remembered[0]
        return made
    passed_over: dict[str, str] = {}
    working: dict[str, tuple[float, Implementation]] = {}
    out_of_memory: Exception | None = None
    for name, make in candidates.items():
        try:
            with _own_gradients():
                found = make()
                working[name] = (seconds(found) if seconds and len(candidates) > 1 else 0.0, found)
        except UsageError:
            raise
        except Exception as error:
            # A compiler that is missing or too old shows as any exception; the next candidate then does the work.
            passed_over[name] = _reason(error)
            if is_out_of_memory(error):
                # Without the frames, whose tensors the next candidate would find still held.
                out_of_memory = error.with_traceback(None)
            continue
        if seconds is None:
            break
    if not working and out_of_memory:
        raise out_of_memory
    if not working:
        tried = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
        way_out = f"; unset {variable(part)}" if is_forced else ""
        raise UsageError(f"no way to do {part} on {where}: {tried}{way_out}")
    name = min(working, key=lambda candidate: working[candidate][0])
    passed_over |= {
        other: f"{1000 * spent:.2f} ms, not {1000 * working[name][0]:.2f}"
        for other, (spent, _) in working.items()
        if other != name
    }
    _chosen[part, key] = working[name][1], Choice(part, where, name, is_forced, passed_over)
    return working[name][1]


def in_use() -> dict[str, str]:
    """What has been chosen in this process so far, e.g. {"decode on cpu": "numba"}; nothing that was never needed."""
    told: dict[str, list[str]] = {}
    for _, choice in _chosen.values():
        names = told.setdefault(f"{choice.part} on {choice.where}", [])
        if str(choice) not in names:
            names.append(str(choice))
    return {place: ", ".join(names) for place, names in sorted(told.items())}


def forget() -> None:
    """Choose anew next time."""
    _chosen.clear()


@contextmanager
def _own_gradients() -> Iterator[None]:
    """For gradients that begin and end here, whatever becomes of the tensors of the pass that is under way.

    Checkpointing, which this may be inside of, drops what is saved for the way back, and would run the pass again as
    soon as the first of these gradients is asked for.
    """
    from torch.autograd.graph import saved_tensors_hooks

    # Of several hooks only the last counts: one that keeps what it is given.
    with saved_tensors_hooks(_itself, _itself):
        yield


def _itself(tensor: Any) -> Any:
    return tensor


def _reason(error: Exception) -> str:
    lines = str(error).strip().split("\n")
    # torch.compile says who raised on one line, and what on the next.
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text[:200] if isinstance(error, Unavailable) else f"{type(error).__name__}: {text[:200]}"
