"""The event engine: a trained network run by its spikes."""
