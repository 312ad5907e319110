"""What the recording of a pass finds."""

import pytest
import torch
from replay import NotReplayable, Recording


def test_calls_are_made_again_on_the_same_memory() -> None:
    x, table = torch.arange(4.0), torch.zeros(2, 4)

    def run() -> torch.Tensor:
        y = x.view(2, 2) * 2
        table[1].copy_(y.flatten())
        y += 1
        return y.sum(1)

    recording = Recording(run, [x, table])
    assert recording.result.tolist() == [4, 12]
    x.fill_(3)
    assert recording.replay().tolist() == [14, 14]
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
    with pytest.raises(NotReplayable):
        Recording(lambda: run(x), [x])


_ELSEWHERE = torch.ones(4)


def test_a_frozen_number_gives_another_result() -> None:
    x, length = torch.arange(4.0), 2
    recording = Recording(lambda: x[:length].sum(), [x])
    length = 4
    assert recording.replay() != x[:length].sum()
