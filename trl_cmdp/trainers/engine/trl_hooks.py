"""
The private parts of TRL that the trainers override, call or read, in one table.

A release that moves one is refused by name when a trainer with a teacher is built. What else is expected of them is
tested in tests/trainers/test_trl_hooks.py.
"""

import inspect
from importlib import import_module
from importlib.metadata import version
from types import MethodType

import torch
from trl import GRPOTrainer
from trl.models import utils as model_utils
from trl.trainer import utils as trainer_utils

from ...core.kernels.choice import kernel_of


TESTED_TRL = ("1.15.0", "1.16.0")  # the lowest supported, and the newest that the tests have run on

# Signatures of the methods that are overridden or called, and of the functions that are called.
METHODS = {
    "_calculate_rewards": "(self, inputs, prompts, completions, completion_ids_list)",
    "_compute_loss": "(self, model, inputs)",
    "_generate_and_score_completions": "(self, inputs)",
    "_generate": "(self, prompts)",
    "_generate_single_turn": "(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False)",
    "_get_grad_norm": "(self, model, grad_norm=None)",
    "_get_output_dir": "(self, trial)",
    "_get_train_sampler": "(self, dataset=None)",
    "_load_best_model": "(self)",
    "_load_from_checkpoint": "(self, resume_from_checkpoint, model=None)",
    "_load_optimizer_and_scheduler": "(self, checkpoint)",
    "_push_from_checkpoint": "(self, checkpoint_folder)",
    "_save_checkpoint": "(self, model, trial)",
    "_save_rng_state": "(self, output_dir)",
    "_tokenize_prompts": "(self, prompts)",
    "create_model_card": "(self, model_name=None, dataset_name=None, tags=None)",
    "log": "(self, logs, start_time=None)",
    "save_model": "(self, output_dir=None, _internal_call=False)",
    "training_step": "(self, model, inputs, num_items_in_batch)",
    "train": "(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None)",
}
FUNCTIONS = {
    (model_utils, "_ForwardRedirection.__call__"): "(self, wrapper_module, original_module, method, *args, **kwargs)",
    (model_utils, "disable_gradient_checkpointing"): "(model, gradient_checkpointing_kwargs=None)",
    (model_utils, "prepare_deepspeed"): "(model, accelerator)",
    (trainer_utils, "get_config_model_id"): "(config)",
    (trainer_utils, "maybe_gather_lm_head_ctx"): "(*params)",
    (trainer_utils, "split_pixel_values_by_grid"): "(batch)",
    (trainer_utils, "unsplit_pixel_values_by_grid"): "(batch)",
}
# What teachers/kernels.py calls where the device's kernels are TRL's. Without Triton they cannot be imported in TRL 1.15.
KERNELS = {
    ("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction.forward"): (
        "(ctx, student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, beta, "
        "temperature=1.0, student_logit_scale=1.0, student_final_logit_softcapping=None, teacher_logit_scale=1.0, "
        "teacher_final_logit_softcapping=None)"
    ),
    ("trl.kernels.chunked_logprob", "ChunkedLogProbFunction.forward"): (
        "(ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0, "
        "outputs=('entropy', 'log_sum_sq_probs', 'mean_logits', 'is_top1'))"
    ),
}
# Attributes of a trainer that are read, or set: their types.
ATTRIBUTES = {
    "_metrics": dict,
    "_logs": dict,
    "_step": int,
    "_buffered_inputs": (list, type(None)),
    "_is_vlm": bool,
    "_last_world_entropy": float,
    "_tokenizer": object,
    "_tag_names": list,
    "_name": str,
    "_paper": dict,
    "_get_per_token_logps_and_entropies": MethodType,  # all that it is given is handed on, and so to the next
    "_run_epoch": MethodType,
    "chat_template": (str, type(None)),
    "chat_template_kwargs": dict,
    "entropy_coef": float,
    "eos_token_ids": list,
    "is_deepspeed_enabled": bool,
    "loss_type": str,
    "max_completion_length": int,
    "model_wrapped": torch.nn.Module,
    "num_generations": int,
    "num_generations_eval": int,
    "num_iterations": int,
    "reward_func_names": list,
    "reward_funcs": list,
    "reward_weights": torch.Tensor,
    "scale_rewards": str,
    "temperature": float,
    "tools": list,
    "use_adaptive_entropy": bool,
    "use_transformers_continuous_batching": bool,
    "use_vllm": bool,
}


def check_trl_hooks(trainer: GRPOTrainer) -> None:
    """Refuse a TRL in which something of the table is gone, or takes other arguments."""
    hooks = {(GRPOTrainer, name): expected for name, expected in METHODS.items()} | FUNCTIONS
    if kernel_of(trainer.accelerator.device) == "trl":
        try:
            hooks |= {(import_module(module), name): expected for (module, name), expected in KERNELS.items()}
        except ImportError as error:
            raise moved_hooks(str(error)) from error
    moved = []
    for (owner, name), expected in hooks.items():
        found = _signature(owner, name)
        # A function that is only called may take more.
        if found != expected and not (owner is not GRPOTrainer and found.startswith(f"{expected[:-1]}, ")):
            moved.append(f"`{owner.__name__}.{name}` is {found}, not {expected}")
    moved += [f"`GRPOTrainer` has no `{name}`" for name in sorted(ATTRIBUTES.keys() - set(dir(trainer)))]
    if moved:
        raise moved_hooks("; ".join(moved))


def moved_hooks(what: str) -> ImportError:
    """The error of a TRL that has moved something."""
    return ImportError(
        f"TRL {version('trl')} has moved what trl-cmdp builds on: {what}. It was tested with TRL "
        f"{' and '.join(TESTED_TRL)}: install one of these (`pip install trl=={TESTED_TRL[-1]}`), or a newer trl-cmdp."
    )


def _signature(owner: object, name: str) -> str:
    """Signature without annotations, which TRL edits freely."""
    for part in name.split("."):
        owner = getattr(owner, part, None)
    if owner is None:
        return "gone"
    parameters = inspect.signature(inspect.unwrap(owner)).parameters.values()
    return str(inspect.Signature([p.replace(annotation=p.empty) for p in parameters]))
