"""The PEFT tuner: rows of tokens as a layer."""
