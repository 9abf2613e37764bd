"""What is done to a trained adapter in its model: dial, cut down, exchange, take out."""
