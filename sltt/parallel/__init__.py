"""Devices and processes: how they are started, what they do together, and how a signal ends them."""
