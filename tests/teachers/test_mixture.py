"""A teacher that is mixed into the student's sampling reads the completions as its own `generate` reads them."""

import inspect
from contextlib import nullcontext

import pytest
import torch
from helpers import make_args
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from small_models import NOT_SMALL, VOCAB, model_classes, small_model
from transformers import GenerationMixin

from trl_cmdp import MiniLLMDistillConfig
from trl_cmdp.teachers.models import base_model
from trl_cmdp.trainers.engine.forward import StudentForward
from trl_cmdp.trainers.engine.mixture import check_mixing


STUDENT = "LlamaForCausalLM"
# One of each kind of cache and positions. The others are among the slow tests.
FAMILIES = [
    "CTRLLMHeadModel",  # positions in the order of the tokens
    "DeepseekV4ForCausalLM",  # compressed keys
    "FalconH1ForCausalLM",  # attention and state space in one layer
    "Gemma3ForCausalLM",  # sliding windows
    "GPT2LMHeadModel",  # learned positions
    "Lfm2ForCausalLM",  # convolutions
    "LlamaForCausalLM",
    "MambaForCausalLM",  # state space alone
    "Qwen3_5ForCausalLM",  # linear attention in some layers
    "RwkvForCausalLM",  # a state by another name
]
WITHOUT_CACHE = {"OpenAIGPTLMHeadModel", "RecurrentGemmaForCausalLM", "XLMWithLMHeadModel"}
# Whose own `generate` fails with models this small, or (Whisper) loses the mask of the prompts.
NO_ORACLE = {
    "BambaForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "HrmTextForCausalLM",
    "JambaForCausalLM",
    "MarianForCausalLM",
    "NemotronHForCausalLM",
    "WhisperForCausalLM",
}
ADAPTERS = {
    "lora": LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}
PROMPTS = torch.tensor([[5, 6, 7, 8, 9, 10], [0, 0, 0, 11, 12, 13]])
NEW_TOKENS, ALPHA = 5, 0.4


def generated(model, **options):
    """Completions (B, T) sampled by a model, and the log-probabilities (B, T, V) that it sampled them from."""
    base_model(model).generation_config.eos_token_id = None
    output = model.generate(
        input_ids=PROMPTS,
        attention_mask=(PROMPTS != 0).long(),
        max_new_tokens=NEW_TOKENS,
        do_sample=True,
        top_k=0,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **{"use_cache": True, **options},
    )
    logps = torch.stack(output.logits, dim=1)[..., :VOCAB].float().log_softmax(-1)
    return output.sequences[:, PROMPTS.size(1) :], logps


def forced(model, completions, **options):
    """What a model would sample given completions (B, T) from, by its own `generate`: log-probabilities (B, T, V)."""

    def force(input_ids, scores):
        tokens = completions[:, input_ids.size(1) - PROMPTS.size(1)]
        return torch.full_like(scores, -torch.inf).scatter(1, tokens.unsqueeze(1), 0.0)

    return generated(model, logits_processor=[force], **options)[1]


def check(folder, student, teacher, **options):
    forward = StudentForward(base_model(student), make_args(folder, MiniLLMDistillConfig), nullcontext, fused=False)
    with forward.mixing(ALPHA, teacher):
        completions, mixed = generated(student, **options)
    own = forced(student, completions, **options), forced(teacher, completions)
    check_mixing(teacher)
    expected = (1 - ALPHA) * own[0].exp() + ALPHA * own[1].exp()
    torch.testing.assert_close(mixed.exp(), expected, rtol=1e-3, atol=1e-5)
    assert (own[0].exp() - own[1].exp()).abs().amax((0, 2)).min() > 1e-3  # the two differ at every token


@pytest.mark.parametrize("name", FAMILIES)
def test_an_architecture(tmp_path, name):
    check(tmp_path, small_model(STUDENT), small_model(name, seed=1))


@pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter(tmp_path, config):
    check(tmp_path, small_model(STUDENT), get_peft_model(small_model(STUDENT, seed=1), config).eval())


@pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS)
def test_a_student_with_an_adapter(tmp_path, config):
    check(tmp_path, get_peft_model(small_model(STUDENT), config).eval(), small_model(STUDENT, seed=1))


@pytest.mark.parametrize("name", ["MambaForCausalLM", "OpenAIGPTLMHeadModel", "Qwen3_5ForCausalLM"])
def test_a_student_of_another_family(tmp_path, name):
    """Which hands its forward no mask, every token again, or positions of its own."""
    check(tmp_path, small_model(name), small_model(STUDENT, seed=1))


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"use_cache": False}], ids=["static", "none"])
def test_a_student_with_another_cache(tmp_path, options):
    check(tmp_path, small_model(STUDENT), small_model(STUDENT, seed=1), **options)


@pytest.mark.parametrize("name", sorted(WITHOUT_CACHE))
def test_a_teacher_without_a_cache_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"no cache of what it has read. Turn that off: `teacher_mixed_alpha=0`"):
        check_mixing(small_model(name, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(model_classes().keys() - {*FAMILIES, *WITHOUT_CACHE, *NO_ORACLE, *NOT_SMALL}))
def test_every_other_architecture(tmp_path, name):
    check(tmp_path, small_model(STUDENT), small_model(name, seed=1))


@pytest.mark.parametrize(
    ("name", "parameters"),
    {
        "_prepare_position_ids_for_generation": ["self", "inputs_tensor", "model_kwargs"],
        "_supports_logits_to_keep": ["self"],
        "_update_model_kwargs_for_generation": ["self", "outputs", "model_kwargs", "is_encoder_decoder"],
        "prepare_inputs_for_generation": ["self", "input_ids", "next_sequence_length"],
    }.items(),
)
def test_steps_of_generate(name, parameters):
    message = f"transformers changed `{name}`: adapt trl_cmdp/trainers/engine/mixture.py, then this test."
    assert list(inspect.signature(getattr(GenerationMixin, name)).parameters)[: len(parameters)] == parameters, message
