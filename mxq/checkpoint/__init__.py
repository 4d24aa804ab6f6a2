"""Packed checkpoints: written layer by layer, loaded by ``AutoModelForCausalLM.from_pretrained``."""
