"""Rollouts: same samples for a seed, ends where the model ends, prompts as text or messages."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_cmdp.evaluation import sample_rollouts
from trl_cmdp.tasks.arithmetic import demo_model_path, load_problems


@pytest.fixture(scope="module")
def student():
    return AutoModelForCausalLM.from_pretrained(demo_model_path("student"))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_model_path("student"))


PROMPTS = load_problems(12, "train", seed=3)["prompt"]


def test_same_seed_same_rollouts_and_the_global_state_is_left_alone(student, tokenizer):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = sample_rollouts(student, tokenizer, PROMPTS, max_new_tokens=20, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == sample_rollouts(student, tokenizer, PROMPTS, max_new_tokens=20, seed=1)
    assert first != sample_rollouts(student, tokenizer, PROMPTS, max_new_tokens=20, seed=2)


def test_a_completion_ends_with_its_first_eos_or_at_the_bound(student, tokenizer):
    rollouts = sample_rollouts(student, tokenizer, PROMPTS, max_new_tokens=20)
    assert [rollout.prompt for rollout in rollouts] == PROMPTS
    for rollout in rollouts:
        eos = [i for i, token in enumerate(rollout.completion_ids) if token == tokenizer.eos_token_id]
        assert eos == [len(rollout.completion_ids) - 1] or (not eos and len(rollout.completion_ids) == 20)
        assert rollout.completion == tokenizer.decode(rollout.completion_ids, skip_special_tokens=True)


def test_greedy_takes_the_most_likely_token_whatever_the_padding(student, tokenizer):
    prompts = ["1+2+3+4+5=", "9+9=", "7+1+1="]
    rollouts = sample_rollouts(student, tokenizer, prompts, max_new_tokens=8, greedy=True)
    for rollout in rollouts:
        ids = list(rollout.prompt_ids)
        for token in rollout.completion_ids:
            with torch.no_grad():
                assert student(torch.tensor([ids])).logits[0, -1].argmax() == token
            ids.append(token)


def test_messages_go_through_the_chat_template(student):
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path("student"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    rollouts = sample_rollouts(
        student, tokenizer, [[{"role": "user", "content": "1+2"}]], max_new_tokens=4, greedy=True
    )
    assert rollouts[0].prompt_ids == tokenizer("1+2=")["input_ids"]


def test_progress_is_reported_and_the_mode_restored(student, tokenizer):
    student.train()
    seen = []
    sample_rollouts(
        student, tokenizer, PROMPTS, max_new_tokens=2, batch_size=5, progress=lambda done, total: seen.append(done)
    )
    assert seen == [5, 10, 12]
    assert student.training
    student.eval()


def test_a_tokenizer_without_padding_is_an_error(student):
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path("student"))
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="padding token"):
        sample_rollouts(student, tokenizer, PROMPTS, max_new_tokens=2)
