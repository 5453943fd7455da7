"""What the names in a checkpoint mean: modules of the loaded model and the stored tensors behind them."""
