"""One module per runtime, each run in a fresh process: it reads a job, computes logits and writes arrays."""
