"""Imports public checkpoints into model folders, exports them again, and checks both against reference outputs."""
