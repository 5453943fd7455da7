"""The expected values of modules whose change only PEFT can compute."""
