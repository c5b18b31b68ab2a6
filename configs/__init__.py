"""What to run and where: chains of choices from YAML, settings from the environment."""
