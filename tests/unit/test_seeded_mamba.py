"""The Mamba kernels of canvases and drafts against a token-by-token recurrence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vllm_twotower.kernels import commit_states, seeded_conv, seeded_scan

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("positions", "groups"), [(1, 1), (8, 1), (16, 2), (16, 8)])
def test_scan_equals_the_recurrence(device: str, positions: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(positions + groups)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    rows, heads, channels, state_size = 5, 8, 4, 6
    x, seed = rand(rows, positions, heads, channels), rand(rows, heads, channels, state_size)
    b, c = rand(rows, positions, groups, state_size), rand(rows, positions, groups, state_size)
    raw, bias, a, d = rand(rows, positions, heads), rand(heads), -rand(heads).exp(), rand(heads)
    indices = torch.arange(rows, device=device)
    y = torch.empty_like(x)
    seeded_scan(x, raw, bias, a, b, c, d, seed, indices, y)

    xbc, before = rand(rows, positions, 7), rand(rows, 3, 7)

    def committed(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The states after so many positions."""
        states, counts = (before.clone(), seed.clone()), torch.full((rows,), count, device=device)
        commit_states(xbc, x, raw, bias, a, b, counts, *states, indices)
        return states

    state, dt = seed.clone(), F.softplus(raw + bias)
    for i in range(positions):
        b_i, c_i = (part[:, i].repeat_interleave(heads // groups, 1) for part in (b, c))
        decay = (dt[:, i] * a).exp()[..., None, None]
        state = decay * state + torch.einsum("rn,rnp,rns->rnps", dt[:, i], x[:, i], b_i)
        expected = torch.einsum("rnps,rns->rnp", state, c_i) + d[:, None] * x[:, i]
        torch.testing.assert_close(y[:, i], expected, atol=1e-4, rtol=1e-4)
        conv, advanced = committed(i + 1)
        torch.testing.assert_close(advanced, state, atol=1e-4, rtol=1e-4)
        assert torch.equal(conv, torch.cat((before, xbc), 1)[:, i + 1 : i + 4])
    assert all(map(torch.equal, committed(0), (before, seed)))


@pytest.mark.parametrize("device", DEVICES)
def test_strong_decay_does_not_overflow(device: str) -> None:
    """Decays far beyond what exp can hold in one factor, as a long canvas of strongly forgetting heads has."""
    x = torch.ones(1, 16, 1, 1, device=device)
    dt, a = torch.full((1, 16, 1), 20.0, device=device), torch.tensor([-30.0], device=device)
    one = torch.ones(1, 16, 1, 1, device=device)
    first, state = torch.zeros(1, dtype=torch.int64, device=device), torch.full((1, 1, 1, 1), 1e3, device=device)
    nothing, y = torch.zeros(1, device=device), torch.empty_like(x)
    seeded_scan(x, dt, nothing, a, one, one, nothing, state, first, y)
    torch.testing.assert_close(y, torch.full_like(y, 20.0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [True, False])
def test_convolution_equals_torch(device: str, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, seed, weight, offset = (
        torch.randn(*shape, generator=generator).to(device) for shape in ((3, 16, 10), (3, 3, 10), (10, 4), (10,))
    )
    inputs = torch.cat((seed, x), 1)
    expected = F.silu(F.conv1d(inputs.transpose(1, 2), weight[:, None], offset if bias else None, groups=10)).transpose(
        1, 2
    )
    torch.testing.assert_close(
        seeded_conv(x, seed, torch.arange(3, device=device), weight, offset if bias else None),
        expected,
        atol=1e-5,
        rtol=1e-5,
    )
