"""
One pass over the heads of student and teacher, without either model's full logits: `tiles.py` projects some rows at a
time and works on them in two steps, statistics and then gradient; `autograd.py` joins the tiles to a differentiable
function. `triton_tiles.py` and `triton_heads.py` are the same for CUDA, where the two steps are kernels of
`triton_kernels.py`; `choice.py` says which a device runs.
"""
