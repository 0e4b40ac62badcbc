"""What is known of a network: how it is run, what its layers do, and the trace of one pass through it."""
