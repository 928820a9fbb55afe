"""Measurements that a user can repeat: `spikeloom bench`."""
