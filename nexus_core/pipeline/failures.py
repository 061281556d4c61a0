"""What ends a stage, as a sentence for the person at the keyboard."""

from __future__ import annotations

from nexus_core.errors import StageError, is_out_of_memory
from nexus_core.processes import lost_contact
from nexus_core.stages.stage import Stage


class Interrupted(StageError):
    """The person at the keyboard, or the machine, asked the run to stop."""

    exit_code = 130


def explained(error: BaseException, stage: Stage, device: str) -> BaseException:
    """An interruption or lack of memory as an error that names the stage and the way out, one that follows from
    another process's as that one's; any other as it is.
    """
    name = stage.name
    if isinstance(error, KeyboardInterrupt):
        goes_on = f"{name} goes on where it stopped" if stage.resumes else f"{name} starts again"
        return Interrupted(
            f"interrupted in {name}; finished stages are kept, type the same command again and {goes_on}"
        )
    if is_out_of_memory(error):
        recomputes = ", or set train.gradient_checkpointing: true" if name == "train" else ""
        return StageError(f"{name}: out of memory on {device}; lower its batch_size or sequence_length{recomputes}")
    # Training's collectives are its library's.
    return lost_contact(error) or error
