import torch
from hypothesis import settings


settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
settings.load_profile("deterministic")

torch.set_num_threads(1)  # tiny models: threads only wait for one another
