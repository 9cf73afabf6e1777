"""Gradients that arrive in the subspace."""
