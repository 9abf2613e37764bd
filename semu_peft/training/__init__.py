"""Train what is trainable in a model on forget batches, in any number of processes, and go on where it stopped."""
