"""A PEFT tuner whose layer contains trained token rows."""
