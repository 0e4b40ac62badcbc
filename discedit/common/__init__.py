"""What every room may use: checked arguments, files, states of moments."""
