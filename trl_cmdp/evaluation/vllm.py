"""Sampling rollouts with vLLM: what [`sample_rollouts`] gives, many times faster on a GPU."""

import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from .._prompts import Prompt, encode_prompt
from .rollouts import Rollout


if TYPE_CHECKING:
    from vllm import LLM


def load_engine(model: str | Path, **kwargs: Any) -> "LLM":
    """
    vLLM's engine in this process, with what exact rollouts need.

    Args:
        model (`str` or `Path`):
            Path or hub id of the model.
        kwargs:
            Further arguments of `vllm.LLM`, such as `dtype` (vLLM's own choice for a float32 checkpoint is half
            precision), `max_model_len`, `gpu_memory_utilization`, and for an adapter `enable_lora` and `max_lora_rank`.

    Returns:
        `vllm.LLM`: The engine.

    Raises:
        ImportError: If vLLM is not installed.
    """
    try:
        from vllm import LLM
    except ImportError as error:
        raise ImportError(f'{error}. Rollouts by vLLM need it: pip install "trl-cmdp[vllm]".') from error
    return LLM(str(model), **kwargs)


def sample_rollouts_vllm(
    engine: "LLM",
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    greedy: bool = False,
    batch_size: int = 64,
    seed: int = 0,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], Any] | None = None,
    adapter: str | Path | None = None,
) -> list[Rollout]:
    """
    One rollout per prompt, from the full distribution at `temperature` (no top-k, no top-p), or greedy.

    Prompts become tokens as in [`sample_rollouts`], and a completion ends as there. Each has a seed of its own, so that
    the others do not matter; but vLLM rounds otherwise than transformers, and somewhat differently from run to run.

    Args:
        engine (`vllm.LLM`):
            Engine with the model to sample from. See [`load_engine`].
        batch_size (`int`, *optional*, defaults to `64`):
            Prompts handed to vLLM at a time, of which it makes its own batches. Not a part of what the seed means.
        adapter (`str` or `Path`, *optional*):
            Folder of a LoRA adapter over the engine's model, for an engine with `enable_lora=True`. It is read once.
        tokenizer, prompts, max_new_tokens, temperature, greedy, seed, chat_template, chat_template_kwargs, progress:
            As in [`sample_rollouts`].

    Returns:
        `list[Rollout]`: Rollouts in the order of the prompts.

    Raises:
        ValueError: If a prompt and `max_new_tokens` together are longer than the engine takes: vLLM would cut the
            completion short.
    """
    from vllm import SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    prompt_ids = [encode_prompt(tokenizer, prompt, chat_template, chat_template_kwargs) for prompt in prompts]
    longest, room = max(map(len, prompt_ids), default=0), engine.llm_engine.model_config.max_model_len
    if longest + max_new_tokens > room:
        raise ValueError(
            f"A prompt of {longest} tokens and `max_new_tokens={max_new_tokens}` are longer than the {room} tokens of "
            "the engine. Make it with a larger `max_model_len`, or ask for fewer tokens."
        )
    # vLLM adds the ids that the model itself declares to end a completion.
    settings = {
        "max_tokens": max_new_tokens,
        "temperature": 0.0 if greedy else temperature,
        "stop_token_ids": [tokenizer.eos_token_id],
        "detokenize": False,
    }
    params = [
        SamplingParams(**settings, seed=random.Random(f"{seed}/{index}").getrandbits(31))
        for index in range(len(prompts))
    ]
    # vLLM tells adapters apart by a number.
    lora = None if adapter is None else LoRARequest(str(adapter), 1 + zlib.crc32(str(adapter).encode()), str(adapter))
    rollouts: list[Rollout] = []
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        outputs = engine.generate(
            [TokensPrompt(prompt_token_ids=ids) for ids in prompt_ids[batch]],
            params[batch],
            use_tqdm=False,
            lora_request=lora,
        )
        for prompt, ids, output in zip(prompts[batch], prompt_ids[batch], outputs, strict=True):
            completion_ids = list(output.outputs[0].token_ids)
            text = str(tokenizer.decode(completion_ids, skip_special_tokens=True))
            rollouts.append(Rollout(prompt, text, ids, completion_ids))
        if progress is not None:
            progress(len(rollouts), len(prompts))
    return rollouts
