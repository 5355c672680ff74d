"""Hidden states and head give back each architecture's own logits, whatever it does to them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
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

from trl_cmdp.core import Comparison, chunked_policy_divergence, chunked_scores, token_divergence
from trl_cmdp.teachers import LocalTeacher, base_model, last_hidden_state, lm_head, predicting


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


def completion_states(model, input_ids, length):
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    hidden = last_hidden_state(model, model.get_output_embeddings(), **inputs)
    return predicting(hidden, length).flatten(0, 1)


@pytest.mark.parametrize("name", MODELS)
def test_scores_and_gradients_are_those_of_the_models_own_logits(name):
    """Costs, log-probabilities, and the gradient of all the student's parameters, tied embeddings among them."""
    student, teacher = build(name), build("llama", seed=1)
    input_ids, length = torch.randint(3, VOCAB, (2, 9)), 5
    token_ids = input_ids[:, -length:].flatten()  # (N,)
    weights = torch.tensor([1.0, 0.0] * length)  # (N,)
    advantages = torch.linspace(-1, 1, 2 * length)  # (N,)

    logits = [model(input_ids).logits[:, -length - 1 : -1].flatten(0, 1) / 0.8 for model in (student, teacher)]
    logps, teacher_logps = (values.log_softmax(-1).gather(-1, token_ids[:, None])[:, 0] for values in logits)
    costs = token_divergence(logits[0], logits[1].detach())
    assert costs.max() > 0.05
    loss = (weights * costs).sum() + (advantages * logps).sum()
    reference = torch.autograd.grad(loss, list(student.parameters()))

    hidden = [completion_states(model, input_ids, length) for model in (student, teacher)]
    heads, comparison = (lm_head(student), lm_head(teacher)), Comparison(temperature=0.8)
    scores = chunked_scores(hidden[0], heads[0], hidden[1], heads[1], comparison, token_ids)
    for values, expected in zip(scores, (costs, logps, teacher_logps), strict=True):
        torch.testing.assert_close(values, expected.detach(), rtol=1e-4, atol=1e-5)
    own_logps, _, divergence_loss, _ = chunked_policy_divergence(
        hidden[0], heads[0], hidden[1][weights != 0], heads[1], comparison, token_ids, weights
    )
    torch.testing.assert_close(own_logps, logps, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(divergence_loss + (advantages * own_logps).sum(), list(student.parameters()))
    for gradient, expected in zip(gradients, reference, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def test_falcon_h1_scale_is_read_from_its_config():
    """Its forward needs kernels that a CPU has not, so its head alone is looked at."""
    model = build("llama")
    model.config = FalconH1Config(vocab_size=VOCAB, hidden_size=16, lm_head_multiplier=0.125)
    assert lm_head(model).logit_scale == 0.125


@torch.no_grad()
def test_a_peft_model_is_read_with_its_adapter():
    """As a teacher that no trainer wraps: hidden states of the mask alone, and the head, give the model's own logits."""
    model = build("llama")
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    assert base_model(wrapped) is model
    assert base_model(model) is model
    input_ids, mask = torch.randint(3, VOCAB, (2, 6)), torch.tensor([[1, 1, 1], [1, 0, 1]]).bool()
    teacher = LocalTeacher(wrapped.eval())
    hidden = teacher.hidden_states(input_ids, torch.ones_like(input_ids), mask)
    logits = wrapped(input_ids=input_ids).logits[:, -4:-1]
    torch.testing.assert_close(hidden @ teacher.head().weight.T, logits[mask])
    with wrapped.disable_adapter():
        assert not torch.allclose(wrapped(input_ids=input_ids).logits[:, -4:-1], logits, atol=1e-3)
