"""The PEFT tuner: trained token rows as a layer."""
