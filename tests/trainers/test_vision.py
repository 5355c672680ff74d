"""Vision-language models are student and teacher on text."""

import pytest
import torch
from datasets import IterableDataset
from helpers import (
    VOCAB,
    assert_gradient_is_dense,
    history,
    make_rows,
    make_scripted_trainer,
    make_teacher,
    make_tokenizer,
    micro_batches,
    run,
    save_model,
)
from transformers import (
    MllamaConfig,
    MllamaForCausalLM,
    MllamaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)


TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
}


def make_qwen() -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(2)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "num_hidden_layers": 1, "rope_parameters": rope},
        vision_config={**vision, "patch_size": 4, "fullatt_block_indexes": [0]},
        image_token_id=VOCAB - 1,
        video_token_id=VOCAB - 2,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def make_mllama() -> MllamaForConditionalGeneration:
    torch.manual_seed(2)
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_global_layers": 1}
    tiles = {"image_size": 8, "patch_size": 4, "supported_aspect_ratios": [[1, 1]], "max_num_tiles": 1}
    config = MllamaConfig(
        text_config={**TEXT, "num_hidden_layers": 2, "cross_attention_layers": [1]},
        vision_config={
            **vision,
            **tiles,
            "attention_heads": 2,
            "vision_output_dim": 16,
            "intermediate_layers_indices": [0],
        },
        image_token_index=VOCAB - 1,
    )
    return MllamaForConditionalGeneration(config)


@pytest.mark.parametrize("make", [make_qwen, make_mllama])
@pytest.mark.parametrize("role", ["model", "teacher_model"])
def test_gradient(tmp_path, make, role):
    """As student and as teacher: of the whole models' own logits."""
    trainer = make_scripted_trainer(tmp_path, cost_limit=1e-9, **{role: make()})
    assert_gradient_is_dense(trainer, micro_batches(trainer, make_rows(8)))


def test_mllama_teacher_from_its_path(tmp_path):
    """The paper's 11B teacher: of the checkpoint the text part alone is loaded, and it has the whole's logits."""
    whole = make_mllama()
    path = save_model(tmp_path / "teacher", whole, make_tokenizer())
    trainer = make_scripted_trainer(tmp_path, cost_limit=1e-9, teacher_model=path)
    assert isinstance(trainer.teacher_model, MllamaForCausalLM)
    input_ids = torch.tensor([[2, 3, 4, 5]])
    torch.testing.assert_close(trainer.teacher_model(input_ids).logits, whole.eval()(input_ids).logits)
    assert_gradient_is_dense(trainer, micro_batches(trainer, make_rows(8)))


def test_qwen_teacher_from_its_path(tmp_path):
    """It has no part for text alone, so the whole is loaded."""
    path = save_model(tmp_path / "teacher", make_qwen(), make_tokenizer())
    trainer = make_scripted_trainer(tmp_path, cost_limit=1e-9, teacher_model=path)
    assert isinstance(trainer.teacher_model, Qwen2_5_VLForConditionalGeneration)
    assert_gradient_is_dense(trainer, micro_batches(trainer, make_rows(8)))


def test_qwen_student_from_its_path(tmp_path):
    trainer = run(tmp_path, model=save_model(tmp_path / "student", make_qwen()), teacher_model=make_teacher())
    assert isinstance(trainer.model, Qwen2_5_VLForConditionalGeneration)
    assert len(history(trainer, "constraint/cost")) == 2


def test_a_stream_of_text_is_not_consumed(tmp_path):
    prompts = ["1+2=", "3+4=", "5+6=", "7+8="]
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.extend(prompts)
        return [0.0] * len(completions)

    run(
        tmp_path,
        reward_funcs=reward,
        train_dataset=IterableDataset.from_generator(lambda: ({"prompt": prompt} for prompt in prompts)),
        shuffle_dataset=False,
        teacher_model=make_teacher(),
    )
    assert seen == ["1+2="] * 4 + ["3+4="] * 4
