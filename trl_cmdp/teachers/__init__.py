"""Teachers, one file per backend, and what is read of any model."""

from ._server import EXACT_SERVER_ARGUMENTS, EXACT_SERVER_COMMAND, TeacherServer, TeacherServerError
from .adapter import AdapterTeacher
from .agreement import check_vocabulary, end_ids, stop_ids, teacher_generation_config, warn_of_another_end
from .local import LocalTeacher, load_teacher
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
from .remote import RemoteTeacher
from .server_check import SentenceScores, check_server, checkpoint_config, score_sentence
from .server_teacher import ServerAnswer, ServerTeacher
from .teacher import Teacher


__all__ = [
    "EXACT_SERVER_ARGUMENTS",
    "EXACT_SERVER_COMMAND",
    "AdapterTeacher",
    "LeftAligned",
    "LocalTeacher",
    "OneStopTeacher",
    "RemoteTeacher",
    "SentenceScores",
    "ServerAnswer",
    "ServerTeacher",
    "Teacher",
    "TeacherServer",
    "TeacherServerError",
    "allow_fast_kernel",
    "backbone",
    "base_model",
    "check_reading",
    "check_server",
    "check_vocabulary",
    "checkpoint_config",
    "differ",
    "end_ids",
    "is_plain_linear",
    "keep_differentiable",
    "last_hidden_state",
    "lm_head",
    "load_teacher",
    "misfit",
    "predicting",
    "probe_rows",
    "read_head",
    "score_sentence",
    "stop_ids",
    "swapped",
    "teacher_generation_config",
    "warn_of_another_end",
]
