"""Decompositions of matrices and of small cores: torch alone, nothing of models or training."""
