"""Whether a server runs the checkpoint that it is meant to run: one sentence, read by both."""

import tempfile
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from ..core import chunked_log_probs, token_divergence
from ._checkpoint import load_config, load_head
from ._server import TeacherServerError
from .remote import RemoteTeacher


_SENTENCE = "Two odd numbers add up to an even one: 3 + 5 = 8."
# Share of the spread of log-probabilities by which two implementations differ, in float32 and in half precision.
# Narrower than for a model that is read (`readable.py`): another fine-tuning of the same model is to be seen.
_ROUNDING, _HALF_ROUNDING = 0.01, 0.1


@dataclass
class SentenceScores:
    """
    What a checkpoint says of a sentence, computed by transformers on the CPU.

    Args:
        token_ids (`list[int]`):
            The sentence, T tokens.
        log_probs (`torch.Tensor`):
            Log-probabilities of every next token, of shape `(T - 1, V)` and in float32.
        dtype (`torch.dtype`):
            Dtype of the checkpoint, in which they were computed.
    """

    token_ids: list[int]
    log_probs: torch.Tensor
    dtype: torch.dtype


def checkpoint_config(model: str, revision: str | None, exact: bool) -> PretrainedConfig:
    """Config of a checkpoint that a server can run as a teacher, or a `ValueError`; its head is read if exact."""
    config = load_config(model, revision)
    if exact:
        load_head(model, config, revision)  # which the trainer will do, when the server has long been started
    return config


@torch.no_grad()
def score_sentence(model: str, config: PretrainedConfig, revision: str | None = None) -> SentenceScores:
    """
    Read a sentence with a checkpoint. Its layers are read from the disk one weight at a time, as they compute: the model
    is never in memory as a whole.

    Args:
        model (`str`):
            Local folder or hub id.
        config ([`~transformers.PretrainedConfig`]):
            Its config.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.

    Returns:
        [`SentenceScores`]: What it says.

    Raises:
        ValueError: If it has no tokenizer or its values are not finite.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
        token_ids = tokenizer(_SENTENCE)["input_ids"]
    except (OSError, ValueError) as error:
        raise ValueError(f"The tokenizer of {model!r} cannot be read ({error}). Save it beside the model.") from error
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = AutoModelForCausalLM.from_pretrained(
            model,
            revision=revision,
            dtype="auto",
            device_map=_layers_on_disk(skeleton),
            offload_folder=folder,  # for weights that transformers stores in another form than the checkpoint
            use_safetensors=True,
            trust_remote_code=False,
        )
        logits = checkpoint.eval()(torch.tensor([token_ids])).logits[0, :-1]  # (T - 1, V)
    if not logits.isfinite().all():
        raise ValueError(f"The checkpoint {model!r} gives NaN or infinite logits. Check its weights.")
    return SentenceScores(token_ids, logits.float().log_softmax(-1), checkpoint.dtype)


def _layers_on_disk(module: torch.nn.Module, prefix: str = "") -> dict[str, str]:
    """Where each part of a model is kept: lists of layers on the disk, everything else on the CPU."""
    places = {f"{prefix}{name}": "cpu" for name, _ in module.named_parameters(recurse=False)}
    for name, child in module.named_children():
        if isinstance(child, torch.nn.ModuleList):
            places[f"{prefix}{name}"] = "disk"
        elif any(isinstance(part, torch.nn.ModuleList) for part in child.modules()):
            places |= _layers_on_disk(child, f"{prefix}{name}.")
        else:
            places[f"{prefix}{name}"] = "cpu"
    return places


def check_server(teacher: RemoteTeacher, scores: SentenceScores, dtype: torch.dtype) -> float:
    """
    Compare what a server says of a sentence with its checkpoint.

    Args:
        teacher ([`RemoteTeacher`]):
            The server.
        scores ([`SentenceScores`]):
            What the checkpoint says.
        dtype (`torch.dtype`):
            Dtype that the server computes in.

    Returns:
        `float`: How far they are apart at most, in nats: the divergence over the full vocabulary of an exact server, or
        the difference of a token's log-probability.

    Raises:
        TeacherServerError: If they differ by more than rounding.
    """
    token_ids = scores.token_ids[: teacher.max_model_len - 1]
    expected = scores.log_probs[: len(token_ids) - 1]
    if teacher.head is not None:
        hidden = teacher.hidden_states([token_ids], [len(token_ids) - 1])[0]  # (T - 1, H)
        every_token = torch.arange(expected.size(1)).expand(len(hidden), -1)
        found = chunked_log_probs(hidden, teacher.head, every_token)  # (T - 1, V)
        apart = token_divergence(found, expected)
    else:
        expected = expected.gather(1, torch.tensor(token_ids[1:])[:, None]).T  # (1, T - 1)
        found = teacher.log_probs([token_ids], [len(token_ids) - 1])[0][None]
        apart = (found - expected).abs()
    rounding = _ROUNDING if scores.dtype == dtype == torch.float32 else _HALF_ROUNDING
    spread = (expected - expected.mean(-1, keepdim=True)).norm()
    if not (found - expected).norm() <= rounding * spread + 1e-4:  # NaN is none either
        raise TeacherServerError(
            f"The teacher server at {teacher.url} does not say what its checkpoint says: for {_SENTENCE!r} they are "
            f"{apart.max():.3g} nats apart. Does it run other weights, another revision, or a pooler that changes the "
            "hidden states?"
        )
    return apart.max().item()
