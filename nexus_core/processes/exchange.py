"""How processes meet, wait for each other, and exchange values and sums."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from nexus_core.processes.failure import OtherProcessFailed, first_words, lost_contact
from nexus_core.processes.world import LISTENING, World, is_joined, world
from nexus_core.progress import silence

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# The first process may spend days on what cannot be split while the others wait.
WAIT = timedelta(days=7)
START_WAIT = timedelta(minutes=10)


def join() -> World:
    """Meet the other processes, once; nothing if alone. Raises OtherProcessFailed if they do not come."""
    here = world()
    if here.alone or is_joined():
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
            f"{os.environ.get('MASTER_PORT')} ({first_words(error)}); see whether all machines reach that address"
        ) from error
    return here


def leave() -> None:
    """Part from the other processes, when all are done; nothing if alone."""
    if is_joined():
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
