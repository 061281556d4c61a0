"""A plugin of pytest: `pytest --nexus-contract CHECKPOINT` checks what a family promises, one test per promise.

Comes with NEXUS by the entry-point group `pytest11`, so it is in every pytest run of every environment that has NEXUS:
without the option it does nothing and imports nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

OPTION = "--nexus-contract"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nexus", "NEXUS")
    group.addoption(
        OPTION,
        action="append",
        default=[],
        metavar="CHECKPOINT",
        help="Check the family contract of NEXUS on this model folder (or embedded:NAME) instead of running the tests "
        "of this directory; name tests as well to run both. May be given again.",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Tests that nobody named stay out; those named on the command line run too.
    if config.getoption(OPTION) and config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = []


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    for checkpoint in config.getoption(OPTION):
        name = f"nexus-contract[{checkpoint}]"
        contract = Contract.from_parent(session, name=name, nodeid=name, checkpoint=checkpoint)
        promises: list[pytest.Item | pytest.Collector] = [*contract.collect()]
        items.extend(promise for promise in promises if isinstance(promise, Promise))
        # Told to whoever counts, as pytest does for what it collects itself.
        config.hook.pytest_collectreport(report=pytest.CollectReport(name, "passed", None, promises))


class Contract(pytest.Collector):
    """The promises of the family that owns one checkpoint."""

    def __init__(self, checkpoint: str, **keywords: Any):
        super().__init__(**keywords)
        self.checkpoint = checkpoint

    def collect(self) -> Iterable[Promise]:
        from nexus_core.contract import CHECKS

        for name in CHECKS:
            yield Promise.from_parent(self, name=name, checkpoint=self.checkpoint)


class Promise(pytest.Item):
    """One promise, in a folder of its own."""

    def __init__(self, checkpoint: str, **keywords: Any):
        super().__init__(**keywords)
        self.checkpoint = checkpoint

    def runtest(self) -> None:
        from nexus_core.checkpoint.source import locate
        from nexus_core.contract import CHECKS, Subject

        with TemporaryDirectory(prefix="nexus-contract-") as work:
            CHECKS[self.name](Subject(locate(self.checkpoint), Path(work)))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], *arguments: Any, **keywords: Any) -> Any:
        """A sentence for what NEXUS has a sentence for, and what was promised; a traceback for anything else."""
        from nexus_core.errors import NexusError

        if not isinstance(excinfo.value, NexusError):
            return super().repr_failure(excinfo, *arguments, **keywords)
        return "\n".join(["promised: " + self.promise, "   found: " + str(excinfo.value), *_causes(excinfo.value)])

    @property
    def promise(self) -> str:
        """The first line of what the check says about itself."""
        from nexus_core.contract import CHECKS

        return (CHECKS[self.name].__doc__ or self.name).strip().partition("\n")[0]

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.config.rootpath, None, f"{self.name}: {self.checkpoint}"


def _causes(error: BaseException) -> Iterator[str]:
    """Where a plugin's own mistake happened."""
    cause = error.__cause__
    while cause is not None:
        traceback = cause.__traceback__
        while traceback is not None and traceback.tb_next is not None:
            traceback = traceback.tb_next
        if traceback is not None:
            place = f"{traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}"
            yield f"      at: {place}: {type(cause).__name__}: {cause}"
        cause = cause.__cause__
