"""One prompt's life: messages to tokens, roots, values, continuations, one tree. May import `trees` and `method`."""
