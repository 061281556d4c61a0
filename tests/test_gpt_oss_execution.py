"""How an implementation of a part is chosen, and what is told of those that are not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from nexus_gpt_oss import execution
from packed_layers import packed_experts, routed_inputs
from torch.utils.checkpoint import checkpoint

from nexus_core.errors import UsageError


@pytest.fixture(autouse=True)
def _choices() -> Iterator[None]:
    execution.forget()
    yield
    execution.forget()


def test_the_fastest_that_works_is_chosen() -> None:
    def broken() -> str:
        raise RuntimeError("no compiler\nat all")

    candidates = {"broken": broken, "slow": lambda: "slow", "quick": lambda: "quick"}
    seconds = {"slow": 0.002, "quick": 0.001}
    assert execution.choose("experts", 1, "here", candidates, seconds=lambda name: seconds[name]) == "quick"
    assert execution.in_use() == {
        "experts on here": "quick (not broken: RuntimeError: no compiler; slow: 2.00 ms, not 1.00)"
    }


def test_a_choice_ends_at_what_only_the_user_can_mend() -> None:
    def no_memory() -> str:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    def misuse() -> str:
        raise UsageError("NEXUS_GPT_OSS_DECODED_MB=0: not a positive number")

    def uncompiled() -> str:
        raise RuntimeError("backend='inductor' raised:\nRuntimeError: Failed to find C compiler\n\nSet CC")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        execution.choose("experts", 1, "here", {"a": no_memory, "b": uncompiled})
    with pytest.raises(UsageError, match="DECODED_MB"):
        execution.choose("experts", 1, "here", {"a": misuse, "b": lambda: "b"})
    assert execution.choose("experts", 1, "here", {"a": no_memory, "b": uncompiled, "c": lambda: "c"}) == "c"
    assert execution.in_use()["experts on here"] == (
        "c (not a: OutOfMemoryError: CUDA out of memory; "
        "b: RuntimeError: backend='inductor' raised: RuntimeError: Failed to find C compiler)"
    )


def test_a_backend_can_be_chosen_inside_of_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    # As where training goes on with a stored teacher: no pass without gradients comes first.
    monkeypatch.setenv("NEXUS_GPT_OSS_EXPERTS", "grouped")
    packed = packed_experts()
    hidden_TD, indices_TK, weights_TK = routed_inputs(packed, 20, 2, torch.float32)
    found = checkpoint(packed, hidden_TD, indices_TK, weights_TK, use_reentrant=False)
    gradients = torch.autograd.grad(found.sum(), (hidden_TD, weights_TK))
    expected = torch.autograd.grad(packed(hidden_TD, indices_TK, weights_TK).sum(), (hidden_TD, weights_TK))
    assert all(torch.equal(*pair) for pair in zip(gradients, expected, strict=True))
    assert execution.in_use() == {"experts on cpu": "grouped (by NEXUS_GPT_OSS_EXPERTS)"}
