"""
What makes a run this run and no other. Every checkpoint holds it, and another run's checkpoint is not resumed from.
docs/resuming.md says of each part what happens when it differs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from trl import GRPOConfig

from ...core.fingerprint import fingerprint, fingerprint_of_rows, fingerprint_of_weights, plain
from .guards import RefusedRun


REWARDS = "reward_functions"  # may differ, with a warning: an error in one is a reason to resume with another
_MOST_ROWS = 4096  # of the data that are looked at, spread over all

# Every argument decides the weights but these: where things are and what they are called; how long the run is; what is
# logged, evaluated, saved and pushed; on which devices, in which pieces and by which kernels it is computed. The layout
# of batches has a warning of its own. Student, teacher and data are known by what they hold, whatever they are called.
_FREE_PREFIXES = (
    *("activation_checkpointing", "dataloader_", "ddp_", "do_", "eval_", "fsdp", "gradient_checkpointing", "hub_"),
    *("include_", "liger_", "log_", "logging_", "push_to_hub", "save_", "teacher_hidden_", "teacher_model_"),
    *("torch_", "trackio_", "use_transformers_", "vllm_"),
)
_FREE = {
    *("output_dir", "run_name", "project", "model_init_kwargs", "trust_remote_code", "teacher_adapter_name"),
    *("resume_from_checkpoint", "overwrite_output_dir", "resume_with_changes", "ignore_data_skip"),
    *("max_steps", "num_train_epochs"),
    *("report_to", "disable_tqdm", "debug", "skip_memory_metrics", "num_completions_to_print", "prediction_loss_only"),
    *("per_device_eval_batch_size", "num_generations_eval", "batch_eval_metrics", "load_best_model_at_end"),
    *("metric_for_best_model", "greater_is_better", "tolerated_violation_rate", "enable_jit_checkpoint"),
    *("restore_callback_states_from_checkpoint", "label_names", "length_column_name", "remove_unused_columns"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations"),
    *("num_generations", "generation_batch_size", "auto_find_batch_size"),
    *("use_cpu", "tf32", "use_cache", "use_liger_kernel", "full_determinism", "accelerator_config", "local_rank"),
    *("deepspeed", "parallelism_config", "ds3_gather_for_generation", "cache_implementation", "divergence_memory_mb"),
    *("transformers_continuous_batching_config", "teacher_offload"),
}
_DECIDE = ("dataloader_drop_last", "vllm_importance_sampling")  # prefixes of exceptions


@dataclass(frozen=True)
class RunIdentity:
    """
    What a run is compared by.

    Args:
        trainer (`str`):
            Name of its class, for messages.
        parts (`dict[str, Any]`):
            Each part, as JSON has it.
        meant (`Sequence[str]`):
            Names of parts that may differ.
    """

    trainer: str
    parts: dict[str, Any]
    meant: Sequence[str] = ()

    def __post_init__(self):
        unknown = sorted(set(self.meant) - self.parts.keys())
        if unknown:
            raise RefusedRun(
                f"`resume_with_changes` names {', '.join(map(repr, unknown))}, which a checkpoint is not compared by: "
                f"it may name {', '.join(sorted(self.parts))}."
            )

    def differences(self, found: Mapping[str, Any]) -> str | None:
        """What differs in the run of a checkpoint, `None` if it is this run."""
        differing = [
            name
            for name in self.parts
            if name in found and found[name] != self.parts[name] and name not in (REWARDS, *self.meant)
        ]
        if not differing:
            return None
        listed = "; ".join(f"`{name}` {found[name]!r}, now {self.parts[name]!r}" for name in differing)
        return f"it was not written by {self.trainer} with these arguments, but by another run: {listed}"


def settings_of(args: GRPOConfig) -> dict[str, Any]:
    """The arguments that decide the weights."""
    return {
        name: value
        for name, value in plain(args.to_dict()).items()
        if name.startswith(_DECIDE) or not (name in _FREE or name.startswith(_FREE_PREFIXES))
    }


def student_fingerprint(model: torch.nn.Module) -> str:
    """Of a student before training. Of one that trains an adapter: of its base, and of how the adapter is made."""
    if not is_peft_model(model):
        return fingerprint_of_weights(model.named_parameters())
    # The adapter's own weights may be drawn anew at each start. Those of a resumed run are the checkpoint's.
    base = fingerprint_of_weights((name, one) for name, one in model.named_parameters() if not one.requires_grad)
    adapter = model.peft_config[model.active_adapter].to_dict()
    named = {"base_model_name_or_path", "revision", "inference_mode", "peft_version"}
    return fingerprint([base, {name: value for name, value in adapter.items() if name not in named}])


def data_fingerprint(dataset: Any) -> str | list[str] | None:
    """Of the rows of a dataset. A stream cannot be read ahead: it is known by its columns alone."""
    if not isinstance(dataset, Dataset):
        return dataset.column_names
    count = len(dataset)
    taken = min(count, _MOST_ROWS)
    rows = dataset.with_format("arrow")[[index * count // taken for index in range(taken)]]
    return fingerprint([count, fingerprint_of_rows(rows.to_pylist())])
