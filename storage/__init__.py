"""What outlives a process: artifacts, lines, scores and the model registry."""
