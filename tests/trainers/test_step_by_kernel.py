"""A trainer's step by each kernel that a device may have: the loss and the gradients of the CPU's own."""

import pytest
import torch
import trl.kernels.chunked_divergence
from helpers import loss_and_gradients, make_rows, make_scripted_trainer, micro_batches, relative_error


@pytest.mark.parametrize("kernel", ["trl", pytest.param("triton", marks=pytest.mark.cuda)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's NumPy
def test_a_step_is_the_same_by_every_kernel(tmp_path, monkeypatch, kernel):
    if kernel == "triton":
        pytest.importorskip("triton")
    results = []
    for name in ("torch", kernel):
        monkeypatch.setenv("TRL_CMDP_KERNEL", name)
        trainer = make_scripted_trainer(tmp_path, use_cpu=not torch.cuda.is_available())
        results.append(loss_and_gradients(trainer, micro_batches(trainer, make_rows(8))))
    (expected, expected_gradients), (loss, gradients) = results
    assert loss == pytest.approx(expected, rel=1e-5)
    assert relative_error(gradients, expected_gradients) < 1e-5


def test_kernels_that_trl_moved_are_named(tmp_path, monkeypatch):
    """Before training, and only where they are the device's."""
    moved = staticmethod(lambda ctx, hidden: None)
    monkeypatch.setattr(trl.kernels.chunked_divergence.ChunkedDivergenceFunction, "forward", moved)
    make_scripted_trainer(tmp_path)
    monkeypatch.setenv("TRL_CMDP_KERNEL", "trl")
    with pytest.raises(ImportError, match=r"ChunkedDivergenceFunction\.forward. is \(ctx, hidden\)"):
        make_scripted_trainer(tmp_path)
