"""Loading a teacher, and telling a padded vocabulary from another one."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_cmdp.tasks.arithmetic import demo_model_path
from trl_cmdp.teachers import check_vocabulary, load_teacher


TEACHER = demo_model_path("teacher")


@pytest.fixture
def student():
    return AutoModelForCausalLM.from_pretrained(demo_model_path("student"))


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_model_path("student"))


def test_a_teacher_from_a_path_is_frozen_in_eval_mode_and_in_its_own_dtype(tmp_path):
    AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.bfloat16).save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path))
    assert teacher.dtype == torch.bfloat16
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert load_teacher(str(tmp_path), init_kwargs={"dtype": "float32"}).dtype == torch.float32


@pytest.mark.parametrize("kwargs", [{"revision": "main"}, {"init_kwargs": {"dtype": "float32"}}])
def test_loading_arguments_for_an_instance_are_refused(student, kwargs):
    with pytest.raises(ValueError, match="is an instance"):
        load_teacher(student, **kwargs)


def teacher_config(folder, *, extra_token=None, size=None, with_tokenizer=True):
    """Config of the teacher as saved with a token more in its tokenizer, or with another number of rows in its head."""
    teacher, tokenizer = AutoModelForCausalLM.from_pretrained(TEACHER), AutoTokenizer.from_pretrained(TEACHER)
    if extra_token is not None:
        tokenizer.add_tokens([extra_token])
    if size is not None:
        teacher.resize_token_embeddings(size)
    teacher.save_pretrained(folder)
    if with_tokenizer:
        tokenizer.save_pretrained(folder)
    return load_teacher(str(folder)).config


def test_equal_tokenizers_pass_whatever_the_padding(student, tokenizer, tmp_path):
    check_vocabulary(student, tokenizer, teacher_config(tmp_path / "equal"))
    check_vocabulary(student, tokenizer, teacher_config(tmp_path / "padded", size=len(tokenizer) + 7))
    # A token past the teacher's head, as `<|image|>` of Llama-3.2-Vision, is an input alone.
    check_vocabulary(student, tokenizer, teacher_config(tmp_path / "input", extra_token="<|image|>"))


def test_another_tokenizer_is_an_error(student, tokenizer, tmp_path):
    other = teacher_config(tmp_path / "other", extra_token="x", size=len(tokenizer) + 1)
    with pytest.raises(ValueError, match="1 tokens differ, for example 'x'"):
        check_vocabulary(student, tokenizer, other)
    weights_alone = teacher_config(tmp_path / "unknown", size=32, with_tokenizer=False)
    with pytest.raises(ValueError, match="could not be found"):
        check_vocabulary(student, tokenizer, weights_alone)
