"""Hidden states and head give back each architecture's own logits, whatever it does to them."""

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from trl_cmdp.core import token_divergence
from trl_cmdp.teachers import (
    base_model,
    head_divergence,
    head_policy_divergence,
    head_scores,
    last_hidden_state,
    lm_head,
)


VOCAB = 11
SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE)),
    "qwen2 tied": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZE, tie_word_embeddings=True)),
    "cohere logit_scale": lambda: CohereForCausalLM(CohereConfig(**SIZE, logit_scale=0.25)),
    "granite logits_scaling": lambda: GraniteForCausalLM(GraniteConfig(**SIZE, logits_scaling=3.0)),
    "gemma2 softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZE, head_dim=8, final_logit_softcapping=0.5)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2)),
}


def build(name, seed=0):
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    # Spread the logits: at initialisation every distribution is nearly uniform, and no test could fail.
    model.get_output_embeddings().weight.data.mul_(20)
    return model


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_divergence_from_hidden_states_is_that_of_the_models_own_logits(name):
    student, teacher = build(name), build("llama", seed=1)
    input_ids = torch.randint(3, VOCAB, (2, 9))
    length = 5
    logits = [model(input_ids).logits[:, -length - 1 : -1] for model in (student, teacher)]
    hidden = [last_hidden_state(model, length, input_ids=input_ids).flatten(0, 1) for model in (student, teacher)]
    _, costs = head_divergence(hidden[0], lm_head(student), hidden[1], lm_head(teacher), temperature=0.8)
    reference = token_divergence(*logits, temperature=0.8).flatten()
    assert reference.max() > 0.05
    torch.testing.assert_close(costs, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("expected", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_policy_and_divergence_are_those_of_the_models_own_logits(name, expected):
    """Log-probabilities, scores and the gradient of all the student's parameters, tied embeddings among them."""
    student, teacher = build(name), build("llama", seed=1)
    input_ids, length = torch.randint(3, VOCAB, (2, 9)), 5
    token_ids = input_ids[:, -length:].flatten()  # (N,)
    weights = torch.tensor([1.0, 0.0] * length)  # (N,)
    log_prob_grad = torch.linspace(-1, 1, 2 * length)  # (N,)

    logits = [model(input_ids).logits[:, -length - 1 : -1].flatten(0, 1) / 0.8 for model in (student, teacher)]
    logps, teacher_logps = (values.log_softmax(-1).gather(-1, token_ids[:, None])[:, 0] for values in logits)
    costs = token_divergence(logits[0], logits[1].detach())
    loss = (weights * costs).sum() + (log_prob_grad * logps).sum()
    reference = torch.autograd.grad(loss, list(student.parameters()))

    hidden = [last_hidden_state(model, length, input_ids=input_ids).flatten(0, 1) for model in (student, teacher)]
    heads = lm_head(student), lm_head(teacher)
    scores = head_scores(hidden[0], heads[0], hidden[1], heads[1], token_ids, temperature=0.8)
    for values, expected_values in zip(scores, (costs, logps, teacher_logps), strict=True):
        torch.testing.assert_close(values, expected_values.detach(), rtol=1e-4, atol=1e-5)
    own_logps, _, divergence_loss, _ = head_policy_divergence(
        hidden[0],
        heads[0],
        token_ids,
        hidden[1][weights != 0],
        heads[1],
        weights,
        log_prob_grad if expected else None,
        temperature=0.8,
    )
    torch.testing.assert_close(own_logps, logps, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(divergence_loss + (log_prob_grad * own_logps).sum(), list(student.parameters()))
    for gradient, reference_gradient in zip(gradients, reference, strict=True):
        torch.testing.assert_close(gradient, reference_gradient, rtol=1e-3, atol=1e-5)


def test_falcon_h1_scale_is_read_from_its_config():
    """Its forward needs kernels that a CPU has not, so its head alone is looked at."""
    model = build("llama")
    model.config = FalconH1Config(vocab_size=VOCAB, hidden_size=16, lm_head_multiplier=0.125)
    assert lm_head(model).logit_scale == 0.125


@torch.no_grad()
def test_a_longer_head_only_pads():
    student = build("llama")
    longer = LlamaForCausalLM(LlamaConfig(**{**SIZE, "vocab_size": VOCAB + 4})).eval()
    longer.load_state_dict(
        {
            name: torch.cat([value, torch.randn(4, 16)]) if value.size(0) == VOCAB else value
            for name, value in student.state_dict().items()
        }
    )
    input_ids = torch.randint(3, VOCAB, (2, 6))
    hidden = [last_hidden_state(model, 4, input_ids=input_ids).flatten(0, 1) for model in (student, longer)]
    for order in ((0, 1), (1, 0)):
        models = (student, longer)
        _, costs = head_divergence(
            hidden[order[0]], lm_head(models[order[0]]), hidden[order[1]], lm_head(models[order[1]])
        )
        assert costs.abs().max() < 1e-6


def test_base_model_sees_through_peft():
    peft = pytest.importorskip("peft")
    model = build("llama")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert base_model(wrapped) is model
    assert base_model(model) is model
