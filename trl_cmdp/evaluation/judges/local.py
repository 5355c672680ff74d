"""A judge's language model in this process, by transformers."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..provenance import weights_fingerprint
from ._client import Message, NoReplyError


class LocalChat:
    """
    A chat model of transformers, asked one question at a time, greedily.

    Args:
        path (`str`):
            Local folder or hub id of a model whose tokenizer has a chat template.
        max_new_tokens (`int`, *optional*, defaults to `1024`):
            Longest reply, in tokens.
        device (`str`, *optional*, defaults to `"cpu"`):
            Device of the model.

    Raises:
        ValueError: If the tokenizer has no chat template.
    """

    concurrency = 1

    def __init__(self, path: str, *, max_new_tokens: int = 1024, device: str = "cpu"):
        self._tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if self._tokenizer.chat_template is None:
            raise ValueError(f"{path!r} has no chat template: a judge must be a chat model.")
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", trust_remote_code=False, use_safetensors=True
        )
        self._model = model.to(device).eval()
        # Cached replies are those of these weights, and of no others that later lie at the same path.
        fingerprint = weights_fingerprint(path)
        self.model = path if fingerprint is None else f"{path}@{fingerprint[:16]}"
        self.sampling_params: dict[str, Any] = {"do_sample": False, "max_new_tokens": max_new_tokens}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model!r})"

    @torch.no_grad()
    def complete(self, messages: Sequence[Message]) -> tuple[str, Counter[str]]:
        """
        Reply to a conversation.

        Args:
            messages (`Sequence[dict[str, str]]`):
                Messages, each with `role` and `content`.

        Returns:
            `tuple[str, Counter[str]]`: The reply, and no failures.

        Raises:
            NoReplyError: If the conversation and the longest reply do not fit into the model's context (`refused`).
        """
        inputs = self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self._model.device)
        length = inputs["input_ids"].shape[1]
        if (
            length + self.sampling_params["max_new_tokens"]
            > self._model.config.get_text_config().max_position_embeddings
        ):
            raise NoReplyError("The conversation does not fit into the context.", Counter(refused=1))
        tokens = self._model.generate(
            **inputs, **self.sampling_params, temperature=None, top_p=None, top_k=None, num_beams=1
        )
        return self._tokenizer.decode(tokens[0, length:], skip_special_tokens=True), Counter()
