"""The loss that a step minimises. Step, loop and schedule are the same for every objective."""
