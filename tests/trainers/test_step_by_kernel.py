"""A trainer's step by each kernel that a device may have: the loss and the gradients of the CPU's own."""

import pytest
from helpers import loss_and_gradients, make_rows, make_scripted_trainer, micro_batches, relative_error


@pytest.mark.parametrize("kernel", ["trl", pytest.param("triton", marks=pytest.mark.cuda)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's NumPy
def test_a_step_is_the_same_by_every_kernel(tmp_path, monkeypatch, kernel):
    if kernel == "triton":
        pytest.importorskip("triton")
    results = []
    for name in ("torch", kernel):
        monkeypatch.setenv("TRL_CMDP_KERNEL", name)
        trainer = make_scripted_trainer(tmp_path)
        results.append(loss_and_gradients(trainer, micro_batches(trainer, make_rows(8))))
    (expected, expected_gradients), (loss, gradients) = results
    assert loss == pytest.approx(expected, rel=1e-4)
    assert relative_error(gradients, expected_gradients) < 1e-4
