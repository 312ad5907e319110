"""Attention of the training forward: all ways see the same, none but dense holds a mask of all pairs."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import golden_data
import pytest
import torch
import yaml
from test_training import tiny_content
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vllm_twotower.reference import TwoTowerModel
from vllm_twotower.reference.layers import dense_attention, dense_blocks
from vllm_twotower.training import attention, cli
from vllm_twotower.training.config import TrainConfig, TrainConfigError, parse_section

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

CASES = [
    pytest.param(2, 5, 16, 75, id="less than a tile"),
    pytest.param(1, 20, 16, 256, id="the shipped configuration"),
    pytest.param(2, 3, 130, 300, id="blocks wider than a tile"),
    pytest.param(1, 9, 128, 512, id="blocks of a tile"),
    pytest.param(2, 64, 16, 1000, id="many blocks"),
]


@pytest.fixture(autouse=True)
def _not_compiled(monkeypatch):
    """The same arithmetic without a compiler's half minute, with all scores in memory."""
    monkeypatch.setattr(attention, "_fused_attention", flex_attention)


def draw_starts(batch: int, blocks: int, length: int) -> Tensor:
    """Anywhere, in any order; the first at 0 and the last at the end."""
    starts = torch.randint(0, length + 1, (batch, blocks), generator=torch.Generator().manual_seed(0))
    starts[0, 0], starts[-1, -1] = 0, length
    return starts


def draw_inputs(batch: int, blocks: int, width: int, length: int) -> list[Tensor]:
    """Queries of 8 heads, keys and values of 2."""
    generator, rows = torch.Generator().manual_seed(1), blocks * width
    shapes = ((batch, rows, 8, 16), (batch, length + rows, 2, 16), (batch, length + rows, 2, 16))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize(("batch", "blocks", "width", "length"), CASES)
def test_flex_equals_dense(batch, blocks, width, length):
    starts, inputs = draw_starts(batch, blocks, length), draw_inputs(batch, blocks, width, length)
    expected = dense_blocks(starts, width, length)(*inputs)
    torch.testing.assert_close(attention.flex_blocks(starts, width, length)(*inputs), expected)


@pytest.mark.parametrize(("batch", "blocks", "width", "length"), CASES)
def test_tiles_are_those_of_the_mask_of_all_pairs(batch, blocks, width, length):
    """Where nothing is seen no work is done, and where all is seen no mask is looked at."""

    def tiles(count: Tensor, columns: Tensor) -> Tensor:
        is_listed = torch.arange(columns.shape[-1]) < count[..., None]
        return torch.zeros(columns.shape, dtype=torch.bool).scatter(-1, columns.long(), is_listed)

    mask = attention.tile_mask(draw_starts(batch, blocks, length), width, length)
    rows = blocks * width
    expected = create_block_mask(mask.mask_mod, batch, 1, rows, length + rows, device="cpu")
    (some, whole), (expected_some, expected_whole) = (
        (tiles(m.kv_num_blocks, m.kv_indices), tiles(m.full_kv_num_blocks, m.full_kv_indices)) for m in (mask, expected)
    )
    assert torch.equal(some | whole, expected_some | expected_whole)
    assert not (whole & ~expected_whole).any()
    assert not (some & whole).any()


def test_the_model_with_flex_equals_the_model_with_dense():
    model, generator = TwoTowerModel.from_pretrained(golden_data.checkpoint("A")), torch.Generator().manual_seed(2)
    tokens = torch.randint(4, 320, (2, 75), generator=generator)
    canvas = torch.randint(3, 320, (2, 5, 16), generator=generator)
    arguments = tokens, draw_starts(2, 5, 75), canvas, torch.rand(2, 5, generator=generator)
    with torch.inference_mode():
        logits = model.denoise_blocks(*arguments, attention=attention.flex_blocks)
        torch.testing.assert_close(logits, model.denoise_blocks(*arguments), atol=1e-4, rtol=1e-4)


@dataclass
class BlockDiagonalMask:
    """xFormers' mask, as one of all pairs."""

    pairs: Tensor

    @classmethod
    def from_seqlens(cls, queries: list[int], keys: list[int], device: torch.device) -> BlockDiagonalMask:
        return cls(torch.block_diag(*(torch.ones(size) for size in zip(queries, keys, strict=True))).bool())


def attend_to(query: Tensor, key: Tensor, value: Tensor, mask: BlockDiagonalMask | None = None) -> tuple[Tensor, ...]:
    """xFormers' attention to a part of the keys: not computed before it is merged."""
    pairs = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool) if mask is None else mask.pairs
    return query, key, value, pairs


def merge(*parts: tuple[Tensor, ...]) -> Tensor:
    _, keys, values, pairs = zip(*parts, strict=True)
    return dense_attention(parts[0][0], torch.cat(keys, 1), torch.cat(values, 1), torch.cat(pairs, 1)[None])


@pytest.mark.parametrize(("batch", "blocks", "width", "length"), CASES)
def test_xformers_is_asked_for_what_dense_sees(monkeypatch, batch, blocks, width, length):
    """Values and gradients, with torch in the place of its kernels."""
    modules: dict[str, dict[str, Any]] = {
        "xformers.ops.fmha.attn_bias": {"BlockDiagonalMask": BlockDiagonalMask},
        "xformers.ops.fmha.merge_training": {
            "memory_efficient_attention_partial_autograd": attend_to,
            "merge_attentions_autograd": merge,
        },
    }
    for name in ("xformers", "xformers.ops", "xformers.ops.fmha", *modules):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[name]).update(modules.get(name, {}))
    starts = draw_starts(batch, blocks, length)
    inputs = [x.requires_grad_() for x in draw_inputs(batch, blocks, width, length)]
    results = []
    for way in (attention.xformers_blocks, dense_blocks):
        output = way(starts, width, length)(*inputs)
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


class Allocated(TorchDispatchMode):
    """The bytes of all tensors that are made, as if none were freed."""

    def __init__(self):
        super().__init__()
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self._storages[storage._cdata] = storage
        return result

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())


def test_memory_of_the_masks():
    """One sequence of 4,096 and of 8,192 tokens, as many of them in blocks of 16, heads as in the shipped model."""
    width, needed = 16, {}
    for length in (4096, 8192):
        starts = torch.arange(0, length, width)[None]
        with Allocated() as of_flex:
            mask = attention.tile_mask(starts, width, length)
        held = sum(x.nbytes for x in mask.as_tuple() if isinstance(x, Tensor))
        # What a kernel reads and writes, in bf16: 8 heads of queries and outputs, 2 of keys and values, 32 wide.
        inputs = 2 * 32 * (length * 8 * 2 + 2 * length * 2 * 2)
        needed[length] = of_flex.bytes + inputs
        of_pairs = dense_blocks(starts.to("meta"), width, length).keywords["mask"].nbytes
        print(f"{length:,} tokens: mask of dense {of_pairs:,} bytes, of flex {held:,}, while made {of_flex.bytes:,}")
        assert of_pairs == length * 2 * length
        assert of_flex.bytes < of_pairs / 100
    assert needed[8192] < 2.2 * needed[4096]


def peak(run: Callable[[], Any]) -> int:
    """How far the process's memory rises, in bytes."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

    ctypes.CDLL(None).malloc_trim(0)  # else freed memory is taken again, unseen
    Path("/proc/self/clear_refs").write_text("5")  # the highest is from here on
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's account of memory")
def test_peak_memory_of_the_compiled_kernel(monkeypatch):
    """On a CPU in fp32, without gradients; values, too."""
    monkeypatch.setattr(attention, "_fused_attention", torch.compile(flex_attention))
    peaks = {}
    for length in (2048, 4096, 8192):
        starts, inputs = draw_starts(1, length // 16, length), draw_inputs(1, length // 16, 16, length)
        outputs = [way(starts, 16, length)(*inputs) for way in (attention.flex_blocks, dense_blocks)]
        torch.testing.assert_close(*outputs)
        peaks[length] = [
            peak(lambda way=way, of_length=(starts, 16, length), inputs=inputs: way(*of_length)(*inputs))
            for way in (attention.flex_blocks, dense_blocks)
        ]
        print(f"{length:,} tokens: flex {peaks[length][0] / 2**20:.0f} MiB, dense {peaks[length][1] / 2**20:.0f} MiB")
    assert peaks[8192][0] < 3 * peaks[4096][0]
    assert peaks[8192][0] < peaks[8192][1] / 10


def test_the_context_tower_holds_no_mask(monkeypatch):
    model = TwoTowerModel.from_pretrained(golden_data.checkpoint("A"))
    masks = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def noted(*args, attn_mask=None, is_causal=False):
        masks.append((attn_mask, is_causal))
        return attend(*args, attn_mask=attn_mask, is_causal=is_causal)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    model.context_logits(torch.arange(4, 44)[None])
    assert masks == [(None, True)] * model.config.pattern.count("*")


@pytest.mark.parametrize(
    ("changes", "device", "message"),
    [
        ({"attention": "flash"}, "cuda", "attention is 'flash': it must be one of dense, flex, xformers"),
        ({"attention": "flex"}, "cpu", "attention is 'flex', .* it must be 'dense'"),
        ({"attention": "xformers"}, "cpu", "attention is 'xformers', .* it must be 'dense'"),
        ({"attention": "xformers"}, "cuda", r"attention is 'xformers', .* pip install 'vllm-twotower\[train-gpu\]'"),
    ],
)
def test_what_cannot_be_is_named(tmp_path, monkeypatch, changes, device, message):
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    with pytest.raises(TrainConfigError, match=message):
        attention.block_attention(
            parse_section(TrainConfig, tiny_content(tmp_path) | changes, ""), torch.device(device)
        )


def test_xformers_does_not_train_in_fp32(tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "find_spec", lambda name: object())
    for in_bf16 in (False, True):
        changes = {"attention": "xformers", "bf16_autocast": in_bf16}
        config = parse_section(TrainConfig, tiny_content(tmp_path) | changes, "")
        if in_bf16:
            assert attention.block_attention(config, torch.device("cuda")) is attention.xformers_blocks
        else:
            with pytest.raises(TrainConfigError, match="needs bf16_autocast: true .* it must be 'flex' or 'dense'"):
                attention.block_attention(config, torch.device("cuda"))


def test_the_device_decides_by_default(tmp_path):
    config = parse_section(TrainConfig, tiny_content(tmp_path), "")
    assert attention.block_attention(config, torch.device("cpu")) is dense_blocks
    assert attention.block_attention(config, torch.device("cuda", 1)) is attention.flex_blocks


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_the_command_refuses_before_it_trains(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(tiny_content(tmp_path) | {"attention": "flex"}))
    with pytest.raises(SystemExit, match="train.yaml: attention is 'flex', .* it must be 'dense'"):
        cli.run_here(path, None)
    assert not (tmp_path / "run").exists()
