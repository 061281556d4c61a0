"""Tensors by name that exist only while somebody holds them: a checkpoint is written from them one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch


class OnDemand(Mapping[str, torch.Tensor]):
    """Calls what makes a tensor each time that it is asked for."""

    def __init__(self, makers: Mapping[str, Callable[[], torch.Tensor]]):
        self._makers = dict(makers)

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> OnDemand:
        """Tensors of a mapping, which may itself make them on demand."""
        return cls({name: lambda name=name: tensors[name] for name in tensors})  # type: ignore[misc]

    def __or__(self, others: Mapping[str, torch.Tensor]) -> OnDemand:
        return OnDemand(self._makers | OnDemand.of(others)._makers)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)
