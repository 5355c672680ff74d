"""
One pass over the heads of student and teacher, without either model's full logits: `tiles.py` projects some rows at a
time and works on them in two steps, statistics and then gradient; `autograd.py` joins the tiles to a differentiable
function. A device's own kernel takes the place of the two steps.
"""
