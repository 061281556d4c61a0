"""Collecting by several processes: each routes its part of the batches into a folder of its own, the first adds up.

A part that is done says so in a file that is written last, so that of an interrupted try only what is missing is done
again, and a part that was under way goes on as a whole pass would.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from nexus_core.checkpoint.writer import write_json
from nexus_core.processes import barrier, together, world
from nexus_core.stages.merge_collected import REPORT_NAME, merge_collected
from nexus_core.stages.shards import WHOLE, Shard
from nexus_core.stages.stage import Metrics
from nexus_core.statistics import probabilities
from nexus_core.statistics.moments import RouterStatistics
from nexus_core.statistics.probabilities import ProbabilityWriter

FOLDER_NAME = "parts"
DONE_NAME = "part.json"


def in_parts(route: Callable[[Path, Shard], Metrics], batches: int, identity: str, out: Path) -> Metrics:
    """Have every process route its part of so many batches, and fill `out` as one pass over all of them would.

    route: fills a folder from one part and returns its numbers. identity: what the numbers depend on; a part that was
    done under another one is done again. Returns the numbers of all parts together, on every process.
    """
    here, count = world(), min(world().size, batches)
    if count == 1:
        return together(lambda: route(out, WHOLE))
    folders = [out / FOLDER_NAME / f"{number}-of-{count}" for number in range(1, count + 1)]
    if here.rank < count and _numbers(folders[here.rank], identity) is None:
        folder = folders[here.rank]
        folder.mkdir(parents=True, exist_ok=True)
        metrics = route(folder, Shard(here.rank + 1, count))
        write_json(folder / DONE_NAME, {"identity": identity, "metrics": metrics})
    barrier()
    return together(lambda: _add_up(folders, identity, out))


def forget_parts(out: Path) -> None:
    """Remove them: the work is done."""
    folder, going = out / FOLDER_NAME, out / f".{FOLDER_NAME}"
    if folder.is_dir():
        shutil.rmtree(going, ignore_errors=True)
        # At once, so that no part can lose a file and still say that it is done.
        folder.rename(going)
    shutil.rmtree(going, ignore_errors=True)


def _numbers(folder: Path, identity: str) -> Metrics | None:
    try:
        done = json.loads((folder / DONE_NAME).read_text())
    except (OSError, ValueError):
        return None
    return done["metrics"] if done["identity"] == identity else None


def _add_up(folders: Sequence[Path], identity: str, out: Path) -> Metrics:
    metrics = [numbers for folder in folders if (numbers := _numbers(folder, identity)) is not None]
    merged = merge_collected(folders, out)
    files = [file for folder in folders if (file := folder / probabilities.FILE_NAME).is_file()]
    if files:
        statistics, _ = RouterStatistics.load(out)
        tokens = sum(map(probabilities.stored_tokens, files))
        with ProbabilityWriter(out / probabilities.FILE_NAME, tokens, statistics.layers, statistics.experts) as writer:
            for file in files:
                writer.copy(file)
    report = json.loads((folders[0] / REPORT_NAME).read_text())
    write_json(out / REPORT_NAME, {**report, "tokens": merged["tokens"]})
    of_all = {name: merged[name] for name in metrics[0] if name in merged}
    added = {name: sum(float(each[name]) for each in metrics) for name in ("sequences", "tokens_per_second")}
    return {**metrics[0], **of_all, **added, "sequences": int(added["sequences"])}
