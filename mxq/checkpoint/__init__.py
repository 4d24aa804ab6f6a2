"""Packed checkpoints: written layer by layer, loaded by transformers' ``from_pretrained``."""
