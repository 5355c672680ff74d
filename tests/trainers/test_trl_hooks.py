"""The private parts of TRL that the trainers touch are still where and what they expect."""

import inspect

import pytest
import torch
import trl.trainer.utils
from helpers import length_reward, make_args, make_dataset, make_model, make_tokenizer, make_trainer
from trl import GRPOConfig, GRPOTrainer
from trl.models import utils as model_utils
from trl.trainer import utils as trainer_utils


HOOKS = {
    "_calculate_rewards": "(self, inputs, prompts, completions, completion_ids_list)",
    "_generate_and_score_completions": "(self, inputs)",
    "_generate_single_turn": "(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False)",
    "_compute_loss": "(self, model, inputs)",
    "_prepare_inputs": "(self, generation_batch)",
    "_get_train_sampler": "(self, dataset=None)",
    "training_step": "(self, model, inputs, num_items_in_batch)",
    "_get_grad_norm": "(self, model, grad_norm=None)",
    "_save_checkpoint": "(self, model, trial)",
    "_save_rng_state": "(self, output_dir)",
    "train": "(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None)",
    "_load_optimizer_and_scheduler": "(self, checkpoint)",
    "_get_output_dir": "(self, trial)",
    "_push_from_checkpoint": "(self, checkpoint_folder)",
    "create_model_card": "(self, model_name=None, dataset_name=None, tags=None)",
    "log": "(self, logs, start_time=None)",
}
IMPORTS = {
    (model_utils, "disable_gradient_checkpointing"): "(model, gradient_checkpointing_kwargs=None)",
    (model_utils, "prepare_deepspeed"): "(model, accelerator)",
    (trainer_utils, "get_config_model_id"): "(config)",
    (trainer_utils, "maybe_gather_lm_head_ctx"): "(*params)",
}
ATTRIBUTES = {
    "_metrics": dict,
    "_logs": dict,
    "_step": int,
    "_buffered_inputs": type(None),
    "_last_world_entropy": float,
    "_tokenizer": object,
    "_tag_names": list,
    "_name": str,
    "_paper": dict,
    "beta": float,
    "entropy_coef": float,
    "epsilon_high": float,
    "is_deepspeed_enabled": bool,
    "loss_type": str,
    "max_completion_length": int,
    "model_wrapped": torch.nn.Module,
    "use_adaptive_entropy": bool,
    "use_transformers_continuous_batching": bool,
    "use_vllm": bool,
    "chat_template": (str, type(None)),
    "chat_template_kwargs": dict,
    "eos_token_ids": list,
    "num_generations": int,
    "num_iterations": int,
    "num_generations_eval": int,
    "reward_func_names": list,
    "reward_funcs": list,
    "reward_weights": torch.Tensor,
    "scale_rewards": str,
    "temperature": float,
}


def moved(what: str, where: str) -> str:
    return f"TRL moved or changed {what}: adapt {where} in trl_cmdp/trainers, then this test."


def signature(function) -> str:
    """Signature without annotations, which TRL edits freely."""
    parameters = inspect.signature(inspect.unwrap(function)).parameters.values()
    return str(inspect.Signature([p.replace(annotation=p.empty) for p in parameters]))


@pytest.mark.parametrize(
    ("owner", "name", "expected"),
    [
        *((GRPOTrainer, name, expected) for name, expected in HOOKS.items()),
        *((module, name, expected) for (module, name), expected in IMPORTS.items()),
    ],
    ids=lambda value: value if isinstance(value, str) and "(" not in value else "",
)
def test_signature(owner, name, expected):
    assert hasattr(owner, name), moved(f"`{owner.__name__}.{name}`", f"`{name}`")
    assert signature(getattr(owner, name)) == expected, moved(f"`{owner.__name__}.{name}`", f"`{name}`")


def test_forward_redirection():
    """Called as `(wrapper_module, original_module, method, *args, **kwargs)`."""
    redirection = getattr(model_utils, "_ForwardRedirection", None)
    assert redirection is not None, moved("`_ForwardRedirection`", "`LocalTeacher`")
    names = list(inspect.signature(redirection.__call__).parameters)
    assert names[:4] == ["self", "wrapper_module", "original_module", "method"], moved(
        "`_ForwardRedirection.__call__`", "`LocalTeacher`"
    )


@pytest.fixture(scope="module")
def plain_trainer(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("plain"), GRPOTrainer, steps_per_generation=2)


@pytest.fixture(scope="module")
def generation_batch(plain_trainer):
    plain_trainer.model.train()
    rows = [dict(plain_trainer.train_dataset[0]) for _ in range(8)]
    return plain_trainer._generate_and_score_completions(rows)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attribute(plain_trainer, name):
    assert hasattr(plain_trainer, name), moved(f"`GRPOTrainer.{name}`", "its use")
    assert isinstance(getattr(plain_trainer, name), ATTRIBUTES[name]), moved(f"`GRPOTrainer.{name}`", "its use")


def test_logs_and_metrics(plain_trainer, generation_batch):
    """Our advantages replace GRPO's in `_logs`; our columns go beside; the zero-variance metric is overwritten."""
    message = moved("`_logs` or `_metrics`", "`_log_rollouts`")
    assert len(plain_trainer._logs["advantages"]) == 8, message
    assert {"prompt", "completion", "rewards", "extra"} <= plain_trainer._logs.keys(), message
    assert plain_trainer._logs["extra"]["cost"].maxlen == plain_trainer.args.generation_batch_size, message
    assert set(plain_trainer._metrics) == {"train", "eval"}, message
    assert len(plain_trainer._metrics["train"]["frac_reward_zero_std"]) == 1, message


def test_generation_batch(generation_batch):
    """What scoring reads and what the loss is given."""
    message = moved("the output of `_generate_and_score_completions`", "`_generate_and_score_completions`")
    for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"):
        assert generation_batch[name].dim() == 2, message
        assert len(generation_batch[name]) == 8, message
    assert generation_batch["advantages"].shape == (8,), message
    assert generation_batch["num_items_in_batch"].dim() == 0, message
    assert "tool_mask" not in generation_batch, message


def test_extra_tensors_and_lists_survive_shuffle_and_split():
    """Weights (a tensor) and teacher states (a list of tensors) ride in the batch, row by row."""
    rows = torch.arange(6)
    batch = {
        "prompt_ids": rows,
        "divergence_weights": rows.unsqueeze(1),
        "teacher_hidden": [row.view(1) for row in rows],
    }
    shuffled = trl.trainer.utils.shuffle_sequence_dict(batch)
    for part in trl.trainer.utils.split_tensor_dict(shuffled, 2):
        ids = part["prompt_ids"].tolist()
        message = moved("`split_tensor_dict`", "`teacher_hidden`")
        assert part["divergence_weights"].squeeze(1).tolist() == ids, message
        assert [hidden.item() for hidden in part["teacher_hidden"]] == ids, message


def test_fused_forward():
    """
    The student's forward returns log-probabilities at the trainer's temperature, and never logits. A hook on
    `base_model` sees the backbone's last hidden state of that one forward.
    """
    model = make_model(spread=0.6)
    input_ids = torch.tensor([[2, 3, 4, 5]])
    logits = model(input_ids=input_ids).logits
    trl.trainer.utils.add_fused_lm_head(model, temperature=0.5, outputs=("log_probs", "entropy"))
    seen = []
    model.base_model.register_forward_hook(lambda module, inputs, output: seen.append(output.last_hidden_state))
    outputs = model(input_ids=input_ids, labels=input_ids, fused_lm_head=True)
    expected = (logits[:, :-1] / 0.5).log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    message = moved("`add_fused_lm_head`", "`StudentForward`")
    torch.testing.assert_close(outputs.log_probs, expected, msg=lambda text: f"{message}\n{text}")
    assert outputs.entropy.shape == outputs.log_probs.shape, message
    assert "forward" in vars(model), message  # an instance attribute, which is what we wrap
    assert [tuple(hidden.shape) for hidden in seen] == [(1, 4, 8)], message


def test_accumulation_steps_of_the_window(tmp_path):
    """`current_gradient_accumulation_steps` is set by the time the loss is computed."""
    seen = []

    class Spy(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            seen.append(self.current_gradient_accumulation_steps)
            return super()._compute_loss(model, inputs)

    args = make_args(tmp_path, GRPOConfig, gradient_accumulation_steps=3, max_steps=1)
    Spy(make_model(), length_reward, args, make_dataset(), processing_class=make_tokenizer()).train()
    assert seen == [3, 3, 3], moved("`current_gradient_accumulation_steps`", "`_policy_token_weight`")
