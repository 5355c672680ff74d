"""A student that beats its start within its limit: the whole of the method, on a task of seconds."""

import torch
from helpers import make_dataset, make_model, make_teacher, make_tokenizer, make_trainer


def taught(model, steps: int):
    """The model, after some steps of imitation of the dataset's prompts and answers."""
    tokenizer, optimizer = make_tokenizer(), torch.optim.Adam(model.parameters(), lr=0.01)
    rows = make_dataset(1)
    texts = [f"{prompt}{answer}<eos>" for prompt, answer in zip(rows["prompt"], rows["answer"], strict=True)]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    return model


def right_answer(completions, answer, **kwargs):
    return [float(completion == expected) for completion, expected in zip(completions, answer, strict=True)]


def test_a_student_beats_its_start_within_its_limit(tmp_path):
    """
    A student that answers one problem in ten, far from its teacher, learns to answer most and to stay within the
    limit: measured before and after, on 256 sampled rollouts each.
    """
    trainer = make_trainer(
        tmp_path,
        model=taught(make_model(hidden_size=32), steps=10),
        teacher_model=taught(make_teacher(hidden_size=32, spread=0.02), steps=80),
        reward_funcs=right_answer,
        eval_dataset=make_dataset(16),
        cost_limit=0.35,
        max_completion_length=3,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=256,
        num_generations=8,
        num_generations_eval=4,
        learning_rate=0.003,
        lr_scheduler_type="constant",
        max_steps=60,
        logging_steps=60,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_reward"] < 0.4
    assert after["eval_reward"] > 0.8
    assert before["eval_constraint/satisfaction_rate"] < 0.1
    assert after["eval_constraint/satisfaction_rate"] > 0.9
    assert after["eval_constraint/cost"] < 0.35 < before["eval_constraint/cost"]
