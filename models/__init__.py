"""Checkpoints, tokenizers, caches, the models themselves, sampling and generation. A model knows no terminal."""
