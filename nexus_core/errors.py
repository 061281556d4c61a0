"""What can go wrong, said in one sentence each: the thing, the value, where it came from, the way out.

Every error that a user can cause derives from NexusError. The command line prints its text and exits with its
`exit_code`: 2 when what was given is unusable (recipe, flag, checkpoint, data, plugin), 1 when work failed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches


class NexusError(Exception):
    """An error whose text is written for the person at the keyboard; no traceback unless asked for."""

    exit_code = 1


class UsageError(NexusError):
    """A command, flag or argument that cannot be carried out as given."""

    exit_code = 2


class CheckpointError(UsageError):
    """A model folder that is missing, incomplete, truncated or of no known family."""


class DataError(UsageError):
    """A data source that is missing, unreadable, empty or of another shape than stated."""


class PluginError(UsageError):
    """A plugin that cannot be imported, misspells a hook or claims what another plugin claims."""


class SelectionError(UsageError):
    """A selection that does not fit the model or the statistics it is used with."""


class ShapeError(NexusError):
    """A tensor of another shape, type or normalisation than the function documents."""


class StageError(NexusError):
    """A stage that could not finish."""


class TrainingError(StageError):
    """A training run that had to stop; the last good checkpoint is kept."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a recipe.

    location: `file:line:column` where known, else the file or flag it came from. key: dotted, e.g. `train.max_steps`.
    """

    location: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.location}: {self.key}: {self.message}" if self.key else f"{self.location}: {self.message}"


class RecipeError(UsageError):
    """Everything that is wrong with a recipe, all of it at once, one line a problem."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def suggestion(given: str, known: Iterable[str]) -> str:
    """`; did you mean 'pca'?` for a near miss, else a list of what is known, else nothing."""
    names = sorted(set(known))
    close = get_close_matches(given, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(names)}" if names else ""


# As torch has it for a CPU, the driver, cuBLAS and Triton.
_NO_MEMORY = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the machine or of a GPU."""
    # torch has a class of its own only for what it allocates on a GPU itself; all others are RuntimeErrors.
    is_torch = type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in _NO_MEMORY)
    return is_torch or isinstance(error, MemoryError)
