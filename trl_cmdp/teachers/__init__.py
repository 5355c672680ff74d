"""Teachers, one file per backend, and what the divergence needs of any model."""

from .adapter import AdapterTeacher
from .heads import LMHead, base_model, head_divergence, head_log_probs, last_hidden_state, lm_head
from .local import LocalTeacher, check_vocabulary, load_teacher


Teacher = LocalTeacher | AdapterTeacher

__all__ = [
    "AdapterTeacher",
    "LMHead",
    "LocalTeacher",
    "Teacher",
    "base_model",
    "check_vocabulary",
    "head_divergence",
    "head_log_probs",
    "last_hidden_state",
    "lm_head",
    "load_teacher",
]
