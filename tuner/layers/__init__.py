"""The PEFT tuner that implements trained token rows as a layer."""
