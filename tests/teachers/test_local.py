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


def test_remote_code_needs_the_users_word(tmp_path):
    """A folder whose config asks for its own code is not run unless `teacher_model_init_kwargs` says so."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}'
    )
    (tmp_path / "own.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_teacher(str(tmp_path))


def test_equal_tokenizers_pass_whatever_the_padding(student, tokenizer, tmp_path):
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER)
    check_vocabulary(student, tokenizer, teacher.config)
    teacher.resize_token_embeddings(len(tokenizer) + 7)
    check_vocabulary(student, tokenizer, teacher.config)


def test_another_tokenizer_is_an_error_that_names_tokens(student, tokenizer, tmp_path):
    other = AutoTokenizer.from_pretrained(TEACHER)
    other.add_tokens(["x"])
    other.save_pretrained(tmp_path)
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER)
    teacher.resize_token_embeddings(len(other))
    teacher.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="1 tokens differ, for example 'x'"):
        check_vocabulary(student, tokenizer, load_teacher(str(tmp_path)).config)


def test_a_token_past_the_teachers_head_does_not_matter(student, tokenizer, tmp_path):
    """`<|image|>` of Llama-3.2-Vision is an input alone."""
    other = AutoTokenizer.from_pretrained(TEACHER)
    other.add_tokens(["<|image|>"])
    other.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(TEACHER).save_pretrained(tmp_path)
    check_vocabulary(student, tokenizer, load_teacher(str(tmp_path)).config)


def test_unequal_sizes_without_a_tokenizer_are_an_error(student, tokenizer, tmp_path):
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER)
    teacher.resize_token_embeddings(32)
    teacher.save_pretrained(tmp_path)  # the weights alone
    with pytest.raises(ValueError, match="could not be found"):
        check_vocabulary(student, tokenizer, load_teacher(str(tmp_path)).config)
