"""Spikes: how they are known, and what autograd keeps of them."""
