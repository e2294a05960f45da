"""What the verbs with much of their own do; imported when their words are read."""
