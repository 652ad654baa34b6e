"""The course: a learner writes the Transformer in twelve steps, and checks name the mistakes."""
