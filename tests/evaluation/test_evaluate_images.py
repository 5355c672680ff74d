"""Problems with images: each rollout's costs are those of its row alone, and its record holds small copies of them."""

import base64
import io
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from helpers import make_settings, make_teacher
from PIL import Image
from tiny_vision import FAMILIES, dense_logits, make_image_dataset, make_processor, make_seeing_teacher, make_vlm

from trl_cmdp._prompts import with_images
from trl_cmdp.core import token_divergence
from trl_cmdp.evaluation import (
    RolloutRecord,
    evaluate,
    read_rollout_records,
    sample_rollouts,
    with_teacher_prompts,
)


SETTINGS = make_settings(num_problems=3, num_samples=1, seed=3, batch_size=3, max_new_tokens=6)
PROBLEMS = make_image_dataset((2, 0, 1), copies=1).select(range(3)).add_column("answer", ["1", "2", "3"])


def reward(completion_ids, images, **kwargs):
    """By the column of the images, which it is given as any other."""
    return [float(len(ids) % 2 == len(own) % 2) for ids, own in zip(completion_ids, images, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_costs_are_dense(tmp_path, family):
    processor, student, teacher = make_processor(family), make_vlm(family).eval(), make_seeing_teacher(family).eval()
    path = tmp_path / "records.jsonl"
    records = evaluate(
        student,
        processor,
        PROBLEMS,
        reward,
        settings=SETTINGS,
        records_path=path,
        teacher=teacher,
        scoring_batch_size=3,
    )
    assert len(records) == 6
    for record in records:
        row = PROBLEMS[record.problem]
        logits = [dense_logits(model, processor, row, record.completion_ids) for model in (student, teacher)]
        costs = token_divergence(*logits).float()
        torch.testing.assert_close(torch.tensor(record.costs), costs, rtol=1e-4, atol=1e-5)
        if record.greedy:
            assert logits[0].argmax(-1)[0] == record.completion_ids[0]
        assert len(record.images or []) == len(row["images"])
        assert record.right == (len(record.completion_ids) % 2 == len(row["images"]) % 2)
        assert record.prompt == [{"role": "user", "content": row["prompt"][0]["content"]}]
    assert read_rollout_records(path)[1] == records
    assert '"images":null' not in path.read_text()  # lines of text are as they were


def test_pictures_in_records(tmp_path):
    processor, student = make_processor("qwen"), make_vlm("qwen")
    wide = Image.new("RGB", (900, 300), "red")
    problems = Dataset.from_dict(
        {"prompt": PROBLEMS["prompt"][:], "answer": PROBLEMS["answer"][:], "images": [[wide]] * 3}
    )
    settings = replace(SETTINGS, teacher=None, greedy=False)
    record, *_ = evaluate(student, processor, problems, reward, settings=settings)
    kind, _, content = record.images[0].partition(",")
    assert kind == "data:image/jpeg;base64"
    small = Image.open(io.BytesIO(base64.b64decode(content)))
    assert small.size == (256, 85)
    with pytest.raises(ValueError, match="data URLs"):
        RolloutRecord.from_json(replace(record, images=["https://example.org/a.jpeg"]).to_json())


class TestRefused:
    def refused(self, message, family="qwen", problems=PROBLEMS, processor=None, **kwargs):
        settings = replace(SETTINGS, **{name: kwargs.pop(name) for name in ("backend",) if name in kwargs})
        processor = make_processor(family) if processor is None else processor
        teacher = kwargs.pop("teacher", None) or make_seeing_teacher(family)
        with pytest.raises(ValueError, match=message):
            evaluate(make_vlm(family), processor, problems, reward, settings=settings, teacher=teacher, **kwargs)

    def test_a_tokenizer(self):
        processor = make_processor("qwen")
        processor.tokenizer.chat_template = "{{ messages[0].content }}"
        self.refused("Row 0 .*image.*Give the student's processor", processor=processor.tokenizer)

    def test_a_teacher_of_text(self):
        teacher = make_teacher(vocab_size=len(make_processor("qwen").tokenizer))
        self.refused("does not look at images", teacher=teacher)

    def test_prompts_of_text(self):
        problems = PROBLEMS.remove_columns("prompt").add_column("prompt", ["1+2="] * 3)
        self.refused("make messages of them", problems=problems)

    def test_prompts_of_the_teachers_own(self):
        """Which play no part without a teacher."""
        problems = PROBLEMS.add_column("teacher_prompt", ["1+2="] * 3)
        message = "'teacher_prompt' cannot be used together with images"
        self.refused(message, problems=problems)
        student, processor = make_vlm("qwen"), make_processor("qwen")
        settings = replace(SETTINGS, teacher=None, greedy=False)
        records = evaluate(student, processor, problems, reward, settings=settings)
        assert [len(record.images or []) for record in records] == [2, 0, 1]
        assert {record.teacher_prompt for record in records} == {None}
        rollouts = sample_rollouts(student, processor, [with_images(problems[0])], max_new_tokens=2)
        with pytest.raises(ValueError, match=message):
            with_teacher_prompts(rollouts, ["1+2="], make_seeing_teacher("qwen"), processor.tokenizer)

    def test_vllm(self):
        self.refused("backend 'transformers' alone", backend="vllm", engine=object())
