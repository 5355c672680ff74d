"""Teachers, one file per backend, and what the divergence needs of any model."""

from .heads import LMHead, base_model, head_divergence, head_log_probs, last_hidden_state, lm_head
from .local import check_vocabulary, load_teacher


__all__ = [
    "LMHead",
    "base_model",
    "check_vocabulary",
    "head_divergence",
    "head_log_probs",
    "last_hidden_state",
    "lm_head",
    "load_teacher",
]
