"""Scores of rollouts: the exact divergence of full logits, whatever the batch."""

import pytest
import torch
from fake_server import serving
from fake_vllm import FakeServer
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_cmdp.core import token_divergence
from trl_cmdp.evaluation import sample_rollouts, score_rollouts
from trl_cmdp.tasks.arithmetic import demo_model_path, load_problems
from trl_cmdp.teachers import RemoteTeacher


@pytest.fixture(scope="module")
def models():
    return [AutoModelForCausalLM.from_pretrained(demo_model_path(name)) for name in ("student", "teacher")]


@pytest.fixture(scope="module")
def rollouts(models):
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path("student"))
    prompts = ["1+2=", *load_problems(6, "train", seed=3)["prompt"]]
    return sample_rollouts(models[0], tokenizer, prompts, max_new_tokens=16)


@pytest.mark.parametrize(("beta", "temperature"), [(1.0, 1.0), (0.0, 0.7), (0.5, 1.3)])
def test_costs_are_the_dense_divergence_of_each_rollout_alone(models, rollouts, beta, temperature):
    costs = score_rollouts(rollouts, *models, beta=beta, temperature=temperature, batch_size=3)
    for rollout, cost in zip(rollouts, costs, strict=True):
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        with torch.no_grad():
            student, teacher = (model(ids).logits[0, len(rollout.prompt_ids) - 1 : -1].double() for model in models)
        torch.testing.assert_close(
            cost.double(), token_divergence(student, teacher, beta, temperature), rtol=1e-4, atol=1e-5
        )


def test_a_model_costs_nothing_against_itself(models, rollouts):
    for cost in score_rollouts(rollouts, models[1], models[1]):
        assert cost.abs().max() < 1e-6


def test_nan_weights_are_an_error(models, rollouts):
    broken = AutoModelForCausalLM.from_pretrained(demo_model_path("teacher"))
    broken.lm_head.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        score_rollouts(rollouts, models[0], broken)


def test_a_server_teaches_as_the_model_that_it_runs(models, rollouts):
    folder = str(demo_model_path("teacher"))
    with serving(FakeServer(models[1], folder)) as server:
        costs = score_rollouts(rollouts, models[0], RemoteTeacher(server.url), batch_size=3)
    expected = score_rollouts(rollouts, *models)
    torch.testing.assert_close(torch.cat(costs), torch.cat(expected), rtol=1e-4, atol=1e-5)
    with (
        serving(FakeServer(models[1], folder, "v1/completions")) as server,
        pytest.raises(ValueError, match="returns log-probabilities only"),
    ):
        score_rollouts(rollouts, models[0], RemoteTeacher(server.url))
