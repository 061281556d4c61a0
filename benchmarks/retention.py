"""How hard to hold what is to be kept: weight and direction of the KL, and the share of kept text, with three seeds.

    python -m benchmarks.retention --out DIR

The trainings are those of `benchmarks.starts` for the start that its recipes use; killed, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.starts.conversions import Conversions
from benchmarks.starts.plan import FROM_SELECTED, SEEDS
from benchmarks.starts.setting import KEPT, UNSEEN, Setting, Sizes
from benchmarks.starts.subjects import Retention, Training
from benchmarks.starts.training import train

FILE_NAME = "retention.jsonl"

# The best of the grid that starts were screened with.
LEARNING_RATE = 1e-2

RETENTIONS = (
    *(Retention(weight=weight) for weight in (0.0, 1.0, 4.0, 16.0)),
    *(Retention(kept_share=share) for share in (0.1, 0.5)),
    # As much of the loss as 4 on a quarter.
    Retention(weight=10.0, kept_share=0.1),
    Retention(weight=2.0, kept_share=0.5),
    *(Retention(direction=direction) for direction in ("reverse", "jensen_shannon")),
)


@dataclass(frozen=True)
class Outcome:
    """What one training came to, nats per token of held-out text."""

    retention: Retention
    seed: int
    gain: float
    forgot_kept: float
    forgot_unseen: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("retention"), help="where the results go")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    done = read(arguments.out)
    with tempfile.TemporaryDirectory() as scratch, (arguments.out / FILE_NAME).open("a") as file:
        for outcome in run(done, Path(scratch), Sizes()):
            done[outcome.retention, outcome.seed] = outcome
            print(json.dumps(asdict(outcome)), file=file, flush=True)
            print(f"{len(done):3} {outcome}", file=sys.stderr)
    print("\n".join(table(done)))


def run(done: Mapping[tuple[Retention, int], Outcome], scratch: Path, sizes: Sizes) -> Iterator[Outcome]:
    """Every training that is not in `done`, as soon as it has ended."""
    conversions = Conversions(Setting(scratch, sizes))
    for retention in RETENTIONS:
        setting = Setting(scratch, sizes, retention)
        for seed in SEEDS:
            if (retention, seed) not in done:
                result = train(Training(FROM_SELECTED, LEARNING_RATE, seed=seed), setting, conversions)
                yield Outcome(retention, seed, result.gain, result.forgotten(KEPT), result.forgotten(UNSEEN))


def read(folder: Path) -> dict[tuple[Retention, int], Outcome]:
    """What was finished before; a last line that was cut off is left out, and cut off."""
    path = folder / FILE_NAME
    done = {}
    whole = ""
    for line in path.read_text().splitlines(keepends=True) if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        whole += line
        outcome = Outcome(**record | {"retention": Retention(**record["retention"])})
        done[outcome.retention, outcome.seed] = outcome
    if path.is_file():
        path.write_text(whole)
    return done


def table(done: Mapping[tuple[Retention, int], Outcome]) -> list[str]:
    """Markdown: mean and standard deviation over the seeds, a row per setting."""
    lines = [
        "| `logits_kl` | kept text | direction | gain | forgotten: prose (kept) | code (unseen) | gain by forgotten |",
        "|---|---|---|---|---|---|---|",
    ]
    for retention in RETENTIONS:
        found = [done[retention, seed] for seed in SEEDS if (retention, seed) in done]
        if len(found) < 2:
            continue
        columns = [[each.gain for each in found], [each.forgot_kept for each in found]]
        columns.append([each.forgot_unseen for each in found])
        cells = [f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" for values in columns]
        gain, kept, unseen = map(statistics.mean, columns)
        ratio = f"{gain / ((kept + unseen) / 2):.0f}" if kept + unseen > 0 else ""
        what = f"| {retention.weight:g} | {retention.kept_share:.0%} | {retention.direction.replace('_', '-')} "
        lines.append(f"{what}| {' | '.join(cells)} | {ratio} |")
    return lines


if __name__ == "__main__":
    main()
