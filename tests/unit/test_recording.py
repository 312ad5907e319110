"""What the recording of a pass finds."""

import pytest
import torch
from replay import NotReplayable, Recording


def test_calls_are_made_again_on_the_same_memory() -> None:
    x, table = torch.arange(4.0), torch.zeros(2, 4)

    recording = Recording([x, table])
    with recording.records():
        y = x.view(2, 2) * 2
        table[1].copy_(y.flatten())
        y += 1
        result = y.sum(1)
    assert result.tolist() == [4, 12]
    x.fill_(3)
    recording.replay()
    assert result.tolist() == [14, 14]
    assert table.tolist() == [[0] * 4, [6] * 4]


@pytest.mark.parametrize(
    "run",
    [
        lambda x: x * float(x.sum()),
        lambda x: x * x.sum().item(),
        lambda x: x if x.sum() else -x,
        lambda x: x[: int(x[1])],
        lambda x: x.tolist(),
        lambda x: x.numpy() * 2,
        lambda x: x[x > 1],
        lambda x: x.masked_select(x > 1),
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x.index_put_((x > 1,), x[0]),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x + torch.tensor([1.0]),
        lambda x: x + _ELSEWHERE,
    ],
)
def test_what_no_graph_can_hold_is_found(run) -> None:
    x = torch.arange(4.0)
    with pytest.raises(NotReplayable), Recording([x]).records():
        run(x)


_ELSEWHERE = torch.ones(4)


def test_a_frozen_number_gives_another_result() -> None:
    x, length = torch.arange(4.0), 2
    recording = Recording([x])
    with recording.records():
        result = x[:length].sum()
    length = 4
    recording.replay()
    assert result != x[:length].sum()


def test_what_one_pass_leaves_another_may_overwrite() -> None:
    x, kept = torch.arange(4.0), torch.zeros(1)
    recording = Recording([x, kept])
    with recording.records():
        result = x.sum()
        kept[0].copy_(result)
    recording.spoil()
    assert result.isnan()
    assert kept == 6
    assert x.sum() == 6
