"""Linear layers and convolutions: on spikes, on other values, and which is faster."""
