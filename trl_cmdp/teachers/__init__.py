"""Teachers, one file per backend, and what is read of any model."""

from .adapter import AdapterTeacher
from .local import LocalTeacher, check_vocabulary, load_teacher
from .models import backbone, base_model, last_hidden_state, lm_head, predicting
from .quantized import allow_fast_kernel, keep_differentiable
from .remote import EXACT_SERVER_COMMAND, RemoteTeacher, TeacherServerError
from .server_teacher import ServerTeacher
from .teacher import Teacher


__all__ = [
    "EXACT_SERVER_COMMAND",
    "AdapterTeacher",
    "LocalTeacher",
    "RemoteTeacher",
    "ServerTeacher",
    "Teacher",
    "TeacherServerError",
    "allow_fast_kernel",
    "backbone",
    "base_model",
    "check_vocabulary",
    "keep_differentiable",
    "last_hidden_state",
    "lm_head",
    "load_teacher",
    "predicting",
]
