"""Models: what is pretrained, what is trained of it, and what is stored so that it is computed once."""
