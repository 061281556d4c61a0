"""Several processes that do one piece of work together: every one of them runs the same code, each on its own part.

A launcher (`nexus run --processes N`, or torchrun) tells each process its rank in the environment. Small JSON values
and sums of tensors are exchanged; nothing is unpickled. Alone, every function does nothing and returns at once. torch
is imported only where there are several processes.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar, cast

from nexus_core.errors import NexusError, UsageError
from nexus_core.progress import silence

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# The first process may spend days on what cannot be split while the others wait.
WAIT = timedelta(days=7)
START_WAIT = timedelta(minutes=10)

# How long one that lost contact looks for the reason of it, and how long one that failed stays to give it.
REASON_SECONDS = 2.0

# Set by the launcher of `nexus_core.launch`: a socket that already listens, so that nobody else can take the port.
LISTENING = "NEXUS_LISTENING_DESCRIPTOR"

FAILURE_KEY, HEARD_KEY = "nexus/failure", "nexus/heard"


# Exit codes: of a process that another one left alone, and of one that was interrupted.
LOST_CONTACT, INTERRUPTED = 75, 130


class OtherProcessFailed(NexusError):
    """Another process had to stop, so this one stops too. The other one says why, this one is silent.

    exit_code: as of the process that failed; LOST_CONTACT if that is not known.
    """

    def __init__(self, sentence: str, exit_code: int = LOST_CONTACT):
        super().__init__(sentence)
        self.exit_code = exit_code


@dataclass(frozen=True)
class World:
    """This process among those that work together. local_rank: its number on this machine, and that of its GPU."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes, prints and tells observers."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1


def world() -> World:
    """This process's place, from the environment that a launcher sets. Raises UsageError if that makes no sense."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return World()
    given = {name: os.environ.get(name, "") for name in names}
    found = World(*(int(text) if text.isdecimal() else -1 for text in given.values()))
    if not 0 <= found.rank < found.size or found.local_rank < 0:
        said = ", ".join(f"{name}={text!r}" for name, text in given.items())
        raise UsageError(f"the environment says {said}, which is no place among processes; start them with torchrun")
    return found


def world_if_any() -> World:
    """As `world`, for those who report errors: where the environment makes no sense, a process that is alone."""
    try:
        return world()
    except UsageError:
        return World()


def join() -> World:
    """Meet the other processes, once; nothing if alone. Raises OtherProcessFailed if they do not come."""
    here = world()
    if here.alone or _is_joined():
        return here
    from torch import distributed
    from torch.cuda import is_available

    if not here.is_first:
        silence()
        logging.getLogger("nexus_core").setLevel(logging.ERROR)
    try:
        # Tensors go by where they are; JSON is on the CPU. NCCL connects when it is first used.
        backend = "cpu:gloo,cuda:nccl" if is_available() and distributed.is_nccl_available() else "gloo"
        distributed.init_process_group(backend, store=_store(here), rank=here.rank, world_size=here.size, timeout=WAIT)
    except (RuntimeError, ValueError) as error:
        raise OtherProcessFailed(
            f"process {here.rank} of {here.size} could not meet the others at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')} ({_first_words(error)}); see whether all machines reach that address"
        ) from error
    return here


def leave() -> None:
    """Part from the other processes, when all are done; nothing if alone."""
    if _is_joined():
        from torch import distributed

        barrier()
        distributed.destroy_process_group()


def barrier() -> None:
    """Wait until every process is here."""
    gather(None)


def sum_in_place(tensor: torch.Tensor) -> torch.Tensor:
    """Replace a tensor by its sum over all processes, and return it. Same shape and type everywhere."""
    if not world().alone:
        from torch import distributed

        with _contact():
            distributed.all_reduce(tensor)
    return tensor


def gather(value: Any) -> list[Any]:
    """Every process's value, by rank, on all processes. value: what JSON can hold; small."""
    here = world()
    if here.alone:
        return [value]
    import torch
    from torch import distributed

    ours = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    with _contact():
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(here.size)]
        distributed.all_gather(sizes, torch.tensor([len(ours)]))
        longest = int(max(sizes))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(ours)] = ours
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(here.size)]
        distributed.all_gather(texts, padded)
    return [json.loads(text[: int(size)].numpy().tobytes()) for text, size in zip(texts, sizes, strict=True)]


def broadcast(value: T) -> T:
    """The first process's value on all processes; the others' is ignored. value: what JSON can hold; small."""
    here = world()
    if here.alone:
        return value
    import torch
    from torch import distributed

    text = torch.frombuffer(bytearray(json.dumps(value if here.is_first else None).encode()), dtype=torch.uint8)
    size = torch.tensor([len(text)])
    with _contact():
        distributed.broadcast(size, 0)
        text = text if here.is_first else torch.zeros(int(size), dtype=torch.uint8)
        distributed.broadcast(text, 0)
    return value if here.is_first else cast(T, json.loads(text.numpy().tobytes()))


def together(action: Callable[[], T]) -> T:
    """The first process acts while the others wait; all get what came of it, which JSON must be able to hold.

    An error in it is raised as it is on the first process, and as OtherProcessFailed on the others.
    """
    here = world()
    if here.alone:
        return action()
    if here.is_first:
        try:
            result = action()
        except Exception as error:
            broadcast({"failed": str(error), "exit_code": getattr(error, "exit_code", 1)})
            raise
        broadcast({"result": result})
        return result
    told: Any = broadcast(None)
    if "failed" in told:
        raise OtherProcessFailed(told["failed"], told["exit_code"])
    return cast(T, told["result"])


def first_to_fail(error: BaseException, sentence: str, exit_code: int) -> bool:
    """Tell the other processes why this one stops; whether it is the one that should say so aloud.

    Called once, at the end of a process that failed: it does not meet the others again.
    """
    here = world_if_any()
    if here.alone:
        return True
    # Which process ended without a word is known to the launcher; torchrun shows it, with much else.
    is_silent = isinstance(error, OtherProcessFailed) and (exit_code != LOST_CONTACT or LISTENING in os.environ)
    # Every process is interrupted, and the first one knows in which stage.
    is_silent |= exit_code == INTERRUPTED and not here.is_first
    if not _is_joined():
        return not is_silent
    store = _default_store()
    try:
        claim = json.dumps({"rank": here.rank, "sentence": sentence, "exit_code": exit_code})
        is_ours = not is_silent and store.compare_set(FAILURE_KEY, "", claim).decode() == claim
        if not here.is_first:
            store.add(HEARD_KEY, 1)
        # Whoever waits for this process learns at once that it is gone, and looks for the reason in the store, which
        # ends with the first process. Closing can itself wait for one that is gone.
        closing = Thread(target=_close, daemon=True)
        closing.start()
        closing.join(REASON_SECONDS)
        if here.is_first:
            _wait_until_heard(store, here.size - 1)
    except (RuntimeError, ValueError):
        return not is_silent
    return is_ours


def _close() -> None:
    from torch import distributed

    with suppress(RuntimeError, ValueError):
        distributed.destroy_process_group()


def _wait_until_heard(store: Any, others: int) -> None:
    until = time.monotonic() + REASON_SECONDS
    while time.monotonic() < until and store.add(HEARD_KEY, 0) < others:
        time.sleep(0.05)


def lost_contact(error: BaseException) -> OtherProcessFailed | None:
    """What an error means if it is a library's that could not reach another process; None if it is another error."""
    if world().alone or not isinstance(error, RuntimeError) or not _is_joined():
        return None
    from torch import distributed

    if not (isinstance(error, distributed.DistError) or "gloo/transport" in str(error)):
        return None
    reason = _reason()
    if reason is None:
        return OtherProcessFailed(f"lost contact with another process ({_first_words(error)})")
    return OtherProcessFailed(reason["sentence"], reason["exit_code"])


@contextmanager
def _contact() -> Iterator[None]:
    """Turn a broken connection into OtherProcessFailed, with the reason that the process which failed gave."""
    join()
    try:
        yield
    except RuntimeError as error:
        failed = lost_contact(error)
        if failed is None:
            raise
        raise failed from error


def _reason() -> dict[str, Any] | None:
    """Why another process stopped, as it said; None if it did not."""
    until = time.monotonic() + REASON_SECONDS
    with suppress(RuntimeError, ValueError):
        store = _default_store()
        while time.monotonic() < until:
            if store.check([FAILURE_KEY]):
                found: dict[str, Any] = json.loads(store.get(FAILURE_KEY))
                return found
            time.sleep(0.05)
    return None


def _store(here: World) -> Any:
    """Where processes first find each other."""
    from torch import distributed

    listening = os.environ.get(LISTENING)
    if listening is None:
        store, _, _ = next(distributed.rendezvous("env://", here.rank, here.size, timeout=START_WAIT))
        return store
    return distributed.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        here.size,
        here.is_first,
        timeout=START_WAIT,
        master_listen_fd=int(listening) if here.is_first else None,
    )


def _default_store() -> Any:
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def _is_joined() -> bool:
    # What was never imported was never initialized; importing torch to ask would cost two seconds.
    if "torch.distributed" not in sys.modules:
        return False
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()


def _first_words(error: BaseException) -> str:
    # Gloo appends advice and good wishes.
    return str(error).strip().partition("\n")[0].partition(". ")[0]
