"""Judges that compare the reasoning of two solutions."""

from ._client import ChatEndpoint, JudgeError, NoReplyError
from .llm import LLMJudge
from .process import ProcessJudge, ProcessVerdict, process_verdict, valid_steps
from .records import Judge, Judgement, Pair, read_judgements, write_judgements


__all__ = [
    "ChatEndpoint",
    "Judge",
    "JudgeError",
    "Judgement",
    "LLMJudge",
    "NoReplyError",
    "Pair",
    "ProcessJudge",
    "ProcessVerdict",
    "process_verdict",
    "read_judgements",
    "valid_steps",
    "write_judgements",
]
