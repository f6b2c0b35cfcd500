"""Public checkpoints become model folders, and back; both against reference outputs."""
