"""Every PEFT method, on attention, head and embeddings: counted exactly, or refused by name."""

import inspect

import pytest
import torch
from helpers import VOCAB, make_model, make_teacher, make_trainer
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from trl_cmdp.core import token_divergence
from trl_cmdp.evaluation import Rollout, score_rollouts
from trl_cmdp.teachers import AdapterTeacher, LocalTeacher, lm_head


METHODS = {method.value: config_class for method, config_class in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
TARGETS = {"attention": ["q_proj", "v_proj"], "head": ["lm_head"], "embeddings": ["embed_tokens"]}
ON_NO_MODULES = {"ADAPTION_PROMPT", "CARTRIDGE", "CPT", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"}
# Of any method those arguments are given that its config has, and of these methods others.
ARGUMENTS = {"r": 4, "rank": 4, "num_virtual_tokens": 3, "n_frequency": 20, "vector_length": 4, "num_vectors": 16}
ARGUMENTS |= {"block_size": 4, "group_size": 4, "total_step": 10}
OTHERS = {
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 1, "target_modules": None},
    "BOFT": {"boft_block_size": 4},
    "CPT": {"cpt_token_ids": [4, 5, 6], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 2]},
    "IA3": {"feedforward_modules": []},
    "OFT": {"r": 0, "oft_block_size": 4},
    "TRAINABLE_TOKENS": {"token_indices": [5, 6]},
}
# What takes more than token ids and an attention mask, or mixes the rows of a batch.
REFUSED = {"LILY", "MULTITASK_PROMPT_TUNING", "POLY", "SHADOW"}
# What needs scikit-learn, or adapters on disk.
NOT_BUILT = {"ADAMSS", "XLORA"}
NOT_SUPPORTED = (ImportError, NotImplementedError, TypeError, ValueError)
ROLLOUTS = [Rollout("", "", [5, 9], [6, 5, 11, 3]), Rollout("", "", [4, 8, 7, 12, 6, 5], [5, 1])]


def adapted(method: str, where: str, **kwargs) -> PeftModel:
    """A student with a random adapter. Raises one of `NOT_SUPPORTED` where PEFT has none."""
    known = inspect.signature(METHODS[method]).parameters
    asked = {"target_modules": TARGETS[where], **ARGUMENTS, **OTHERS.get(method, {}), **kwargs}
    arguments = {name: value for name, value in asked.items() if name in known and value is not None}
    config = METHODS[method](task_type="CAUSAL_LM", **arguments)
    return randomise(get_peft_model(make_model(spread=0.3, hidden_size=16), config))


@torch.no_grad()
def randomise(model: PeftModel) -> PeftModel:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model.eval()


@torch.no_grad()
def own_costs(student: torch.nn.Module, teacher: torch.nn.Module) -> list[torch.Tensor]:
    """Costs of each rollout alone, from the logits of both models' own forward."""
    costs = []
    for rollout in ROLLOUTS:
        input_ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        predicting = slice(-len(rollout.completion_ids) - 1, -1)
        logits = [model(**inputs).logits[0, predicting].double() for model in (student, teacher)]
        costs.append(token_divergence(*logits).float())
    return costs


def assert_scored(student: torch.nn.Module, teacher: torch.nn.Module, expected: list[torch.Tensor]) -> None:
    torch.testing.assert_close(score_rollouts(ROLLOUTS, student, teacher), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - ON_NO_MODULES - NOT_BUILT))
def test_as_student_and_as_teacher(method):
    """On attention and head, and on embeddings where PEFT itself has it."""
    check(adapted(method, "attention"), method)
    check(adapted(method, "head"), method)
    try:
        on_embeddings = adapted(method, "embeddings")
    except NOT_SUPPORTED:
        return
    check(on_embeddings, method)


@pytest.mark.parametrize("method", sorted(NOT_BUILT))
def test_what_cannot_be_built_here(method):
    with pytest.raises(NOT_SUPPORTED):
        adapted(method, "attention")


@pytest.mark.parametrize("method", sorted(ON_NO_MODULES))
def test_prompts_and_prefixes(method):
    check(adapted(method, "attention"), method)


def check(model: PeftModel, method: str) -> None:
    plain = make_teacher().eval()
    if method in REFUSED:
        for student, teacher in ((model, plain), (plain, model)):
            with pytest.raises(ValueError, match=method):
                score_rollouts(ROLLOUTS, student, teacher)
        return
    assert_scored(model, plain, own_costs(model, plain))
    assert_scored(plain, model, own_costs(plain, model))
    assert torch.cat(score_rollouts(ROLLOUTS, model, model)).abs().max() < 1e-5


@pytest.mark.parametrize("method", ["LORA", "OFT", "IA3", "LOHA", "BOFT"])
def test_an_adapter_on_the_head_is_its_merged_model(method):
    model, plain = adapted(method, "head"), make_teacher().eval()
    costs = score_rollouts(ROLLOUTS, model, plain), score_rollouts(ROLLOUTS, plain, model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(costs[0], own_costs(merged, plain), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(costs[1], own_costs(plain, merged), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(costs[0][0], own_costs(make_model(spread=0.3, hidden_size=16), plain)[0], rtol=0.05)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 6]),
        TrainableTokensConfig(token_indices=[5, 6]),
    ],
    ids=["lora", "saved", "tokens", "tokens-alone"],
)
def test_tied_embeddings(config):
    model = make_model(spread=0.3)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    student, plain = randomise(get_peft_model(model, config)), make_teacher().eval()
    assert_scored(student, plain, own_costs(student, plain))
    assert_scored(plain, student, own_costs(plain, student))


def test_a_named_adapter_on_the_head_as_teacher():
    """The head of the base, of the teacher's adapter and of the student's, each its own."""
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    model = get_peft_model(make_model(spread=0.3), config)
    model.add_adapter("expert", config)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    randomise(model)
    model.set_adapter("expert")
    expert = own_costs(make_teacher(), model)
    model.set_adapter("default")
    with model.disable_adapter():
        base = own_costs(make_teacher(), model)
    for name, expected in (("expert", expert), ("base", base)):
        teacher = AdapterTeacher(model, None, name)
        assert_scored(make_teacher(), teacher, expected)
    assert_scored(model, make_teacher(), own_costs(model, make_teacher()))


def test_a_teachers_head_is_found_once():
    teacher = LocalTeacher(adapted("LORA", "head"))
    assert teacher.head() is teacher.head()
    assert lm_head(make_model()).vocab_size == VOCAB


class TestTraining:
    @pytest.mark.parametrize(
        "config",
        [
            LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True),
            LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["lm_head.weight"]),
        ],
        ids=["tied", "parameters"],
    )
    def test_an_adapter_on_the_head_is_refused(self, tmp_path, config):
        """TRL's loss reads the head's weight without it, and refuses only those in `target_modules`."""
        model = make_model()
        model.config.tie_word_embeddings = True
        model.tie_weights()
        with pytest.raises(ValueError, match=r"lm_head|head"):
            make_trainer(tmp_path, model=get_peft_model(model, config), teacher_model=make_teacher())

    def test_an_adapter_that_mixes_rows_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="LILY"):
            make_trainer(tmp_path, model=adapted("LILY", "attention"), teacher_model=make_teacher())
