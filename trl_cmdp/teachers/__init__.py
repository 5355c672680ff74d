"""Teachers, one file per backend, and what the divergence needs of any model."""

from .adapter import AdapterTeacher
from .heads import (
    LMHead,
    base_model,
    head_divergence,
    head_log_probs,
    head_policy_divergence,
    head_scores,
    last_hidden_state,
    lm_head,
)
from .local import LocalTeacher, check_vocabulary, load_teacher
from .quantized import allow_fast_kernel, keep_differentiable
from .remote import EXACT_SERVER_COMMAND, RemoteTeacher, TeacherServerError


__all__ = [
    "EXACT_SERVER_COMMAND",
    "AdapterTeacher",
    "LMHead",
    "LocalTeacher",
    "RemoteTeacher",
    "TeacherServerError",
    "allow_fast_kernel",
    "base_model",
    "check_vocabulary",
    "head_divergence",
    "head_log_probs",
    "head_policy_divergence",
    "head_scores",
    "keep_differentiable",
    "last_hidden_state",
    "lm_head",
    "load_teacher",
]
