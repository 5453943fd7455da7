"""The merge of adapters that only PEFT can merge, on request."""
