"""The context tower alone: the autoregressive goldens without a denoiser, and one clear line for what needs one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import golden_data
import pytest
import released_layout
import torch
from engines import assert_idle, core, generate, runner, running_engine, tokens_of
from stand_in_graphs import stand_in_cuda
from torch_layers import torch_attention
from vllm import LLM, EngineArgs, SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_twotower import cli
from vllm_twotower.architecture import is_of_context
from vllm_twotower.checkpoint import INDEX, lacks_denoiser
from vllm_twotower.engine.pass_graphs import PassKind

ALONE = {"towers": "context"}
ONLY_AR = "needs the denoiser; with additional_config['twotower'].towers='context' the only mode is 'ar'"


def answers(llm: LLM, name: str) -> list[tuple[int, ...]]:
    """What the golden prompts get by default, all at once."""
    prompts = [prompt["ids"] for prompt in golden_data.prompts(name)]
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    return tokens_of(generate(llm, prompts, [params] * len(prompts)))


def goldens(name: str) -> list[tuple[int, ...]]:
    return [tuple(prompt["ar"]["new_ids"]) for prompt in golden_data.prompts(name)]


def without_denoiser(folder: Path) -> Path:
    """A copy of checkpoint A that has the context tower's tensors alone."""

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if not is_of_context(name)]:
            del tensors[name]

    return golden_data.changed_checkpoint(folder, drop)


@pytest.mark.parametrize("name", golden_data.CHECKPOINTS)
def test_goldens(name: str) -> None:
    with running_engine(golden_data.checkpoint(name), ALONE) as llm:
        assert answers(llm, name) == goldens(name)
        model, groups = runner(llm).model, core(llm).scheduler.kv_cache_config.kv_cache_groups
        names = {name for name, _ in model.named_parameters()} | {
            name for group in groups for name in group.layer_names
        }
        assert all(map(is_of_context, names))
        pattern = model.checkpoint_config.pattern
        assert sum(len(group.layer_names) for group in groups) == pattern.count("M") + pattern.count("*")
        assert_idle(llm)
        # As vLLM profiles memory where there is a GPU.
        hidden = runner(llm)._dummy_run(256, skip_attn=True, is_profile=True)[1]
        runner(llm)._dummy_sampler_run(hidden)


def test_next_tokens_are_replayed() -> None:
    """Other passes are not captured: prompts run without graphs."""
    with (
        torch_attention(),
        running_engine(golden_data.checkpoint("A"), ALONE) as llm,
        stand_in_cuda(llm, (1, 8)) as cuda,
    ):
        graphs = cuda.capture()
        replay, replayed = graphs.replay, []
        graphs.replay = lambda desc: (replayed.append(desc), replay(desc))
        assert {(desc.kind, desc.num_reqs) for desc in graphs.graphs} == {
            (PassKind.NEXT_TOKEN, rows) for rows in (1, 8)
        }
        assert answers(llm, "A") == goldens("A")
    assert len(replayed) > 16


def test_a_folder_without_a_denoiser(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = without_denoiser(tmp_path / "context")
    with running_engine(folder, max_num_batched_tokens=20) as llm:
        assert answers(llm, "A") == goldens("A")
        # Enough for a token of each request; there are no canvases that it would cut.
        assert core(llm).vllm_config.scheduler_config.max_num_batched_tokens == 20
        for mode in ("mask_diffusion", "verified", "auto"):
            with pytest.raises(VLLMValidationError) as error:
                generate(llm, [[5, 6]], [SamplingParams(extra_args={"diffusion_mode": mode})])
            assert str(error.value).startswith(f"diffusion_mode='{mode}': {ONLY_AR}")
        with pytest.raises(
            VLLMValidationError, match="diffusion_draft_steps=2: has no meaning with diffusion_mode 'ar'"
        ):
            generate(llm, [[5, 6]], [SamplingParams(extra_args={"diffusion_draft_steps": 2})])
    cli.main(["inspect", str(folder)])
    text = capsys.readouterr().out
    assert "TP 2: context tower alone" in text
    assert "no denoiser: this serves diffusion_mode 'ar' alone" in text
    assert "denoiser tower and head" not in text


def test_deleted_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The denoiser's shards are deleted, nothing else: the index still names them, and one shard has both towers."""
    folder = released_layout.save(tmp_path / "released")
    prompts, params = [list(range(20, 50))] * 2, [SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)] * 2
    with running_engine(folder, ALONE) as llm:
        expected = tokens_of(generate(llm, prompts, params))
    assert 10 < released_layout.delete_denoiser(folder) < 14
    with running_engine(folder) as llm:
        assert tokens_of(generate(llm, prompts, params)) == expected
    cli.main(["inspect", str(folder)])
    text = capsys.readouterr().out
    assert "left of the denoiser, not loaded: " in text
    assert "no denoiser: this serves diffusion_mode 'ar' alone" in text


def test_what_lacks_a_denoiser(tmp_path: Path) -> None:
    """A checkpoint that is merely broken, or not there, is not taken for a context tower."""
    folder = released_layout.save(tmp_path / "released")
    assert not lacks_denoiser(folder)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    shards = {
        name: folder / weight_map[name] for name in ("denoiser_tower.norm_f.weight", "context_tower.norm_f.weight")
    }
    for shard in shards.values():
        renamed = shard.rename(tmp_path / shard.name)
        assert not lacks_denoiser(folder)
        renamed.rename(shard)
    released_layout.delete_denoiser(folder)
    assert lacks_denoiser(folder)
    (folder / INDEX).unlink()  # it was what said that nothing else is missing
    assert not lacks_denoiser(folder)
    assert not lacks_denoiser("nvidia/a-name-on-a-hub")
    changed = golden_data.changed_checkpoint(tmp_path / "changed", lambda tensors: tensors.pop("lm_head.weight"))
    assert not lacks_denoiser(changed)
    assert lacks_denoiser(without_denoiser(tmp_path / "context"))


def test_a_missing_denoiser_names_the_option(tmp_path: Path) -> None:
    """As for a checkpoint that is downloaded once the options are settled."""
    folder = without_denoiser(tmp_path / "context")
    message = r"missing .*denoiser_tower.* served alone with additional_config\['twotower'\]\.towers='context'"
    with pytest.raises(ValueError, match=message), running_engine(folder, {"towers": "both"}):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "auto"}, f"mode='auto': {ONLY_AR}"),
        ({"mode": "mask_diffusion"}, f"mode='mask_diffusion': {ONLY_AR}"),
        ({"lossless": True}, f"lossless=True: {ONLY_AR}"),
        ({"draft_steps": 2}, f"draft_steps=2: {ONLY_AR}"),
        ({"confidence_threshold": 0.5}, f"confidence_threshold=0.5: {ONLY_AR}"),
        ({"mask_token_id": 3}, f"mask_token_id=3: {ONLY_AR}"),
        ({"towers": "denoiser"}, "towers='denoiser': must be one of 'both', 'context'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_of_the_denoiser_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        EngineArgs(
            model=str(golden_data.checkpoint("A")), additional_config={"twotower": ALONE | options}
        ).create_engine_config()
    assert f"additional_config['twotower'].{message}" in str(error.value)
