"""Teachers, one file per backend, and what is read of any model."""

from ._server import EXACT_SERVER_ARGUMENTS, EXACT_SERVER_COMMAND, TeacherServer, TeacherServerError
from .adapter import AdapterTeacher
from .agreement import check_vocabulary, end_ids, stop_ids, teacher_generation_config, warn_of_another_end
from .images import OF_IMAGES, OF_TOKENS, model_inputs, take_rows, without_no_images
from .local import LocalTeacher, load_model, load_teacher, offloaded
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
from .offload import Offload
from .one_stop import OneStopTeacher, swapped
from .prompts import check_room, check_teacher_template, encode_teacher_prompts, max_length, template_tokenizer
from .quantized import allow_fast_kernel, keep_differentiable
from .readable import check_reading, check_sampling, differ, misfit, probe_rows
from .remote import RemoteTeacher
from .seeing import check_images
from .server_check import SentenceScores, check_server, checkpoint_config, score_sentence
from .server_teacher import SERVERS_READ_TEXT, ServerAnswer, ServerTeacher
from .teacher import Teacher


__all__ = [
    "EXACT_SERVER_ARGUMENTS",
    "EXACT_SERVER_COMMAND",
    "OF_IMAGES",
    "OF_TOKENS",
    "SERVERS_READ_TEXT",
    "AdapterTeacher",
    "LeftAligned",
    "LocalTeacher",
    "Offload",
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
    "check_images",
    "check_reading",
    "check_room",
    "check_sampling",
    "check_server",
    "check_teacher_template",
    "check_vocabulary",
    "checkpoint_config",
    "differ",
    "encode_teacher_prompts",
    "end_ids",
    "is_plain_linear",
    "keep_differentiable",
    "last_hidden_state",
    "lm_head",
    "load_model",
    "load_teacher",
    "max_length",
    "misfit",
    "model_inputs",
    "offloaded",
    "predicting",
    "probe_rows",
    "read_head",
    "score_sentence",
    "stop_ids",
    "swapped",
    "take_rows",
    "teacher_generation_config",
    "template_tokenizer",
    "warn_of_another_end",
    "without_no_images",
]
