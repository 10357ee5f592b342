"""Training: the loop, its checkpoints and its run folders, and the settings that all commands share."""

from sltt.training import fit, progress

__all__ = ["fit", "progress"]
