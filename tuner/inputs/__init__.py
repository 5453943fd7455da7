"""What a training run reads: base, data, vocabulary."""
