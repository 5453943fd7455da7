"""Reading containers, checkpoints and adapters: headers on opening, bytes on demand."""
