"""Model families with RMS norms, such as Llama."""
