"""Compare the token ids that llama.cpp and transformers give to texts with taught and added tokens."""
