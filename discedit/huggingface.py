"""Edited transformers models in one folder: the public names of `integrations` for it."""

from discedit.integrations.huggingface import load_pretrained, save_pretrained

__all__ = ["load_pretrained", "save_pretrained"]
