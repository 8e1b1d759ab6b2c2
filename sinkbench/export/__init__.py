"""Checkpoints to Hugging Face models and back."""
