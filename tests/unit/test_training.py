"""Training: the data and their split, the loss, the loop and its checkpoints, and the exported folder."""

import argparse
import datetime
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import nemotron_h
import numpy as np
import pytest
import torch
import yaml

from vllm_twotower.checkpoint import read_tensors
from vllm_twotower.conversion import make_two_tower
from vllm_twotower.evaluation.answers import held_out_problems
from vllm_twotower.reference import TwoTowerModel
from vllm_twotower.training import cli, stages
from vllm_twotower.training.config import (
    SourceConfig,
    SpecialTokens,
    TrainConfig,
    TrainConfigError,
    load_config,
    parse_section,
)
from vllm_twotower.training.corpus import Corpus, Document, prepare_corpus
from vllm_twotower.training.data import (
    draw_sequence,
    make_ar_batch,
    make_denoiser_batch,
    pack,
    step_rng,
)
from vllm_twotower.training.distributed import has_bf16
from vllm_twotower.training.initialise import initialise, start_denoiser_from_context, tie_towers
from vllm_twotower.training.objective import ar_loss, weighted_cross_entropy
from vllm_twotower.training.problems import (
    FAMILIES,
    draw_held_out_problems,
    draw_problem,
    draw_training_problem,
    is_right,
    stated_result,
)
from vllm_twotower.training.stages import ar_stage, denoiser_stage, new_model, prepare_tokenizer
from vllm_twotower.training.stdlib_text import draw_piece, library_prose, library_sources
from vllm_twotower.training.tokenizer import BOS_ID, EOS_ID, MASK_ID
from vllm_twotower.training.trainer import learning_rate, load_checkpoint, run_stage

SHIPPED_CONFIG = Path(__file__).parents[2] / "configs" / "train-tiny.yaml"
SPECIAL = SpecialTokens(BOS_ID, EOS_ID, MASK_ID)
EVEN_MIX = dict.fromkeys(FAMILIES, 1.0)


def tiny_content(folder: Path) -> dict:
    """The shipped configuration with dimensions and counts that train within seconds."""
    content = yaml.safe_load(SHIPPED_CONFIG.read_text())
    content |= {"run_dir": str(folder / "run"), "export_dir": str(folder / "model"), "compile": False}
    content |= {"threads": 1, "bf16_autocast": False, "log_every": 1}
    content["model"] |= {
        "hybrid_override_pattern": "M*-",
        "num_hidden_layers": 3,
        "hidden_size": 32,
        "vocab_size": 300,
        "intermediate_size": 32,
        "mamba_num_heads": 2,
        "mamba_head_dim": 16,
        "num_attention_heads": 2,
        "head_dim": 16,
        "ssm_state_size": 8,
    }
    content["tokenizer"] = {"vocab_size": 300, "documents": 100}
    content["data"]["sequence_length"] = 160
    for source, documents in zip(content["data"]["sources"], (200, 10, 10), strict=True):
        source["documents"] = documents
    for stage in ("ar", "denoiser"):
        content[stage] |= {"steps": 4, "batch_size": 2, "warmup_steps": 1}
    return content


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The models here are so small that threads only cost time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return parse_section(TrainConfig, tiny_content(tmp_path), "")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return prepare_tokenizer(parse_section(TrainConfig, tiny_content(folder), ""), folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    data = parse_section(TrainConfig, tiny_content(folder), "").data
    return prepare_corpus(data, 1, tokenizer, SPECIAL, folder / "data")


class TestProblems:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_its_own_answer_is_right_and_another_is_wrong(self, family):
        rng = random.Random(family)
        for _ in range(50):
            problem = draw_problem(rng, family)
            assert is_right(problem.answer, problem)
            assert is_right(problem.answer + "</s>", problem)
            assert not is_right(problem.answer.replace(problem.result, "nonsense"), problem)

    @pytest.mark.parametrize(
        ("text", "result"),
        [
            (" 1 + 2 = 3. The answer is 3.", "3"),
            (" The answer is 3, 7, 9. The answer is 4.", "3, 7, 9"),
            (" The answer is 3", None),
            (" The answer is 3.5.", "3.5"),
            (" 1 + 2 = 3.", None),
            (' {"a": 1,  "b": "x"} and more', '{"a": 1, "b": "x"}'),
            (' {"a": 1, "b":', None),
            ("", None),
        ],
    )
    def test_the_checker_reads_the_first_stated_result(self, text, result):
        assert stated_result(text) == result

    def test_arithmetic_is_right(self):
        rng = random.Random(0)
        seen = 0
        for family in FAMILIES:
            for _ in range(50):
                for equation in re.findall(r"[\d *+-]+ = [\d *+-]+", draw_problem(rng, family).answer):
                    left, right = equation.split("=")
                    assert eval(left) == eval(right), equation
                    seen += 1
        assert seen > 500

    @pytest.mark.parametrize("family", FAMILIES)
    def test_families_are_too_large_to_remember(self, family):
        rng = random.Random(1)
        draws = [draw_problem(rng, family) for _ in range(20_000)]
        assert len({(problem.template, problem.key) for problem in draws}) > 4000

    def test_answers_are_those_of_an_independent_calculation(self):
        rng = random.Random(2)
        for _ in range(200):
            date = draw_problem(rng, "days_after")
            month, day, days = date.key
            later = datetime.date(2023, month + 1, day) + datetime.timedelta(days)
            assert date.result == f"{later:%B} {later.day}"
            time = draw_problem(rng, "clock")
            later = datetime.datetime(2023, 1, 1, *time.key[:2]) + datetime.timedelta(minutes=time.key[2])
            assert time.result == f"{later.hour}:{later.minute:02}"
            weekday = draw_problem(rng, "weekdays")
            known = datetime.date(2024, 1, 1 + weekday.key[1])  # a Monday, and those after it
            assert weekday.result == f"{known + datetime.timedelta(weekday.key[3]):%A}"
            record = draw_problem(rng, "json_extraction")
            assert all(str(value) in record.question for value in json.loads(record.result).values())
            expression = draw_problem(rng, "python_lists")
            assert str(eval(expression.question.removeprefix("What is ").removesuffix("?"))) == expression.result

    def test_training_never_meets_a_held_out_problem(self):
        rng = random.Random(0)
        held_out = draw_held_out_problems(rng, EVEN_MIX, 300)
        trained = [draw_training_problem(rng, EVEN_MIX) for _ in range(3000)]
        assert len({problem.question for problem in held_out}) == 300
        keys = {(problem.family, problem.template, problem.key) for problem in held_out}
        assert not keys & {(problem.family, problem.template, problem.key) for problem in trained}

    def test_the_split_is_the_same_everywhere(self):
        held_out = [draw_problem(random.Random(i), "addition").held_out for i in range(200)]
        assert [i for i, held in enumerate(held_out) if held] == [23, 52, 55, 61, 99, 134, 162, 183]


@pytest.mark.parametrize("texts", [library_sources, library_prose])
def test_library_pieces_are_short_whole_lines(texts):
    rng = random.Random(0)
    pieces = [draw_piece(rng, texts(), 100) for _ in range(50)]
    assert all(0 < len(piece) <= 100 and piece.strip() for piece in pieces)
    assert pieces[:5] == [draw_piece(same, texts(), 100) for same in [random.Random(0)] for _ in range(5)]


class TestTokenizer:
    def test_every_text_round_trips(self, tokenizer):
        for text in ("Question: 12 + 7?\nAnswer:", "  tabs\t, naïve 中 🙂\n\n", "x=[1,  22]"):
            assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text

    def test_special_ids_and_single_digits(self, tokenizer):
        assert [tokenizer.token_to_id(token) for token in ("<unk>", "<s>", "</s>", "<mask>")] == [0, 1, 2, 3]
        assert tokenizer.get_vocab_size() == 300
        tokens = tokenizer.encode("has 1234", add_special_tokens=False).tokens
        assert tokens[-4:] == ["1", "2", "3", "4"]
        assert tokenizer.encode("7").ids[0] == BOS_ID

    def test_a_chat_looks_like_training_documents(self, config):
        from transformers import AutoTokenizer

        run_dir = Path(config.run_dir)
        own = prepare_tokenizer(config, run_dir)
        loaded = AutoTokenizer.from_pretrained(run_dir / "tokenizer")
        problem = draw_training_problem(random.Random(0), EVEN_MIX)
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": problem.question},
            {"role": "assistant", "content": problem.answer.strip()},
        ]
        ids = loaded.apply_chat_template(messages)["input_ids"]
        parts = [own.encode(part, add_special_tokens=False).ids for part in (problem.prompt, problem.answer)]
        assert ids == [BOS_ID, *parts[0], *parts[1], EOS_ID]
        ids = loaded.apply_chat_template(messages[:2], add_generation_prompt=True)["input_ids"]
        assert ids == [BOS_ID, *parts[0]]


class TestCorpus:
    def test_files_become_documents(self, config, tokenizer, tmp_path):
        lines = tmp_path / "lines.jsonl"
        lines.write_text(
            json.dumps({"prompt": "Question: 1?", "answer": " One."}) + "\n" + json.dumps({"text": "Some text."}) + "\n"
        )
        words = " ".join(str(i) for i in range(300))
        (tmp_path / "long.txt").write_text(words)
        sources = [
            SourceConfig("jsonl", path=str(lines), weight=0.5),
            SourceConfig("text", path=str(tmp_path / "long.txt"), weight=0.25),
        ]
        corpus = prepare_corpus(replace(config.data, sources=sources), 1, tokenizer, SPECIAL, tmp_path / "data")

        def text(document: Document, part: slice) -> str:
            return tokenizer.decode(document.tokens[part].tolist())

        first, second, *long = (corpus[i] for i in range(len(corpus)))
        assert (text(first, slice(first.answer_start)), text(first, slice(first.answer_start, None))) == (
            "Question: 1?",
            " One.",
        )
        assert (second.answer_start, text(second, slice(None)), second.answer_weight) == (1, "Some text.", 0.5)
        assert len(long) > 1
        assert "".join(text(document, slice(None)) for document in long) == words
        for document in long:
            assert len(document.tokens) <= config.data.sequence_length
            assert (document.tokens[0], document.tokens[-1]) == (BOS_ID, EOS_ID)
            assert document.answer_weight == 0.25
        assert sum(len(corpus[i].tokens) for i in range(len(corpus))) == corpus.num_tokens

    def test_a_bad_line_is_named(self, config, tokenizer, tmp_path):
        (tmp_path / "lines.jsonl").write_text('{"text": "x"}\n{"prompt": "y"}\n')
        sources = [SourceConfig("jsonl", path=str(tmp_path / "lines.jsonl"))]
        with pytest.raises(TrainConfigError, match="lines.jsonl, line 2: expected"):
            prepare_corpus(replace(config.data, sources=sources), 1, tokenizer, SPECIAL, tmp_path / "data")
        assert not (tmp_path / "data").exists()

    def test_no_held_out_problem_is_in_it(self, corpus, tokenizer):
        held_out = {problem.question for problem in draw_held_out_problems(random.Random(0), EVEN_MIX, 2000)}
        texts = [tokenizer.decode(corpus[i].tokens.tolist()) for i in range(len(corpus))]
        questions = [text.split("\n")[0].removeprefix("Question: ") for text in texts]
        assert sum(text.startswith("Question: ") for text in texts) >= 200
        assert not held_out & set(questions)


class TestData:
    def test_a_step_has_the_same_batch_again_and_others_differ(self, config, corpus):
        def batch(step):
            return make_denoiser_batch(step_rng(1, "denoiser", step), config.denoiser, config.data, corpus)

        first, again, other = batch(0), batch(0), batch(1)
        for name, value in vars(first).items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(vars(again)[name])), name
        assert not torch.equal(first.tokens, other.tokens)

    def test_next_tokens_are_the_targets(self, config, corpus):
        batch = make_ar_batch(step_rng(1, "ar", 0), 3, config.data, corpus)
        assert batch.tokens.shape == (3, config.data.sequence_length)
        assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
        assert (batch.tokens[:, 0] == BOS_ID).all()

    def test_packing_keeps_weights_and_ends(self):
        tokens = ([BOS_ID, 10, 11, EOS_ID], [BOS_ID, 12, 13, EOS_ID])
        documents = [Document(np.array(tokens[0]), 2, 1.0), Document(np.array(tokens[1]), 1, 0.3)]
        sequence = pack(documents, 7, prompt_weight=0.1)
        assert sequence.tokens.tolist() == [BOS_ID, 10, 11, EOS_ID, BOS_ID, 12, 13]
        assert sequence.weights.tolist() == pytest.approx([0.1, 0.1, 1, 1, 0.1, 0.3, 0.3])
        assert sequence.ends.tolist() == [3, 3, 3, 3, 7, 7, 7]
        assert sequence.answers == [(2, 3), (5, 7)]
        with pytest.raises(ValueError, match="do not fill"):
            pack(documents, 9, prompt_weight=0.1)

    def test_blocks_hold_the_document_and_then_eos(self, config, corpus):
        batch = make_denoiser_batch(step_rng(1, "denoiser", 0), config.denoiser, config.data, corpus)
        rng = step_rng(1, "denoiser", 0)
        sequences = [draw_sequence(rng, corpus, config.data, 16) for _ in range(config.denoiser.batch_size)]
        for row, sequence in enumerate(sequences):
            for start, target in zip(batch.block_starts[row].tolist(), batch.targets[row].tolist(), strict=True):
                end = min(sequence.ends[start] + 1, start + len(target))
                known = sequence.tokens[start:end].tolist()
                assert target == known + [EOS_ID] * (len(target) - len(known))
            answers = {start for start, _ in sequence.answers}
            assert set(batch.block_starts[row].tolist()) & answers

    def test_masks_cover_at_least_one_token_and_all_at_t_1(self, config, corpus):
        batch = make_denoiser_batch(step_rng(1, "denoiser", 0), config.denoiser, config.data, corpus)
        assert batch.masked.any(-1).all()
        assert (batch.t == 1).any()
        assert batch.masked[batch.t == 1].all()
        assert not batch.masked.all()
        assert ((batch.canvas == MASK_ID) == batch.masked).all()


class TestConfig:
    def test_the_shipped_file_is_valid(self):
        config = load_config(SHIPPED_CONFIG)
        assert config.data.block_size == 16

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"seeed": 1}, "unknown key seeed; known keys are seed"),
            ({"ar": {"steps": 1}}, "missing key ar.batch_size"),
            ({"seed": "one"}, "seed is 'one': expected int"),
            ({"compile": 1}, "compile is 1: expected bool"),
            ({"tokenizer": 3}, "tokenizer must be a mapping"),
            ({"tokenizer": {"vocab_size": 400, "documents": 1}}, "differ"),
            ({"init_from": "/nowhere"}, "with init_from, model and tokenizer come from"),
            ({"model": {}}, "missing key model .or init_from"),
        ],
    )
    def test_mistakes_are_named(self, tmp_path, change, message):
        with pytest.raises(TrainConfigError, match=message):
            parse_section(TrainConfig, tiny_content(tmp_path) | change, "")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"accumulate": 3}, "batch_size .2. must be a multiple of accumulate .3."),
            ({"tied_towers": True}, "tied_towers needs freeze_context: false"),
            ({"context_ar_weight": 0.1}, "context_ar_weight needs freeze_context: false"),
            ({"block_size_schedule": [[0, 32], [5]]}, "block_size_schedule is .* expected pairs"),
            ({"block_size_schedule": [[9, 32], [5, 16]]}, "block_size_schedule is .* by step"),
            ({"full_mask_share": 1.5}, "full_mask_share is 1.5"),
        ],
    )
    def test_bad_denoiser_options_are_named(self, tmp_path, change, message):
        content = tiny_content(tmp_path)
        content["denoiser"] |= change
        with pytest.raises(TrainConfigError, match=message):
            parse_section(TrainConfig, content, "")

    def test_the_command_names_a_mistake(self, tmp_path):
        path = tmp_path / "train.yaml"
        path.write_text(yaml.safe_dump(tiny_content(tmp_path) | {"seeed": 1}))
        with pytest.raises(SystemExit, match="unknown key seeed"):
            cli.run_here(path, ["train"])

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ({"kind": "problems", "documents": 1, "mix": {"algebra": 1}}, "unknown families .'algebra'."),
            ({"kind": "poems"}, "kind 'poems'; known are problems, library"),
            ({"kind": "library", "documents": 3}, "library in data.sources needs characters"),
            ({"kind": "text", "path": "/nowhere.txt"}, "/nowhere.txt, which does not exist"),
            ({"kind": "prose", "color": 1}, r"unknown key data.sources\[0\].color"),
        ],
    )
    def test_bad_sources_are_named(self, tmp_path, source, message):
        content = tiny_content(tmp_path)
        content["data"]["sources"] = [source]
        with pytest.raises(TrainConfigError, match=message):
            parse_section(TrainConfig, content, "")


class TestLoss:
    def test_weights_are_relative(self):
        logits, targets = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
        weights = torch.rand(2, 3)
        expected = -(logits.log_softmax(-1).gather(2, targets[..., None])[..., 0] * weights).sum() / weights.sum()
        total = weights.sum()
        torch.testing.assert_close(weighted_cross_entropy(logits, targets, weights, total), expected)
        torch.testing.assert_close(weighted_cross_entropy(logits, targets, 7 * weights, 7 * total), expected)
        parts = [weighted_cross_entropy(logits[i], targets[i], weights[i], total) for i in range(2)]
        torch.testing.assert_close(sum(parts), expected)

    def test_the_denoiser_starts_as_the_context_tower(self, config):
        model = new_model(config).eval()
        tokens = torch.randint(4, 300, (2, 50))
        starts = torch.tensor([[1, 20, 33], [49, 16, 2]])
        canvas = tokens.gather(1, starts).unsqueeze(-1)  # blocks of one token: nothing bidirectional about them
        logits = model.denoise_blocks(tokens, starts, canvas, torch.rand(2, 3))
        rows = torch.arange(2)[:, None]
        torch.testing.assert_close(logits[:, :, 0], model.context_logits(tokens)[rows, starts], atol=1e-4, rtol=1e-4)


class TestTrainer:
    def test_the_rate_warms_up_stays_and_decays(self, config):
        stage = replace(config.ar, steps=100, warmup_steps=10, decay_fraction=0.2, learning_rate=1.0)
        assert learning_rate(stage, 0) == pytest.approx(0.1)
        assert learning_rate(stage, 50) == 1.0
        assert learning_rate(stage, 90) == pytest.approx(0.5)
        assert 0 < learning_rate(stage, 99) <= 0.05

    def test_the_loss_goes_down(self, config, corpus, tmp_path):
        config = replace(config, ar=replace(config.ar, steps=20, learning_rate=1e-2))
        model = new_model(config)
        stage = ar_stage(model, config, corpus)
        batch = stage.make_batch(1000)
        before = ar_loss(model, batch).item()
        run_stage(model, stage, config, tmp_path)
        assert ar_loss(model, batch).item() < before - 1

    @pytest.mark.parametrize("make_stage", [ar_stage, denoiser_stage])
    def test_parts_of_a_batch_add_up(self, config, corpus, tmp_path, make_stage):
        def weights(accumulate: int) -> dict[str, torch.Tensor]:
            settings = {"steps": 2, "batch_size": 4, "accumulate": accumulate}
            changed = replace(config, ar=replace(config.ar, **settings), denoiser=replace(config.denoiser, **settings))
            model = new_model(changed)
            run_stage(model, make_stage(model, changed, corpus), changed, tmp_path / str(accumulate))
            return model.state_dict()

        (tmp_path / "1").mkdir()
        (tmp_path / "4").mkdir()
        whole, parts = weights(1), weights(4)
        for name, tensor in whole.items():
            torch.testing.assert_close(parts[name], tensor, atol=1e-4, rtol=1e-3)

    @pytest.mark.parametrize(
        ("options", "moves", "stays"),
        [
            ({}, {"denoiser_tower", "lm_head", "t_block", "scale_shift_tables"}, {"context_tower", "context_lm_head"}),
            ({"time_conditioning": False}, {"denoiser_tower"}, {"context_tower", "t_block", "scale_shift_tables"}),
            ({"freeze_context": False}, {"denoiser_tower", "context_tower"}, {"context_lm_head"}),
            ({"freeze_context": False, "context_ar_weight": 0.5}, {"context_tower", "context_lm_head"}, set()),
            ({"freeze_context": False, "tied_towers": True}, {"context_tower", "denoiser_tower"}, {"context_lm_head"}),
        ],
    )
    def test_the_sources_options(self, config, corpus, tmp_path, options, moves, stays):
        config = replace(config, denoiser=replace(config.denoiser, **options))
        model = new_model(config)
        start_denoiser_from_context(model)
        if config.denoiser.tied_towers:
            tie_towers(model)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        run_stage(model, denoiser_stage(model, config, corpus), config, tmp_path)
        after = model.state_dict()
        changed = {name.split(".")[0] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
        assert moves <= changed
        assert not stays & changed
        if config.denoiser.tied_towers:
            for name, tensor in after.items():
                if name.startswith("context_tower."):
                    assert torch.equal(tensor, after[name.replace("context", "denoiser", 1)])
        again = new_model(config)
        if config.denoiser.tied_towers:
            tie_towers(again)
        assert load_checkpoint(tmp_path / "denoiser.pt", again).step == config.denoiser.steps
        assert all(torch.equal(tensor, after[name]) for name, tensor in again.state_dict().items())

    def test_blocks_follow_their_schedule(self, config, corpus, tmp_path):
        config = replace(config, denoiser=replace(config.denoiser, block_size_schedule=[[0, 32], [2, 16], [3, 8]]))
        model = new_model(config)
        stage = denoiser_stage(model, config, corpus)
        assert [stage.make_batch(step).targets.shape[-1] for step in range(4)] == [32, 32, 16, 8]
        run_stage(model, stage, config, tmp_path)

    def test_bidirectional_mamba_sees_what_comes_later(self, config):
        for both_ways in (False, True):
            model = new_model(
                replace(
                    config,
                    model={**config.model, "hybrid_override_pattern": "M-"}
                    | {"num_hidden_layers": 2, "bidirectional_mamba": both_ways},
                )
            ).eval()
            tokens, starts = torch.randint(4, 300, (1, 20)), torch.tensor([[7]])
            canvas = torch.full((1, 1, 8), MASK_ID)
            other = canvas.clone()
            other[0, 0, 5] = 50
            with torch.no_grad():
                logits = [model.denoise_blocks(tokens, starts, x, torch.ones(1, 1))[0, 0, 2] for x in (canvas, other)]
            assert torch.equal(*logits) is not both_ways

    @pytest.mark.parametrize("make_stage", [ar_stage, denoiser_stage])
    def test_a_resumed_run_ends_with_the_same_bits(self, config, corpus, tmp_path, make_stage):
        def run(folder: Path, steps: int, data_workers: int = 0) -> TwoTowerModel:
            settings = {"steps": steps, "decay_fraction": 0.0}
            changed = replace(config, data_workers=data_workers)
            changed = replace(changed, ar=replace(config.ar, **settings), denoiser=replace(config.denoiser, **settings))
            model = new_model(changed)
            folder.mkdir(exist_ok=True)
            assert run_stage(model, make_stage(model, changed, corpus), changed, folder).step == steps
            return model

        whole = run(tmp_path / "whole", 4)
        run(tmp_path / "halves", 2)
        resumed = run(tmp_path / "halves", 4, data_workers=2)
        for name, tensor in whole.state_dict().items():
            assert torch.equal(tensor, resumed.state_dict()[name]), name

    def test_each_stage_moves_only_its_own_tower(self, config, corpus, tmp_path):
        model = new_model(config)
        for make_stage, frozen in ((ar_stage, "denoiser"), (denoiser_stage, "context")):
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            run_stage(model, make_stage(model, config, corpus), config, tmp_path)
            changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
            context = {name for name in before if name.startswith("context_")}
            assert changed
            assert not changed & (context if frozen == "context" else before.keys() - context)


def test_the_seed_decides_every_parameter(config):
    """Also those of a model that was something else before, with experts."""
    config.model.update(hybrid_override_pattern="M*-E", num_hidden_layers=4)
    expected = new_model(config)
    again = new_model(config)
    with torch.no_grad():
        for value in again.state_dict().values():
            value.add_(1)
    initialise(again, config.seed)
    expected, again = expected.state_dict(), again.state_dict()
    assert expected.keys() == again.keys()
    assert [name for name in expected if not torch.equal(expected[name], again[name])] == []
    other = new_model(replace(config, seed=config.seed + 1)).state_dict()
    assert any(not torch.equal(expected[name], other[name]) for name in other if name.endswith("mixer.gate.weight"))


def test_from_a_nemotron_h_checkpoint_to_a_trained_two_tower(tmp_path, tokenizer):
    """`init`, then training of the denoiser on a JSONL file, then the exported folder."""
    pytest.importorskip("matplotlib")
    nemotron_h.save(tmp_path / "source", bos_token_id=BOS_ID, eos_token_id=EOS_ID)
    tokenizer.save(str(tmp_path / "source" / "tokenizer.json"))
    make_two_tower(tmp_path / "source", tmp_path / "start")
    lines = [json.dumps({"prompt": f"{i} + 1 =", "answer": f" {i + 1}"}) for i in range(200)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    content = tiny_content(tmp_path) | {"init_from": str(tmp_path / "start")}
    for name in ("model", "tokenizer", "ar"):
        del content[name]
    content["data"]["sources"] = [{"kind": "jsonl", "path": str(tmp_path / "sums.jsonl")}]
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(content))
    cli.run_here(path, None)
    start, trained = (dict(read_tensors(tmp_path / name)) for name in ("start", "model"))
    for name, tensor in start.items():
        same = torch.equal(trained[name], tensor.bfloat16())
        assert same or not name.startswith("context_"), name
    assert not torch.equal(trained["lm_head.weight"], start["lm_head.weight"].bfloat16())
    assert "trained from\nstart" in (tmp_path / "model" / "README.md").read_text()
    assert (tmp_path / "model" / "tokenizer.json").exists()
    assert not (tmp_path / "model" / "heldout.jsonl").exists()
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])["stage"] == "denoiser"


def test_the_command_trains_and_exports(tmp_path):
    pytest.importorskip("matplotlib")
    content = tiny_content(tmp_path)
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(content))
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    cli.run(parser.parse_args([str(path)]))
    folder = tmp_path / "model"
    model = TwoTowerModel.from_pretrained(folder)
    assert model.config.pattern == "M*-"
    assert json.loads((folder / "config.json").read_text()) == content["model"]
    first = json.loads((folder / "heldout.jsonl").read_text().splitlines()[0])
    assert first["prompt"] == held_out_problems(200, content["seed"])[1][0].prompt
    assert "Not evaluated" in (folder / "README.md").read_text()
    (tmp_path / "run" / "evaluation").mkdir()
    (tmp_path / "run" / "evaluation" / "results.md").write_text("# model\n\nMost were right.\n")
    cli.run(parser.parse_args([str(path), "--only", "export"]))
    assert "## Evaluation\n\nMost were right." in (folder / "README.md").read_text()
    assert (folder / "loss.png").stat().st_size > 0


@pytest.mark.parametrize("capability", [None, "avx512_bf16", "amx_bf16", "bf16"])
def test_autocast_where_the_processor_has_bf16(tmp_path, monkeypatch, capsys, capability):
    """Elsewhere a bf16 product takes up to a hundred times as long as one in fp32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"avx2": True} | ({capability: True} if capability else {})
    )
    trained = []
    monkeypatch.setattr(stages, "train", lambda config, run_dir: trained.append(config.bf16_autocast))
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(tiny_content(tmp_path) | {"bf16_autocast": True}))
    cli.run_here(path, ["train"])
    assert trained == [capability is not None]
    assert ("no bf16 arithmetic" in capsys.readouterr().err) == (capability is None)


def test_an_older_pytorch_trains_as_configured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert has_bf16()
