"""Evaluation's rollouts by vLLM itself, on SmolLM2. Where vLLM is missing, these tests run in its own environment."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_server import run_tests_beside_vllm

from trl_cmdp.evaluation import read_rollout_records, sample_rollouts
from trl_cmdp.evaluation.vllm import load_engine, sample_rollouts_vllm


HAS_VLLM = importlib.util.find_spec("vllm") is not None
pytestmark = pytest.mark.slow
needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="run by test_beside_vllm")

QUESTIONS = [f"What is {first} + {second}?" for first in range(1, 7) for second in (2, 5, 9, 30)]
PROMPTS = [[{"role": "user", "content": question}] for question in QUESTIONS]


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is here")
def test_beside_vllm(smollm2):
    run_tests_beside_vllm(__file__, SMOLLM2=str(smollm2))


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def model(smollm2):
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def engine(smollm2):
    return load_engine(
        smollm2, dtype="float32", max_model_len=256, enforce_eager=True, enable_lora=True, max_lora_rank=8
    )


@torch.no_grad()
def check_greedy(rollouts, references, model):
    """Most are equal; where one is not, the two most likely tokens are as good as equal. Returns the share of equals."""
    same = 0
    for rollout, reference in zip(rollouts, references, strict=True):
        assert rollout.prompt == reference.prompt
        assert rollout.prompt_ids == reference.prompt_ids
        if rollout == reference:
            same += 1
            continue
        pairs = zip(rollout.completion_ids, reference.completion_ids, strict=False)
        place = next(index for index, (token, other) in enumerate(pairs) if token != other)
        logits = model(torch.tensor([reference.prompt_ids + reference.completion_ids[:place]])).logits[0, -1]
        gap = logits[reference.completion_ids[place]] - logits[rollout.completion_ids[place]]
        assert gap.abs() < 1e-2
    share = same / len(references)
    assert share > 0.8
    return share


@needs_vllm
def test_greedy_is_that_of_transformers(engine, model, tokenizer):
    settings = {"max_new_tokens": 24, "greedy": True}
    rollouts = sample_rollouts_vllm(engine, tokenizer, PROMPTS, **settings)
    share = check_greedy(rollouts, sample_rollouts(model, tokenizer, PROMPTS, **settings), model)
    print(f"greedy: {share:.3f} of {len(PROMPTS)} completions equal")
    ended = [rollout for rollout in rollouts if len(rollout.completion_ids) < 24]
    assert ended
    assert all(rollout.completion_ids[-1] == tokenizer.eos_token_id for rollout in ended)
    assert all(rollout.completion_ids.count(tokenizer.eos_token_id) <= 1 for rollout in rollouts)


@needs_vllm
def test_an_adapter_is_used(engine, smollm2, model, tokenizer, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    student = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "o_proj"]))
    torch.manual_seed(0)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    student.save_pretrained(tmp_path)
    settings = {"max_new_tokens": 12, "greedy": True}
    expected = sample_rollouts(student, tokenizer, PROMPTS, **settings)
    share = check_greedy(
        sample_rollouts_vllm(engine, tokenizer, PROMPTS, adapter=tmp_path, **settings), expected, student
    )
    print(f"adapter, greedy: {share:.3f} of {len(PROMPTS)} completions equal")
    assert expected != sample_rollouts(model, tokenizer, PROMPTS, **settings)  # it makes a difference


@needs_vllm
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_first_tokens_have_the_models_distribution(engine, model, tokenizer, temperature):
    """χ² of the first token of one prompt over likely tokens and the rest; another temperature's would not pass."""
    number, prompt = 2000, "The weather today is"
    rollouts = sample_rollouts_vllm(
        engine, tokenizer, [prompt] * number, max_new_tokens=1, temperature=temperature, batch_size=500
    )
    counts = torch.bincount(torch.tensor([rollout.completion_ids[0] for rollout in rollouts]), minlength=49152)
    with torch.no_grad():
        logits = model(torch.tensor([rollouts[0].prompt_ids])).logits[0, -1].double()

    def excess(at):
        """(χ² − degrees of freedom) in standard deviations."""
        probs = (logits / at).softmax(-1)
        likely = probs * number >= 10
        expected = torch.cat([probs[likely], probs[~likely].sum().view(1)]) * number
        observed = torch.cat([counts[likely], counts[~likely].sum().view(1)])
        freedom = len(expected) - 1
        assert freedom >= 2
        statistic = ((observed - expected) ** 2 / expected).sum().item()
        return (statistic - freedom) / (2 * freedom) ** 0.5

    print(f"temperature {temperature}: {excess(temperature):.2f} standard deviations")
    assert excess(temperature) < 4
    assert excess(1.4 * temperature) > 8


@needs_vllm
def test_the_seed_and_not_the_batch_decides(engine, tokenizer):
    def sample(**kwargs):
        rollouts = sample_rollouts_vllm(engine, tokenizer, PROMPTS, max_new_tokens=8, **kwargs)
        return [rollout.completion_ids for rollout in rollouts]

    def share_equal(first, second):
        return sum(map(list.__eq__, first, second)) / len(first)

    seen = []
    first = sample(seed=1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(24, 24)]
    assert share_equal(first, sample(seed=1)) > 0.9
    assert share_equal(first, sample(seed=1, batch_size=5)) > 0.9
    assert share_equal(first, sample(seed=2)) < 0.8
    same_prompt = sample_rollouts_vllm(engine, tokenizer, PROMPTS[:1] * 8, max_new_tokens=8)
    assert len({tuple(rollout.completion_ids) for rollout in same_prompt}) > 1


@needs_vllm
def test_text_prompts_and_what_is_too_long(engine, tokenizer):
    (rollout,) = sample_rollouts_vllm(engine, tokenizer, ["Once upon a time"], max_new_tokens=4)
    assert rollout.prompt_ids == tokenizer("Once upon a time")["input_ids"]
    assert rollout.completion == tokenizer.decode(rollout.completion_ids, skip_special_tokens=True)
    with pytest.raises(ValueError, match="`max_model_len`"):
        sample_rollouts_vllm(engine, tokenizer, ["Once upon a time"], max_new_tokens=253)


@needs_vllm
def test_the_command(smollm2, model, tokenizer, tmp_path):
    """`trl-cmdp evaluate --backend vllm`, in a process of its own: greedy rollouts, and no cost against itself."""
    problems = tmp_path / "problems.jsonl"
    rows = [{"prompt": prompt[0]["content"], "answer": "0"} for prompt in PROMPTS[:8]]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "trl_cmdp", "evaluate", "--backend", "vllm", "--dtype", "float32"]
    command += ["--student", str(smollm2), "--teacher", str(smollm2), "--dataset", str(problems), "--split", "train"]
    command += ["--num_problems", "8", "--num_samples", "1", "--greedy", "--max_new_tokens", "16"]
    command += ["--reward", "trl.rewards.think_format_reward", "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    settings, records = read_rollout_records(tmp_path / "out" / "records.jsonl")
    assert (settings.backend, len(records)) == ("vllm", 16)
    assert max(max(record.costs) for record in records) < 1e-5
    greedy = [record for record in records if record.greedy]
    expected = sample_rollouts(model, tokenizer, [record.prompt for record in greedy], max_new_tokens=16, greedy=True)
    assert sum(record.completion == rollout.completion for record, rollout in zip(greedy, expected, strict=True)) >= 7
