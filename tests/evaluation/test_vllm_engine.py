"""What evaluation with vLLM says where vLLM is missing. vLLM itself is in tests/slow/test_vllm_evaluation.py."""

import sys

import pytest

from trl_cmdp.evaluation.vllm import load_engine


def test_missing_vllm_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"trl-cmdp\[vllm\]"):
        load_engine("student")
