"""Which trainings to run, in order; later ones depend on what earlier ones came to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from benchmarks.starts.setting import DOMAINS
from benchmarks.starts.subjects import GRIDS, Result, Subject, Training

Done = Mapping[str, Result]

# A screen has one seed, the repetitions have these as well.
SEEDS = (0, 1, 2)

MEAN = Subject()
PUBLISHED = Subject(start="full")
RANDOM = Subject(merge="random")
NEURONS = Subject(merge="neurons")
FROM_SELECTED = Subject(merge="neurons", parameters=(("pool", "selected"),))
RESCALED = Subject(rescaled=True)
CONTRASTED = Subject(merge="neurons", parameters=(("contrast", 1.0),))
BY_ACTIVATIONS = Subject(merge="aligned", parameters=(("match", "activations"),))
TOP1 = Subject(merge="top1")

MERGES = (
    MEAN,
    Subject(merge="weighted"),
    Subject(merge="aligned", parameters=(("match", "weights"),)),
    BY_ACTIVATIONS,
    TOP1,
    NEURONS,
    FROM_SELECTED,
    Subject(merge="neurons", parameters=(("contrast", 0.5),)),
    CONTRASTED,
    RANDOM,
)

# A full start of neurons answers every token at full volume, so a tenth stands for it.
STARTS = (
    PUBLISHED,
    replace(BY_ACTIVATIONS, start="full"),
    replace(TOP1, start="full"),
    replace(TOP1, start=0.25),
    replace(NEURONS, start=0.1),
    replace(NEURONS, trains_router=True),
)

OTHERS = (Subject("full"), Subject("lora"), Subject("lora_experts"), Subject("router"))

# With LoRA a baker's dozen; their spread tells which differences mean something.
REPEATED = (
    MEAN,
    replace(MEAN, selection="random"),
    PUBLISHED,
    BY_ACTIVATIONS,
    TOP1,
    NEURONS,
    FROM_SELECTED,
    replace(FROM_SELECTED, selection="random"),
    CONTRASTED,
    RANDOM,
    Subject("full"),
    Subject("router"),
)

SELECTIONS = ("frequency", "gate_mass", "saliency", "diverse", "kmeans", "random")
SELECTED_BY = (MEAN, BY_ACTIVATIONS, FROM_SELECTED)

# Other ways to select: tried with every merge above, with the mean, and with what the domain alone tells.
OTHERWISE_SELECTED = (
    *(replace(merge, selection=selection) for merge in SELECTED_BY for selection in SELECTIONS),
    *(replace(MEAN, top_k=top_k) for top_k in (4, 16)),
    *(
        replace(merge, selection=selection, statistics="domain")
        for merge in (MEAN, FROM_SELECTED)
        for selection in ("pca", "frequency")
    ),
)

# Whether a lead depends on the rate, and whether it lasts: with every seed at the lowest rate, and four times as long.
LEADS = (MEAN, NEURONS, RANDOM)
LOWER = tuple(Training(subject, GRIDS["shared"][0], seed=seed) for seed in SEEDS[1:] for subject in LEADS)
LONGER = tuple(Training(subject, rate, length=4) for subject in LEADS for rate in GRIDS["shared"][:2])


def plan(done: Done) -> Iterator[Training]:
    """Every training once, the finished ones included. done: results by key, filled by whoever runs what is yielded."""
    planned = set()
    for training in _phases(done):
        if training not in planned:
            planned.add(training)
            yield training


def _phases(done: Done) -> Iterator[Training]:
    screened = (*MERGES, *OTHERS, *STARTS)
    for subject in screened:
        yield from grid(subject)
    # At the rate that was best for the same merge of PCA's experts.
    chosen = [Training(subject, best(as_screened(subject), done).learning_rate) for subject in OTHERWISE_SELECTED]
    yield from chosen
    candidates = [best(subject, done) for subject in screened] + chosen
    repeated = worth_repeating(candidates, done)
    for seed in SEEDS[1:]:
        yield from (replace(training, seed=seed) for training in repeated)
    for seed in SEEDS:
        yield from (replace(training, seed=seed, domain=DOMAINS[1]) for training in repeated)
    yield from LOWER
    # Whether an average suffers from its size or from what it is an average of.
    yield from (Training(RESCALED, best(MEAN, done).learning_rate, seed=seed) for seed in SEEDS)
    yield from LONGER


def selected_like(merge: Subject, other: Subject) -> Subject:
    """A subject with its experts selected as another's are."""
    return replace(merge, selection=other.selection, top_k=other.top_k, statistics=other.statistics)


def as_screened(subject: Subject) -> Subject:
    """The same merge of the experts that merges were screened with: PCA's first 8."""
    return replace(selected_like(subject, MEAN), rescaled=False)


def grid(subject: Subject) -> list[Training]:
    """A subject at every rate of its grid."""
    return [Training(subject, rate) for rate in GRIDS[subject.kind]]


def best(subject: Subject, done: Done) -> Training:
    """A screened subject at the rate of the highest score."""
    return max(grid(subject), key=lambda training: done[training.key].score)


def worth_repeating(candidates: Sequence[Training], done: Done) -> list[Training]:
    """At their best rates every kind of merge, what they have to beat, and the better of the two ways to place LoRA.

    Fixed beforehand but for the last: picking the best of a screen with one seed would pick the luckiest too.
    """
    lora = max((t for t in candidates if t.subject.kind.startswith("lora")), key=lambda t: done[t.key].score)
    by_subject = {training.subject: training for training in candidates}
    return [by_subject[subject] for subject in (*REPEATED, lora.subject)]
