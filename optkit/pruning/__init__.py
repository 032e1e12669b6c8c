"""Pruning of PyTorch models: what depends on what, what matters least, and what must stay zero."""
