"""The stages of `gsm_symbolic.py`."""
