"""Ship an adapter in the formats of others, and take theirs in."""
