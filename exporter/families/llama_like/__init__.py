"""Model families with Llama's module names, which differ from Llama in single properties such as the activation."""
