"""Every causal language model of transformers is scored as it scores itself, whatever stands beside a rollout."""

import pytest
import torch
from small_models import NOT_SMALL, SLOW, VOCAB, model_classes, small_model
from transformers import PreTrainedModel

from trl_cmdp.core import token_divergence
from trl_cmdp.evaluation import Rollout, score_rollouts


# One of each kind of position, head and layer. The others are among the slow tests.
FAMILIES = [
    "BertLMHeadModel",  # learned positions, and a transformation before its head
    "BioGptForCausalLM",  # learned positions from the attention mask
    "BloomForCausalLM",  # ALiBi
    "CTRLLMHeadModel",  # sinusoids, a head with a bias
    "FalconH1ForCausalLM",  # attention and state space in one layer, scaled logits
    "Gemma2ForCausalLM",  # soft-capped logits, sliding windows
    "GPT2LMHeadModel",  # learned positions
    "GPTNeoForCausalLM",  # learned positions, local attention
    "LlamaForCausalLM",  # rotary positions
    "MambaForCausalLM",  # state space
    "ModernBertDecoderForCausalLM",  # a transformation before its head
    "MptForCausalLM",  # ALiBi without the attention mask
    "OPTForCausalLM",  # learned positions with an offset
    "RecurrentGemmaForCausalLM",  # recurrent states
    "XLNetLMHeadModel",  # relative positions
]
# Their forward is of more than token ids and an attention mask.
REFUSED = {"CpmAntForCausalLM", "ProphetNetForCausalLM"}
PROMPT_LENGTHS, COMPLETION_LENGTHS = (2, 9, 5), (6, 3, 4)


def rollouts() -> list[Rollout]:
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return torch.randint(3, VOCAB, (count,), generator=generator).tolist()

    return [
        Rollout("", "", draw(prompt), draw(length))
        for prompt, length in zip(PROMPT_LENGTHS, COMPLETION_LENGTHS, strict=True)
    ]


@torch.no_grad()
def own_logits(model: PreTrainedModel, rollout: Rollout) -> torch.Tensor:
    """Logits (L, V) at the completion, of a rollout alone and by the model's own forward."""
    input_ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
    length = len(rollout.completion_ids)
    return model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits[0, -length - 1 : -1].double()


def check(name: str, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    costs = score_rollouts(rollouts(), student, teacher)
    for rollout, beside in zip(rollouts(), costs, strict=True):
        (alone,) = score_rollouts([rollout], student, teacher)
        expected = token_divergence(own_logits(student, rollout), own_logits(teacher, rollout)).float()
        torch.testing.assert_close(beside, alone, rtol=1e-3, atol=1e-5, msg=f"{name}, beside others")
        torch.testing.assert_close(alone, expected, rtol=1e-3, atol=1e-5, msg=f"{name}, from its own logits")
    assert torch.cat(costs).max() > 1e-4
    assert torch.cat(score_rollouts(rollouts(), student, student)).abs().max() < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_an_architecture(name):
    check(name, small_model(name), small_model(name, seed=1))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_scored_is_refused_by_name(name):
    model = small_model(name)
    with pytest.raises(ValueError, match=name):
        score_rollouts(rollouts(), model, model)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(model_classes().keys() - {*FAMILIES, *REFUSED, *NOT_SMALL, *SLOW}))
def test_every_other_architecture(name):
    check(name, small_model(name), small_model(name, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NOT_SMALL))
def test_what_is_left_out_cannot_be_built(name):
    try:
        small_model(name)
    except Exception:  # of many kinds, from configs
        return
    pytest.fail(f"{name} can be built: take it out of the list.")
