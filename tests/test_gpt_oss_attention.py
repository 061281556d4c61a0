"""Attention over long sequences: equal to transformers' eager attention, never a matrix of S x S."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gpt_oss_checkpoints import write_tiny_checkpoint
from nexus_gpt_oss import attention, execution
from nexus_gpt_oss.attention import blocks, choice, flex
from nexus_gpt_oss.attention.visibility import PADDING, Visibility, documents
from nexus_gpt_oss.plugin import nexus_attach_shared_expert
from torch.utils._python_dispatch import TorchDispatchMode

from nexus_core.additions import additions
from nexus_core.errors import UsageError
from nexus_core.models import load

LENGTH = 300  # more than two windows of the tiny checkpoint
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(autouse=True)
def _choices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("NEXUS_GPT_OSS_ATTENTION", raising=False)
    execution.forget()
    yield
    execution.forget()


def dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    visibility: Visibility,
    scaling: float,
) -> torch.Tensor:
    """The definition: all scores, one more column for the sink, softmax, without the column."""
    length = query.shape[2]
    everything = slice(0, length)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(
        visibility.hidden(everything, everything, query.device)[:, None], -torch.inf
    )
    sink = sinks.view(1, -1, 1, 1).expand(len(query), -1, length, 1)
    return torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1] @ value


def inputs(dtype: torch.dtype, length: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()
        for shape in ((2, 8, length, 16), (2, 2, length, 16), (2, 2, length, 16), (8,))
    ]


def answers(attend: choice.Attend, tensors: list[torch.Tensor], visibility: Visibility) -> list[torch.Tensor]:
    """Output and gradients of queries, keys, values and sinks for a fixed random cotangent."""
    output = attend(*tensors, visibility, 0.25)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [output.detach(), *torch.autograd.grad(output, tensors, cotangent)]


def some_documents(kind: str) -> torch.Tensor | None:
    """Of 2 sequences of 64: three documents and one; the same with padding at the end and at the start."""
    if kind == "whole":
        return None
    positions = torch.stack((torch.cat([torch.arange(20), torch.arange(30), torch.arange(14)]), torch.arange(64)))
    mask = torch.ones(2, 64, dtype=torch.long)
    mask[0, 60:] = mask[1, :5] = 0
    found = documents(positions, mask if kind == "padded" else None)
    assert found is not None
    return found.to(DEVICE)


@pytest.mark.parametrize("at_once", [1 << 21, 1000])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("kind", ["whole", "packed", "padded"])
def test_blocks_equal_the_definition(
    kind: str, window: int | None, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(blocks.SCORES_AT_ONCE, DEVICE.type, at_once)
    visibility = Visibility(some_documents(kind), window)
    tensors = inputs(torch.float64)
    for mine, theirs in zip(
        answers(blocks.attend, tensors, visibility), answers(dense, tensors, visibility), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)


@pytest.fixture
def _flex_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU torch refuses flex_attention's gradients, for it can't compile them; not compiled, they are there."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)


@pytest.mark.usefixtures("_flex_gradients")
@pytest.mark.parametrize("attend", [blocks.attend, flex.attend])
@pytest.mark.parametrize("window", [None, 7])
def test_bfloat16_is_as_near_to_the_definition_as_its_rounding(attend: choice.Attend, window: int | None) -> None:
    visibility = Visibility(some_documents("packed"), window)
    tensors = inputs(torch.bfloat16)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    for mine, theirs in zip(answers(attend, tensors, visibility), answers(dense, wide, visibility), strict=True):
        assert (mine.double() - theirs).norm() / theirs.norm() < 1e-2


@pytest.mark.usefixtures("_flex_gradients")
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("kind", ["whole", "packed", "padded"])
def test_flex_equals_blocks(kind: str, window: int | None) -> None:
    visibility = Visibility(some_documents(kind), window)
    tensors = inputs(torch.float32)
    for mine, theirs in zip(
        answers(flex.attend, tensors, visibility), answers(blocks.attend, tensors, visibility), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5)


def test_a_block_reads_only_what_its_queries_can_see() -> None:
    query = torch.empty(1, 1, 8, 4096, 1)
    for queries, keys in blocks._blocks(query, Visibility(None, 128)):
        assert keys.start == max(0, queries.start - 127)
        assert keys.stop == queries.stop
    documents_BS = torch.arange(4096)[None] // 1000
    covered = 0
    for queries, keys in blocks._blocks(query, Visibility(documents_BS, None)):
        assert keys.start == queries.start // 1000 * 1000
        assert queries.start == covered
        covered = queries.stop
    assert covered == 4096


def test_documents_begin_where_positions_do_not_go_on() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 7, 8]])
    assert documents(positions, None).tolist() == [[0, 0, 0, 1, 1, 2, 2]]  # type: ignore[union-attr]
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 0]])
    assert documents(None, mask).tolist() == [[PADDING, 0, 0, 0, 0, 0, PADDING]]  # type: ignore[union-attr]
    assert documents(None, None) is None


def token_ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 128, shape, generator=torch.Generator().manual_seed(11))


def with_each(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> tuple[Any, Any]:
    """What work gives with eager attention, and with blocks."""
    found = []
    for name in ("eager", "blocks"):
        monkeypatch.setenv("NEXUS_GPT_OSS_ATTENTION", name)
        found.append(work())
    return found[0], found[1]


def test_a_model_gives_the_same_logits(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(base, dtype=torch.float32)
    ids = token_ids(2, LENGTH)
    packed = torch.cat([torch.arange(130), torch.arange(LENGTH - 130)]).expand(2, -1)
    padded = torch.ones_like(ids)
    padded[0, :40] = padded[1, 250:] = 0
    for arguments in ({}, {"position_ids": packed}, {"attention_mask": padded}):
        with torch.no_grad():
            eager, mine = with_each(monkeypatch, lambda a=arguments: model(ids, use_cache=False, **a).logits)
        real = padded.bool() if "attention_mask" in arguments else torch.ones_like(ids, dtype=torch.bool)
        assert (mine[real] - eager[real]).norm() / eager[real].norm() < 2e-6
    assert execution.in_use()["attention on cpu, long"] == "blocks (by NEXUS_GPT_OSS_ATTENTION)"


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_a_model_gets_the_same_gradients(
    base: Path, use_reentrant: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager, mine = with_each(monkeypatch, lambda: gradients(base, use_reentrant))
    assert eager.keys() == mine.keys()
    for name, gradient in eager.items():
        assert (mine[name] - gradient).norm() <= 1e-4 * gradient.norm()


def gradients(
    base: Path, use_reentrant: bool | None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Of a shared expert's parameters, for two documents in one sequence. use_reentrant: None for no checkpointing."""
    ids = token_ids(1, LENGTH).to(device)
    positions = torch.cat([torch.arange(170), torch.arange(LENGTH - 170)])[None].to(device)
    model = load(base, dtype=torch.float32).train()
    torch.manual_seed(0)
    nexus_attach_shared_expert(model, 16)
    model.requires_grad_(False)
    for addition in additions(model):
        addition.requires_grad_(True)
    if use_reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    model.to(device, dtype)(ids, labels=ids, position_ids=positions, use_cache=False).loss.backward()
    return {name: p.grad.cpu().float() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, None)])
def test_a_gpu_whose_first_pass_is_checkpointed_gets_the_gradients_of_a_cpu(
    base: Path, dtype: torch.dtype, tolerance: float | None
) -> None:
    found = gradients(base, use_reentrant=False, dtype=dtype, device="cuda")
    chosen = execution.in_use()
    assert (chosen["attention on cuda, long"], chosen["decode on cuda"]) == ("flex", "triton")
    for name, gradient in gradients(base, use_reentrant=None).items():
        assert found[name].isfinite().all()
        # In bfloat16 a token may go to another expert.
        assert tolerance is None or (found[name] - gradient).norm() <= tolerance * gradient.norm()


def test_generation_from_a_long_prompt_is_the_same(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(base, dtype=torch.float32)
    prompts = token_ids(2, LENGTH)
    mask = torch.ones_like(prompts)
    mask[0, :25] = 0
    for arguments in ({}, {"attention_mask": mask}):
        eager, mine = with_each(
            monkeypatch,
            lambda a=arguments: model.generate(prompts, max_new_tokens=5, do_sample=False, eos_token_id=None, **a),
        )
        assert torch.equal(eager, mine)


class LargestTensor(TorchDispatchMode):
    """Remembers the numbers of the largest tensor that any operation gave."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for found in result if isinstance(result, tuple | list) else (result,):
            if isinstance(found, torch.Tensor):
                self.numbers = max(self.numbers, found.numel())
        return result


def test_no_scores_of_all_pairs_are_ever_made(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    length = 1500
    model = load(base, dtype=torch.float32)
    model.requires_grad_(False)
    model.enable_input_require_grads()
    monkeypatch.setitem(blocks.SCORES_AT_ONCE, "cpu", 1 << 18)
    with LargestTensor() as largest:
        model.model(token_ids(1, length), use_cache=False).last_hidden_state.sum().backward()
    assert execution.in_use()["attention on cpu, long"] == "blocks"
    assert 0 < largest.numbers < length * length / 2
    monkeypatch.setenv("NEXUS_GPT_OSS_ATTENTION", "eager")
    with LargestTensor() as largest:
        model.model(token_ids(1, length), use_cache=False)
    assert largest.numbers >= 4 * length * length


def test_short_sequences_are_left_to_transformers(base: Path) -> None:
    with torch.no_grad():
        load(base, dtype=torch.float32)(token_ids(1, 50), use_cache=False)
    assert "attention on cpu, long" not in execution.in_use()
    assert not choice.avoids_scores(attention.LONGER_THAN["cpu"], torch.device("cpu"))
    assert choice.avoids_scores(attention.LONGER_THAN["cpu"] + 1, torch.device("cpu"))


def test_weights_are_there_for_whoever_asks(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUS_GPT_OSS_ATTENTION", "blocks")
    answer = load(base, dtype=torch.float32)(token_ids(1, 20), output_attentions=True)
    assert [weights.shape for weights in answer.attentions] == [(1, 4, 20, 20)] * 2


def test_an_unknown_attention_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUS_GPT_OSS_ATTENTION", "flash")
    with pytest.raises(UsageError, match="NEXUS_GPT_OSS_ATTENTION=flash: not one of eager, blocks, flex"):
        load(base)(token_ids(1, 20))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_flex_is_checked_in_the_mode_that_first_needs_it(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Collecting statistics runs in inference mode, and is the first to read long sequences. On a CPU flex itself has no
    # gradients.
    sizes = choice.Sizes(query_heads=4, key_heads=2, head_width=16, window=64)
    monkeypatch.setattr(flex, "attend", blocks.attend)
    with mode():
        assert choice.checked("flex", torch.device("cpu"), torch.float32, sizes) is blocks.attend
    monkeypatch.setattr(flex, "attend", lambda *given: 1.1 * blocks.attend(*given))
    with mode(), pytest.raises(execution.Unavailable, match=r"is off by 0\.1 from blocks"):
        choice.checked("flex", torch.device("cpu"), torch.float32, sizes)


@pytest.mark.usefixtures("_flex_gradients")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 64])
def test_flex_passes_its_check(window: int | None, dtype: torch.dtype) -> None:
    sizes = choice.Sizes(query_heads=4, key_heads=2, head_width=16, window=window)
    assert choice.checked("flex", DEVICE, dtype, sizes) is flex.attend


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 128])
def test_a_gpu_chooses_flex_and_reads_8k_tokens_alike(window: int | None) -> None:
    with torch.inference_mode():
        attend = choice.attention_for(torch.device("cuda"), torch.bfloat16, choice.Sizes(64, 8, 64, 128))
    assert execution.in_use()["attention on cuda, long"] == "flex"
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_()
        for shape in ((1, 64, 8192, 64), (1, 8, 8192, 64), (1, 8, 8192, 64), (64,))
    ]
    visibility = Visibility(torch.arange(8192, device="cuda")[None] // 3000, window)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = answers(attend, tensors, visibility)
    assert torch.cuda.max_memory_allocated() - before < 64 * 8192 * 8192  # half of one matrix of scores
    for mine, theirs in zip(found, answers(blocks.attend, tensors, visibility), strict=True):
        assert (mine.float() - theirs.float()).norm() / theirs.float().norm() < 1e-2
