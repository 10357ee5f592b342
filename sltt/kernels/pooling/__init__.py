"""Max pooling of spikes."""
