"""Images that a tool returns: the tokens after them are costed given them, and they cost nothing themselves."""

import string

import pytest
import torch
from helpers import make_teacher, make_trainer, micro_batches
from tiny_vision import make_image, make_image_dataset, make_processor, make_vlm

from trl_cmdp.core import token_divergence


CALL, ANSWER, PLAIN = '<call>{"name": "look", "arguments": {}}</call><eos>', "#12<eos>", "#3<eos>"
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content or [] %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% for call in message.tool_calls or [] %}"
    '<call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</call>'
    "{% endfor %}"
    "{% if message.role == 'assistant' %}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
RESPONSE_TEMPLATE = {
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
SEEN = make_image(99)
CHARACTERS = string.printable.replace("\n", "")


def look() -> list:
    """
    Looks.

    Returns:
        What is seen.
    """
    return [{"type": "image", "image": SEEN}, {"type": "text", "text": "12"}]


def build(tmp_path, num_images, answer=ANSWER, **kwargs):
    processor = make_processor("qwen", CHARACTERS)
    tokenizer = processor.tokenizer
    processor.chat_template = tokenizer.chat_template = TEMPLATE
    tokenizer.response_template = RESPONSE_TEMPLATE
    model = make_vlm("qwen", processor=processor)
    ids = {text: tokenizer(text)["input_ids"] for text in (CALL, answer, PLAIN)}

    def generate(input_ids, **inputs):
        """Of two rollouts the first calls the tool, and then answers."""
        turns = [ids[CALL], ids[PLAIN]] if len(input_ids) == 2 else [ids[answer]]
        width = max(map(len, turns))
        return torch.cat([input_ids, torch.tensor([turn + [0] * (width - len(turn)) for turn in turns])], dim=1)

    model.generate = generate
    defaults = {
        "model": model,
        "teacher_model": make_vlm("qwen", 1, processor, hidden_size=32, num_attention_heads=4),
        "train_dataset": make_image_dataset((num_images,), copies=1),
        "reward_funcs": lambda completions, **_: [0.0, 1.0],
        "tokenizer": processor,
        "tools": [look],
        "per_device_train_batch_size": 2,
        "num_generations": 2,
        "max_completion_length": 120,
        "max_steps": 1,
        "cost_limit": 1e-9,
    }
    return make_trainer(tmp_path, **{**defaults, **kwargs})


@pytest.mark.parametrize("num_images", [0, 1])
def test_costs_are_dense(tmp_path, num_images):
    trainer = build(tmp_path, num_images)
    processor, row = trainer.processing_class, trainer.train_dataset[0]
    image_token = processor.image_token_id
    (batch,) = micro_batches(trainer, [row, row])
    assert sorted(batch["num_images"]) == [num_images, num_images + 1]
    for index, counted in enumerate((batch["completion_mask"] * batch["tool_mask"]).bool()):
        prompt = batch["prompt_ids"][index][batch["prompt_mask"][index].bool()]
        completion = batch["completion_ids"][index][batch["completion_mask"][index].bool()]
        ids = torch.cat([prompt, completion]).unsqueeze(0)
        images = [*row["images"], *[SEEN] * int((completion == image_token).any())]
        inputs = dict(processor.image_processor(images=images, return_tensors="pt")) if images else {}
        inputs |= {"input_ids": ids, "mm_token_type_ids": (ids == image_token).long()}
        logits = [
            model(**inputs, attention_mask=torch.ones_like(ids)).logits[0, -(len(completion) + 1) : -1].double()
            for model in (trainer.model, trainer.teacher_model)
        ]
        own = counted[: len(completion)]
        costs = token_divergence(*logits)[own].detach().float()
        torch.testing.assert_close(batch["costs"][index][counted], costs, rtol=1e-4, atol=1e-5)
        assert batch["costs"][index][~counted].eq(0).all()
        assert (image_token in completion) == (not counted[: len(completion)].all())
    trainer.train()
    assert trainer.state.log_history[0]["tools/call_frequency"] == 0.5
    assert trainer.state.log_history[0]["distill_loss"] > 0


def test_an_image_in_a_completion_that_is_masked(tmp_path):
    trainer = build(tmp_path, 0, answer="#12", mask_truncated_completions=True)
    trainer.train()
    assert trainer.state.log_history[0]["completions/clipped_ratio"] == 0.5
    assert trainer.state.log_history[0]["constraint/cost"] > 0  # of the other one


@pytest.mark.parametrize("num_images", [0, 1])
def test_a_teacher_of_text_is_refused(tmp_path, num_images):
    """Where the data has images before training, and otherwise with the first image that the tool returns."""
    vocab_size = len(make_processor("qwen", CHARACTERS).tokenizer)
    with pytest.raises(ValueError, match="does not look at images"):
        build(tmp_path, num_images, teacher_model=make_teacher(vocab_size=vocab_size)).train()
