"""Completions of the dataset as the token ids that a student would have written."""

from typing import Any

from trl import GRPOTrainer


def dataset_completions(
    trainer: GRPOTrainer, rows: list[dict[str, Any]], prompt_ids: list[list[int]]
) -> list[list[int]]:
    """
    The dataset's own completions of the rows being generated for, with the end-of-sequence token.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            Trainer, whose tokenizer and chat template count.
        rows (`list[dict[str, Any]]`):
            The rows, with a column `completion`.
        prompt_ids (`list[list[int]]`):
            Token ids of the rows' prompts.

    Raises:
        ValueError: If a completion has messages that are not the assistant's, or cannot be told from its prompt.
    """
    tokenizer, completions = trainer._tokenizer, []
    for row, ids in zip(rows, prompt_ids, strict=True):
        completion = row["completion"]
        if isinstance(completion, str):
            tokens = [*tokenizer(completion, add_special_tokens=False)["input_ids"]]
            tokens.append(tokenizer.eos_token_id)
        else:  # messages: what the chat template adds to the prompt
            roles = sorted({message["role"] for message in completion} - {"assistant"})
            if roles:
                raise ValueError(
                    f"A `completion` of the dataset has messages of the role {', '.join(map(repr, roles))}, whose "
                    "tokens are not the student's to learn. Give each assistant turn a row of its own, with what "
                    "came before in its `prompt`."
                )
            whole = tokenizer.apply_chat_template(
                [*row["prompt"], *completion],
                chat_template=trainer.chat_template,
                tokenize=True,
                return_dict=True,
                **trainer.chat_template_kwargs,
            )["input_ids"]
            if whole[: len(ids)] != ids:
                raise ValueError(
                    "The chat template does not continue its own prompt when the completion is added, so the "
                    "completion's tokens cannot be told apart. Give `prompt` and `completion` as text."
                )
            tokens = whole[len(ids) :]
            # What a template writes after the end of the turn (a newline), no student ever does.
            ends = [position for position, token in enumerate(tokens) if token in trainer.eos_token_ids]
            tokens = tokens[: ends[-1] + 1] if ends else tokens
        completions.append(tokens[: trainer.max_completion_length])
    return completions
