"""`vllm-twotower init` and `inspect` on a checkpoint that transformers saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nemotron_h
import pytest
import torch
from released_layout import AS_PUBLISHED
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from vllm_twotower import cli
from vllm_twotower.architecture import CheckpointError, TwoTowerConfig
from vllm_twotower.checkpoint import read_tensors
from vllm_twotower.conversion import make_two_tower
from vllm_twotower.reference import TwoTowerModel


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nemotron-h")
    nemotron_h.save(folder)
    return folder


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    (source / "tokenizer.json").write_text("{}")
    target = source.with_name("two-tower")
    cli.main(["init", str(source), str(target), "--mask-token-id", "5", "--canvas-length", "8"])
    return target


def test_both_towers_are_the_source(source: Path, converted: Path):
    model = TwoTowerModel.from_pretrained(converted)
    assert (model.config.pattern, model.config.mask_token_id, model.config.canvas_length) == (nemotron_h.PATTERN, 5, 8)
    assert (converted / "tokenizer.json").read_text() == "{}"
    state = model.state_dict()
    for name, tensor in state.items():
        if name.startswith("context_"):
            other = name.replace("context_tower", "denoiser_tower").replace("context_lm_head", "lm_head")
            assert torch.equal(tensor, state[other]), name
    tokens = torch.randint(6, 320, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = nemotron_h.nemotron_h()(tokens).logits
        torch.testing.assert_close(model.context_logits(tokens), expected, atol=2e-4, rtol=1e-3)
        # The denoiser on blocks of one token is the autoregressive model, whatever the time.
        starts = torch.tensor([[1, 20, 33], [39, 16, 2]])
        logits = model.denoise_blocks(tokens, starts, tokens.gather(1, starts).unsqueeze(-1), torch.rand(2, 3))
        rows = torch.arange(2)[:, None]
        torch.testing.assert_close(logits[:, :, 0], expected[rows, starts], atol=2e-4, rtol=1e-3)


def test_shards_follow_those_of_the_source(source: Path, converted: Path):
    sources, files = sorted(source.glob("*.safetensors")), sorted(converted.glob("*.safetensors"))
    assert len(sources) > 3
    assert len(files) == 2 * len(sources) + 1
    assert max(file.stat().st_size for file in files) <= 1.1 * max(file.stat().st_size for file in sources)
    index = json.loads((converted / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == {name for name, _ in read_tensors(converted)}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in read_tensors(converted))
    for name, file in index["weight_map"].items():
        assert name in load_file(converted / file)


def test_other_forms_of_the_same_checkpoint(source: Path, tmp_path: Path):
    """Stacked experts, a ``model.`` prefix, a head tied to the embeddings, heads for later tokens; a pattern string."""
    tensors = dict(read_tensors(source))
    stacked = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for projection in ("up_proj", "down_proj"):
        experts = [tensors[f"backbone.layers.3.mixer.experts.{i}.{projection}.weight"] for i in range(4)]
        stacked[f"backbone.layers.3.mixer.experts.{projection}"] = torch.stack(experts)
    stacked = {name.replace("backbone.", "model."): tensor for name, tensor in stacked.items() if "lm_head" not in name}
    stacked["mtp.layers.0.norm.weight"] = torch.ones(64)
    other = tmp_path / "other"
    other.mkdir()
    save_file(stacked, other / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    del config["layers_block_type"]
    config |= {"hybrid_override_pattern": nemotron_h.PATTERN, "tie_word_embeddings": True, "auto_map": {}}
    (other / "config.json").write_text(json.dumps(config))
    make_two_tower(other, tmp_path / "made")
    made = dict(read_tensors(tmp_path / "made"))
    assert torch.equal(made["lm_head.weight"], tensors["backbone.embeddings.weight"])
    for i in range(4):
        name = f"layers.3.mixer.experts.{i}.up_proj.weight"
        assert torch.equal(made[f"denoiser_tower.{name}"], tensors[f"backbone.{name}"])
    assert "auto_map" not in json.loads((tmp_path / "made" / "config.json").read_text())


@pytest.mark.parametrize("is_published", [False, True], ids=["transformers 5", "published"])
def test_both_forms_of_a_config(source: Path, tmp_path: Path, is_published: bool):
    """As transformers 5 writes it, with a list of layers; and as NVIDIA does, with a pattern and a bare Infinity."""
    content = json.loads((source / "config.json").read_text())
    assert "hybrid_override_pattern" not in content
    assert "num_hidden_layers" not in content
    assert content["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    folder = tmp_path / "source"
    shutil.copytree(source, folder)
    if is_published:
        del content["layers_block_type"]
        content |= {"hybrid_override_pattern": nemotron_h.PATTERN, "num_hidden_layers": 5} | AS_PUBLISHED
        (folder / "config.json").write_text(json.dumps(content))
        assert "Infinity]" in (folder / "config.json").read_text()
    cli.main(["init", str(folder), str(tmp_path / "made")])
    assert TwoTowerConfig.from_pretrained(tmp_path / "made").pattern == nemotron_h.PATTERN
    loaded = AutoConfig.from_pretrained(tmp_path / "made")
    assert TwoTowerConfig.of(loaded) == TwoTowerConfig.from_pretrained(tmp_path / "made")
    assert loaded.time_step_limit == [0.0, float("inf")]
    cli.main(["inspect", str(tmp_path / "made")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"architectures": ["NemotronHTwoTowerForCausalLM"]}, "already"),
        ({"moe_latent_size": 64}, "moe_latent_size is 64"),
        ({"n_group": 4}, "n_group is 4"),
        ({"layers_block_type": ["mamba", "dream"]}, "has .'dream'."),
        ({"layers_block_type": []}, "hybrid_override_pattern is ''"),
        ({"layers_block_type": ["mamba"] * 6}, "missing in the TwoTower checkpoint|unexpected tensor"),
        ({"intermediate_size": 80}, "has shape .64, 96., the configuration asks for .64, 80."),
        ({"mask_token_id": 320}, "mask_token_id is 320: it must be within 0 and 319"),
        ({"canvas_length": 0}, "canvas_length is 0"),
    ],
)
def test_what_cannot_be_converted_is_refused(source: Path, tmp_path: Path, change: dict, message: str):
    folder = tmp_path / "source"
    shutil.copytree(source, folder)
    content = json.loads((source / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        make_two_tower(folder, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_nothing_is_overwritten(source: Path, converted: Path, tmp_path: Path):
    before = sorted(converted.iterdir())
    with pytest.raises(SystemExit, match="is not empty"):
        cli.main(["init", str(source), str(converted)])
    assert sorted(converted.iterdir()) == before
    with pytest.raises(SystemExit, match="needs a config.json and at least one"):
        cli.main(["init", str(tmp_path), str(tmp_path / "target")])


def test_inspect_describes(converted: Path, capsys: pytest.CaptureFixture):
    cli.main(["inspect", str(converted), "--context-len", "1000"])
    text = capsys.readouterr().out
    config = TwoTowerConfig.from_pretrained(converted)
    total = sum(tensor.numel() for name, tensor in read_tensors(converted) if name.startswith("context_"))
    for expected in (
        f"Pattern     {config.pattern}",
        "5 layers: 2 Mamba-2, 1 attention, 1 mixture of experts, 1 MLP",
        f"context tower and head: {total / 1e6:.2f} M",
        "8 positions, mask token 5",
        "TP 2: weights",
        "TP 4: not possible",
        "Every tensor of the TwoTower layout is there",
    ):
        assert expected in text


def test_inspect_names_faults(converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = tmp_path / "broken"
    shutil.copytree(converted, folder)
    last = max(folder.glob("*.safetensors"))
    tensors = load_file(last)
    del tensors["t_block.1.bias"]
    tensors["scale_shift_tables.0"] = torch.zeros(2, 64)
    tensors["surplus"] = torch.zeros(3)
    save_file(tensors, last)
    with pytest.raises(SystemExit) as error:
        cli.main(["inspect", str(folder)])
    for expected in (
        "missing: t_block.1.bias [192]",
        "extra: surplus [3]",
        "other shape: scale_shift_tables.0 is [2, 64], the configuration asks for [3, 64]",
    ):
        assert expected in str(error.value)
    shutil.copy(converted / "config.json", tmp_path)
    with pytest.raises(SystemExit, match="holds no"):
        cli.main(["inspect", str(tmp_path)])
