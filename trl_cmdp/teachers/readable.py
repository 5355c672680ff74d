"""Whether a model can be scored: that what is read of it is what it says itself, and that it can read the rollouts."""

import logging
from importlib.metadata import version

import torch
from accelerate.utils import is_peft_model
from transformers import GenerationConfig

from ..core import chunked_log_probs
from .adapter import AdapterTeacher
from .local import LocalTeacher
from .models import base_model
from .quantized import keeps_outliers_apart
from .teacher import Teacher


# Share of its size by which a vector may differ and still be the same, TF32 and quantised kernels included. Half
# precision is off by 4% in models of 28 layers and 7B parameters, and by more in deeper ones.
_ROUNDING, HALF_ROUNDING = 0.01, 0.2
_MIXES_ROWS = "LILY"  # this adapter averages over all tokens of a batch
_LENGTHS = (5, 8)
_OUTLIERS = (
    "Its 8-bit layers leave unquantised what is large in any row of a batch: load it with `llm_int8_threshold=0.0` in the "
    "quantization config, or in 4 bits."
)

_logger = logging.getLogger(__name__)


@torch.no_grad()
def check_reading(role: str, module: torch.nn.Module, teacher: LocalTeacher | AdapterTeacher) -> None:
    """
    Check that a model's hidden states and head, read beside another row, give the log-probabilities that the model gives
    by itself. Adapters and architectures of which that is not so are refused by name.

    Args:
        role (`str`):
            What the model is, for the message.
        module (`torch.nn.Module`):
            The model, in eval mode.
        teacher ([`LocalTeacher`] or [`AdapterTeacher`]):
            How it is read.

    Raises:
        ValueError: If they differ.
    """
    name = _name(module)
    if _MIXES_ROWS in name:
        raise ValueError(
            f"The {role}, {name}, cannot be scored: what its adapter says of a rollout depends on the others in its batch. "
            "Use another adapter."
        )
    input_ids, attention_mask, short = probe_rows(module)
    mask = torch.zeros(2, _LENGTHS[0] - 1, dtype=torch.bool, device=input_ids.device)
    mask[0] = True
    try:
        with teacher.autocast():
            logits = module(input_ids=short, attention_mask=torch.ones_like(short)).logits
            own = logits[0, -short.size(1) : -1]  # (4, V)
            rounding = HALF_ROUNDING if computes_in_half(module, own) else _ROUNDING
        hidden, head = teacher.hidden_states(input_ids, attention_mask, mask), teacher.head()
    except (AttributeError, IndexError, RuntimeError, StopIteration, TypeError, ValueError) as error:
        raise ValueError(
            f"The {role}, {name}, cannot be scored: from token ids and an attention mask alone it gives no next-token "
            f"distributions that can be read ({type(error).__name__}: {error}). Use another model, or merge its adapter."
        ) from error
    vocab_size = min(own.size(-1), head.vocab_size)
    tokens = torch.linspace(0, vocab_size - 1, 16, device=own.device).long()
    read = chunked_log_probs(hidden, head.first(vocab_size), tokens.expand(len(hidden), -1))  # (4, 16)
    outliers = keeps_outliers_apart(module)
    if differ(read, own[:, :vocab_size].float().log_softmax(-1)[:, tokens], rounding):
        remedy = _OUTLIERS if outliers else "Use another model or adapter, or merge the adapter (`merge_and_unload`)."
        raise ValueError(
            f"The {role}, {name}, cannot be scored exactly: the log-probabilities read from its hidden states and head "
            f"are not those of the model itself, or change with what stands beside a rollout in a batch. {remedy}"
        )
    if outliers:  # other rollouts may have more of them than the rows that were tried
        _logger.warning(f"The {role}, {name}, may say another thing of a rollout beside other rollouts. {_OUTLIERS}")


@torch.no_grad()
def check_sampling(role: str, module: torch.nn.Module) -> None:
    """
    Check that a PEFT model whose adapter brings a prompt generates from the distribution that it has. With releases of
    PEFT and transformers that do not fit together the prompt is lost on the way, without a word.

    Args:
        role (`str`):
            What the model is, for the message.
        module (`torch.nn.Module`):
            The model, in eval mode. One without such an adapter is not asked.

    Raises:
        ValueError: If it generates from another distribution.
    """
    if not (is_peft_model(module) and any(config.is_prompt_learning for config in module.peft_config.values())):
        return
    _, _, short = probe_rows(module)
    length = short.size(1)
    options = {"min_new_tokens": length, "max_new_tokens": length, "do_sample": False, "pad_token_id": 0}
    config = GenerationConfig(**options, output_logits=True, return_dict_in_generate=True)
    output = module.generate(input_ids=short, attention_mask=torch.ones_like(short), generation_config=config)  # type: ignore[operator]
    generated = torch.cat(output.logits).float()  # (5, V)
    logits = module(input_ids=output.sequences, attention_mask=torch.ones_like(output.sequences)).logits
    own = logits[0, -length - 1 : -1]  # (5, V)
    rounding = HALF_ROUNDING if computes_in_half(module, own) else _ROUNDING
    if differ(generated.log_softmax(-1), own.float().log_softmax(-1), rounding):
        raise ValueError(
            f"No completions can be sampled from the {role}, {_name(module)}: with PEFT {version('peft')} and transformers "
            f"{version('transformers')} it does not generate from its own distribution. Install releases that fit "
            "together (PEFT 0.21 and transformers 5.23 do), or use an adapter that brings no prompt, as LoRA."
        )


def computes_in_half(module: torch.nn.Module, outputs: torch.Tensor) -> bool:
    """
    Whether a model's outputs, just computed, have the rounding of half precision: by autocast, by its weights, or by
    themselves. Accelerate's wrapper returns them in float32 whatever they were computed in.
    """
    dtypes = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()} | {outputs.dtype}
    return torch.is_autocast_enabled(outputs.device.type) or not dtypes <= {torch.float32, torch.float64}


def probe_rows(module: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    For a model, ids and attention mask (2, 8) of a row of five tokens, padded on the left, beside one of eight; and the
    five alone.
    """
    short, long = _LENGTHS
    # Of the head: some embeddings (Mllama) have tokens beyond it.
    device, vocab_size = next(module.parameters()).device, base_model(module).config.get_text_config().vocab_size
    input_ids = (torch.arange(2 * long, device=device) * 7 + 3).view(2, long) % vocab_size
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, : long - short] = 0
    return input_ids, attention_mask, input_ids[:1, long - short :]


def differ(values: torch.Tensor, reference: torch.Tensor, rounding: float) -> bool:
    """Whether most vectors (N, K) are others, and not the same but for rounding. One may be: experts change by a tie."""
    spread = (reference - reference.mean(-1, keepdim=True)).norm(dim=-1)
    return bool((values - reference).norm(dim=-1).median() > rounding * spread.median() + 1e-4)


def misfit(teacher: Teacher, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> str | None:
    """
    What keeps a teacher from reading rollouts, `None` if nothing does.

    Args:
        teacher ([`Teacher`]):
            Teacher.
        input_ids (`torch.Tensor`):
            Rollouts of shape `(B, L)`.
        attention_mask (`torch.Tensor`):
            Mask of shape `(B, L)`.

    Returns:
        `str` or `None`: The message of an error.
    """
    if bool((input_ids * attention_mask >= teacher.vocab_size).any()):
        return (
            f"The student produced a token id beyond the teacher's {teacher.vocab_size} (its padding, which no text has). "
            "Suppress those ids in training, `generation_kwargs={'suppress_tokens': [...]}`, or cut the student's padding "
            "off: `student.resize_token_embeddings(len(tokenizer))`."
        )
    longest = int(attention_mask.sum(1).max())
    if teacher.max_length is not None and longest > teacher.max_length:
        return (
            f"A rollout of {longest} tokens is longer than the {teacher.max_length} positions of the teacher. Shorten "
            "prompts and completions (`max_completion_length` in training, `max_new_tokens` in evaluation), or use a "
            "teacher with more positions."
        )
    return None


def _name(module: torch.nn.Module) -> str:
    base = base_model(module)
    if base is module:
        return type(base).__name__
    methods = sorted({config.peft_type.value for config in module.peft_config.values()})  # type: ignore[union-attr]
    return f"{type(base).__name__} with {', '.join(methods)}"
