"""Devices and processes: how they are started, what they do together, and how the end of one ends all."""
