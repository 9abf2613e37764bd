"""Gradients of chosen weights over some data: where they are caught, and what is kept of them."""
