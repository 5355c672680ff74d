"""Rollouts on disk: what a checkpoint keeps of a generation cycle comes back as it was."""

import torch

from trl_cmdp.trainers.engine.checkpoints import load_tree, save_tree


def test_a_tree_comes_back_as_it_was(tmp_path):
    """Every kind of tensor and of JSON's values, nested; also tensors that are views of one another."""
    base = torch.arange(12, dtype=torch.float32).view(3, 4)
    tree = [
        None,
        {
            "views": [base, base.T, base[1:, ::2]],
            "dtypes": {str(dtype): torch.ones(2, dtype=dtype) for dtype in (torch.int64, torch.bool, torch.bfloat16)},
            "empty": [torch.empty(0, 3), {}, []],
            "graph": torch.ones(2, requires_grad=True),
            "plain": ["text", 3, 0.1, True, None],
        },
    ]
    save_tree(tmp_path / "tree.safetensors", tree)
    restored = load_tree(tmp_path / "tree.safetensors", torch.device("meta"))  # what was in host memory stays there
    assert restored[0] is None
    assert restored[1].keys() == tree[1].keys()
    assert restored[1]["plain"] == tree[1]["plain"]
    assert restored[1]["empty"][1:] == [{}, []]
    for name in ("views", "dtypes", "empty", "graph"):
        torch.testing.assert_close(restored[1][name], tree[1][name], rtol=0, atol=0)
