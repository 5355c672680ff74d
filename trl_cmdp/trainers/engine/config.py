"""Configuration fields that every trainer with a teacher shares."""

import copy
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

import torch
from transformers.utils import is_torch_xla_available
from trl import GRPOConfig

from ..._defaults import COST_LIMIT, COST_SCOPE, CostScope
from ..._docstrings import help_of_fields
from ..._messages import without_secrets
from ...core import Comparison


_MAY_BE_INFINITE = {"max_grad_norm", "delta", "epsilon_high", "off_policy_mask_threshold"} | {
    f"vllm_importance_sampling_{bound}" for bound in ("cap", "clip_max")
}

_logger = logging.getLogger(__name__)


def _floats(value: Any) -> Iterator[float]:
    """Every float in a value, and in the lists and dictionaries of it."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict | list | tuple):
        for element in value.values() if isinstance(value, dict) else value:
            yield from _floats(element)


def help_from_docstring(config: type) -> type:
    """Gives each field of a config class, as its help on the command line, what the class's docstring says of it."""
    for name, text in help_of_fields(config.__doc__).items():
        if name in config.__annotations__:
            own = config.__dataclass_fields__[name]
            own.metadata = {**own.metadata, "help": text.replace("%", "%%")}
    return config


@help_from_docstring
@dataclass(kw_only=True)
class DistillConfig(GRPOConfig):
    """
    Base of the configurations: [`~trl.GRPOConfig`] and the teacher's settings. All new fields are keyword-only.

    Parameters:
        teacher_model_init_kwargs (`dict[str, Any]` or `str`, *optional*):
            Keyword arguments of `from_pretrained` for a teacher given as a path or hub id. `dtype` defaults to
            `"auto"`, the checkpoint's own, and `use_safetensors` to true. `trust_remote_code` holds for the teacher
            only if given here.
        teacher_model_revision (`str`, *optional*):
            Revision of the teacher on the Hub.
        teacher_adapter_name (`str`, *optional*):
            Makes the student's own base model its teacher, at no second copy of the weights: `"base"` with every
            adapter off, or the name of another adapter loaded on the student's `PeftModel`. Takes the place of
            `teacher_model`.
        teacher_model_server_url (`str`, *optional*):
            Address of a vLLM server that runs the teacher (docs/remote_teachers.md). A pooling server gives the exact
            divergence; a completion server only log-probabilities. `teacher_model`, if given, is then the path or hub id
            of the checkpoint that the server runs, for its tokenizer and head; by default what the server names.
        teacher_model_server_api_key (`str`, *optional*):
            Key of that server. Sent to it alone, and never logged or saved. The commands read it from
            `TRL_CMDP_TEACHER_API_KEY` in the environment unless it is given.
        teacher_model_server_timeout (`float`, *optional*, defaults to `120.0`):
            Seconds that the server may stay silent.
        teacher_model_server_max_wait (`float`, *optional*, defaults to `600.0`):
            Seconds that training waits for a server that is gone before it stops with an error.
        teacher_model_server_top_k (`int`, *optional*, defaults to `0`):
            With a completion server, log `teacher/divergence_lower_bound` from the teacher's k likeliest tokens.
        teacher_eos_token (`str`, *optional*):
            Token with which the teacher ends a turn, where the student ends it with another (`"<|im_end|>"` of an instruct
            teacher over a base student's `"<|endoftext|>"`). The teacher's probabilities of the two are swapped, so that
            both are one stop action.
        teacher_beta (`float`, *optional*, defaults to `1.0`):
            Divergence D: `1.0` is reverse KL(student‖teacher), `0.0` forward KL(teacher‖student), generalised JSD
            between. The convention of TRL's `DistillationConfig.beta`.
        teacher_prob_floor (`float`, *optional*, defaults to `0.0`):
            ε of the mixture of the teacher with the uniform distribution, which bounds the cost by log(V/ε).
        divergence_memory_mb (`float`, *optional*):
            Memory, in MiB per process, that vocabulary-sized tiles of the divergence may take. By default 256, and on a
            CUDA device an eighth of the free memory (docs/kernels.md).
        teacher_hidden_memory_mb (`float`, *optional*, defaults to `256`):
            Memory, in MiB per process, in which the teacher's hidden states are kept from scoring to the loss. Where
            they do not fit they are computed once more; the loss is the same.
        teacher_hidden_offload (`bool`, *optional*, defaults to `False`):
            Keep them in (pinned) host memory.
        teacher_offload (`bool`, *optional*, defaults to `False`):
            Keep the weights of a teacher in this process in (pinned) host memory while the student generates and learns;
            for scoring they are copied to the device. Its head stays there. Of several teachers one at a time is on the
            device. On a CPU this saves nothing.
        cost_limit (`float`, *optional*, defaults to `0.35`):
            Limit d on the cost of a rollout, in nats: per token for `cost_scope` `"mean"` and `"worst_prefix"`, per
            rollout for `"sum"`. A method without a limit of its own only measures satisfaction against it.
        cost_scope (`str`, *optional*, defaults to `"mean"`):
            Cost C of a rollout: `"mean"` of its tokens' costs, `"sum"`, or `"worst_prefix"` (largest running mean).
        tolerated_violation_rate (`float`, *optional*, defaults to `0.05`):
            Share of rollouts above the limit with which a student counts as feasible, where checkpoints are chosen by
            `metric_for_best_model="constraint/feasible_reward"`.
        hub_license (`str`, *optional*):
            Licence of the student, for its model card (`"apache-2.0"`). By default the one that the card of the model names
            which the student began as, and none where there is no such card.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Delete the checkpoints that another run has left in `output_dir` when this one begins anew. Otherwise such a
            folder is refused.
        resume_with_changes (`list[str]`, *optional*):
            Names of what is meant to differ from the run of the checkpoint that is resumed from, such as
            `["learning_rate", "teacher"]` (docs/resuming.md lists them). Any other difference is refused.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

    teacher_model_init_kwargs: dict[str, Any] | str | None = None
    teacher_model_revision: str | None = None
    teacher_adapter_name: str | None = None
    teacher_model_server_url: str | None = None
    teacher_model_server_api_key: str | None = field(default=None, repr=False)
    teacher_model_server_timeout: float = 120.0
    teacher_model_server_max_wait: float = 600.0
    teacher_model_server_top_k: int = 0
    teacher_eos_token: str | None = None
    teacher_beta: float = 1.0
    teacher_prob_floor: float = 0.0
    divergence_memory_mb: float | None = None
    teacher_hidden_memory_mb: float = 256
    teacher_hidden_offload: bool = False
    teacher_offload: bool = False

    cost_limit: float = COST_LIMIT
    cost_scope: CostScope = COST_SCOPE
    tolerated_violation_rate: float = 0.05

    hub_license: str | None = None
    overwrite_output_dir: bool = False
    resume_with_changes: list[str] | None = None

    def __post_init__(self):
        without_gpu = not (self.use_cpu or torch.accelerator.is_available() or is_torch_xla_available())
        if without_gpu:
            self.use_cpu = True
            self.bf16 = bool(self.bf16)  # TRL's default is for GPUs
        super().__post_init__()
        if without_gpu and self.process_index == 0:
            dtype = "float16" if self.fp16 else "bfloat16" if self.bf16 else "float32"
            _logger.warning(f"No GPU was found: this run uses the CPU, in {dtype}.")
        self._check_choices()
        self._check_cost_limit()
        self._check_finite()
        if not 0.0 <= self.teacher_beta <= 1.0:
            raise ValueError(
                f"`teacher_beta` must lie in [0, 1] (0 is forward KL, 1 reverse KL), got {self.teacher_beta}."
            )
        self._check_below_one("teacher_prob_floor", "tolerated_violation_rate")
        self._check_positive(
            "teacher_hidden_memory_mb",
            "teacher_model_server_timeout",
            "teacher_model_server_max_wait",
        )
        if self.divergence_memory_mb is not None:
            self._check_positive("divergence_memory_mb")

    @property
    def comparison(self) -> Comparison:
        """What is compared with the teacher at each token."""
        return Comparison(self.teacher_beta, self.temperature, self.teacher_prob_floor)

    # What is written anywhere (logs, cards, `training_args.bin`) comes from one of these: none has the key.

    def to_dict(self) -> dict[str, Any]:
        return {**without_secrets(super().to_dict()), "teacher_model_server_api_key": None}

    def __str__(self) -> str:
        return super(DistillConfig, copy.copy(self)).__str__()

    def __getstate__(self) -> dict[str, Any]:
        # A token may stand in `model_init_kwargs`.
        state = {name: without_secrets(value) if type(value) is dict else value for name, value in vars(self).items()}
        return {**state, "teacher_model_server_api_key": None, "hub_token": None}

    def _check_cost_limit(self) -> None:
        self._check_positive("cost_limit")

    def _check_finite(self) -> None:
        """No number is NaN, and none infinite but a bound of which infinity makes none."""
        for own in fields(self):
            value = getattr(self, own.name)
            for number in _floats(value):
                if math.isnan(number) or (math.isinf(number) and own.name not in _MAY_BE_INFINITE):
                    raise ValueError(f"`{own.name}` must be finite, got {value}.")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")

    def _check_not_negative(self, *names: str) -> None:
        for name in names:
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")

    def _check_below_one(self, *names: str) -> None:
        for name in names:
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"`{name}` must lie in [0, 1), got {getattr(self, name)}.")

    def _check_choices(self) -> None:
        """A field of a `Literal` type holds one of its values."""
        for own in fields(self):
            if get_origin(own.type) is Literal and getattr(self, own.name) not in get_args(own.type):
                raise ValueError(
                    f"`{own.name}` must be one of {', '.join(map(repr, get_args(own.type)))}, got "
                    f"{getattr(self, own.name)!r}."
                )
