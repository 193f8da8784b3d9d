"""Algorithm cards: pseudocode that is executed against the running kernels."""
