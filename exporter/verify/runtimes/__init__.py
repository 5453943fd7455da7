"""One module per runtime. A module runs in a fresh process, reads a job, computes logits and writes arrays."""
