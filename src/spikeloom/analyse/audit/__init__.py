"""What enters every layer of a network, and what that costs: `audit` is in `api`."""
