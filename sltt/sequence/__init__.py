"""Time: modules that keep a state, the steps of a sequence, what is done once in it."""
