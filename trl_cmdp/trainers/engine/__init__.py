"""How a signal becomes an optimizer step. Every touch of TRL's private hooks is in this folder."""
