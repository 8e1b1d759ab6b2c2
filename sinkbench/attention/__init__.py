"""Attention in plain torch: the ground truth of every variant. Nothing here knows of megatron."""
