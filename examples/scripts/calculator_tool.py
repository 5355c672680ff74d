"""
Constrained distillation of a student that calls a calculator: TRL's own tool loop, on a CPU, from nothing.

    python examples/scripts/calculator_tool.py            # minutes
    python examples/scripts/calculator_tool.py --quick    # seconds, too short to learn anything

Problems are `7*8`. The teacher always asks the calculator and copies its result. The student has learnt to answer most
problems from its head, where half of its answers are wrong. Both are first trained here, on written-out conversations;
then `ConstrainedDistillTrainer` trains the student on the reward (is the answer right?) within a limit on its
divergence from the teacher. The calculator's tokens are context: they cost nothing and are trained on by nobody.
"""

import argparse
import itertools
import random
import tempfile

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_cmdp import ConstrainedDistillConfig, ConstrainedDistillTrainer


COST_LIMIT = 0.2  # nats per token of the student's own
# What surrounds an expression in a call is one token each: a model this small need not learn to spell JSON.
CALL_START, CALL_END = '<call>{"name": "calculate", "arguments": {"expression": "', '"}}</call>'
SPECIAL_TOKENS = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>", "<tool>", CALL_START, CALL_END]
# Prefix-preserving, as multi-turn training needs: what is rendered does not depend on what follows.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}<assistant>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    '<call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</call>'
    "{% endfor %}<eos>"
    "{% else %}<{{ message.role }}>{{ message.content }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
RESPONSE_TEMPLATE = {  # how transformers reads tool calls out of what the student writes
    "defaults": {"role": "assistant"},
    "start_anchor": "<assistant>",
    "fields": {
        "tool_calls": {
            "open": "<call>",
            "close_pattern": r"</call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<eos>", "content": "text"},
    },
}


def calculate(expression: str) -> str:
    """
    Calculates a sum or a product of two digits.

    Args:
        expression: For example "7*8".

    Returns:
        The result, or "?" if it is no such expression.
    """
    left, operator, right = expression if len(expression) == 3 else "???"
    if not (left.isdecimal() and right.isdecimal() and operator in "+*"):
        return "?"
    return str(int(left) * int(right) if operator == "*" else int(left) + int(right))


def final_answer_reward(completions: list[list[dict]], answer: list[str], **kwargs) -> list[float]:
    """1 where the last message of the student is `#` and the right answer."""
    return [
        float(completion[-1]["role"] == "assistant" and completion[-1]["content"] == f"#{expected}")
        for completion, expected in zip(completions, answer, strict=True)
    ]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, and those of the chat format."""
    vocab = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *"0123456789+*#?"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([CALL_START, CALL_END])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>", "<tool>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.response_template = RESPONSE_TEMPLATE
    return tokenizer


def make_dataset() -> Dataset:
    """Every problem once, in random order."""
    problems = ["".join(parts) for parts in itertools.product("23456789", "+*", "23456789")]
    random.Random(0).shuffle(problems)
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": problem}] for problem in problems],
            "answer": [calculate(problem) for problem in problems],
        }
    )


def conversation(row: dict, tool_share: float, rng: random.Random) -> list[dict]:
    """A worked answer: by the calculator in `tool_share` of the cases, else from the head, half of them wrong."""
    (question,) = row["prompt"]
    if rng.random() >= tool_share:
        stated = row["answer"] if rng.random() < 0.5 else str(rng.randint(4, 81))
        return [question, {"role": "assistant", "content": f"#{stated}"}]
    call = {"name": "calculate", "arguments": {"expression": question["content"]}}
    return [
        question,
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "name": "calculate", "content": row["answer"]},
        {"role": "assistant", "content": f"#{row['answer']}"},
    ]


def pretrain(
    tokenizer: PreTrainedTokenizerFast, dataset: Dataset, tool_share: float, steps: int, seed: int
) -> LlamaForCausalLM:
    """A model that has learnt such conversations, every token of the assistant after the question included."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    rows = list(dataset)
    for _ in range(steps):
        texts = [
            tokenizer.apply_chat_template(conversation(row, tool_share, rng), tokenize=False)
            for row in rng.sample(rows, 64)
        ]
        batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of distillation")
    parser.add_argument("--pretrain-steps", type=int, default=600, help="steps of each model's own training before")
    parser.add_argument("--output-dir", default=None, help="folder of the trained student, none by default")
    parser.add_argument("--quick", action="store_true", help="2 steps each: whether it runs, not whether it learns")
    arguments = parser.parse_args()
    steps, pretrain_steps = (2, 2) if arguments.quick else (arguments.steps, arguments.pretrain_steps)

    tokenizer, dataset = make_tokenizer(), make_dataset()
    print(f"training a teacher and a student for {pretrain_steps} steps each", flush=True)
    teacher = pretrain(tokenizer, dataset, tool_share=1.0, steps=pretrain_steps, seed=0)
    student = pretrain(tokenizer, dataset, tool_share=0.3, steps=pretrain_steps, seed=1)

    with tempfile.TemporaryDirectory() as scratch:
        trainer = ConstrainedDistillTrainer(
            model=student,
            reward_funcs=final_answer_reward,
            args=ConstrainedDistillConfig(
                output_dir=arguments.output_dir or scratch,
                cost_limit=COST_LIMIT,
                max_steps=steps,
                per_device_train_batch_size=64,
                num_generations=8,
                max_completion_length=24,
                max_tool_calling_iterations=2,
                learning_rate=1e-3,
                logging_steps=max(1, steps // 10),
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
            ),
            train_dataset=dataset,
            processing_class=tokenizer,
            tools=[calculate],
            teacher_model=teacher,
        )
        trainer.train()
        if arguments.output_dir:
            trainer.save_model()

    print("\nstep  reward   cost  limit  satisfied  calls  tool tokens")
    for entry in trainer.state.log_history:
        if "constraint/cost" in entry:
            print(
                f"{entry['step']:4d}  {entry['reward']:6.3f}  {entry['constraint/cost']:5.3f}  "
                f"{entry['constraint/limit']:5.2f}  {entry['constraint/satisfaction_rate']:9.3f}  "
                f"{entry['tools/call_frequency']:5.2f}  {entry['tools/token_frac']:11.3f}"
            )


if __name__ == "__main__":
    main()
