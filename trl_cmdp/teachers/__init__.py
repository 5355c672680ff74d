"""Teachers, one file per backend, and what is read of any model."""

from .adapter import AdapterTeacher
from .agreement import check_vocabulary, end_ids, stop_ids, teacher_generation_config, warn_of_another_end
from .images import OF_IMAGES, OF_TOKENS, model_inputs, take_rows, without_no_images
from .local import LocalTeacher, load_model, load_teacher
from .models import (
    LeftAligned,
    backbone,
    base_model,
    is_plain_linear,
    last_hidden_state,
    lm_head,
    predicting,
    read_head,
)
from .one_stop import OneStopTeacher, swapped
from .quantized import allow_fast_kernel, keep_differentiable
from .readable import check_reading, differ, misfit, probe_rows
from .remote import EXACT_SERVER_COMMAND, RemoteTeacher, TeacherServerError
from .seeing import check_images
from .server_teacher import SERVERS_READ_TEXT, ServerTeacher
from .teacher import Teacher


__all__ = [
    "EXACT_SERVER_COMMAND",
    "OF_IMAGES",
    "OF_TOKENS",
    "SERVERS_READ_TEXT",
    "AdapterTeacher",
    "LeftAligned",
    "LocalTeacher",
    "OneStopTeacher",
    "RemoteTeacher",
    "ServerTeacher",
    "Teacher",
    "TeacherServerError",
    "allow_fast_kernel",
    "backbone",
    "base_model",
    "check_images",
    "check_reading",
    "check_vocabulary",
    "differ",
    "end_ids",
    "is_plain_linear",
    "keep_differentiable",
    "last_hidden_state",
    "lm_head",
    "load_model",
    "load_teacher",
    "misfit",
    "model_inputs",
    "predicting",
    "probe_rows",
    "read_head",
    "stop_ids",
    "swapped",
    "take_rows",
    "teacher_generation_config",
    "warn_of_another_end",
    "without_no_images",
]
